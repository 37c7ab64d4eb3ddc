"""The main job: picture in, bigger picture out."""

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from . import evaluation
from .diffusion.samplers import SAMPLERS, Noise
from .evaluation import MemoryPlan, TileSize
from .images import colours_and_alpha, match_low_frequencies, match_mean_deviation, resize
from .infdit.checkpoint import load_infdit
from .infdit.config import InfDiTConfig, Preset
from .infdit.model import InfDiT, Progress
from .memory import pictures_in_main_memory

log = logging.getLogger(__name__)

Sampler = Callable[..., Tensor]  # (denoise, x, sigmas, noise=...), as those of diffusion/samplers.py
MAX_PIXELS = 2**30  # of a result: 12 GiB in fp32, and a sampler holds several such tensors


class UpscaleProgress(NamedTuple):
    """What `upscale` reports after every tile."""

    fraction: float  # of all the work, 0..1
    estimate: Tensor  # (1, 3, H, W) in [-1, 1]: the picture under work as it is estimated now


OnProgress = Callable[[UpscaleProgress], None]


@lru_cache(maxsize=1)
def _default_model() -> InfDiT:
    return load_infdit()


def target_size(
    height: int, width: int, *, scale: float | None = None, size: tuple[int | None, int | None] | None = None
) -> tuple[int, int]:
    """(height, width) of the result for a picture of height x width.

    scale: a factor; size: (height, width), one of them may be None and follows the aspect. Raises ValueError.
    """
    if (scale is None) == (size is None):
        raise ValueError("say how big the result should be: either a scale or a size")
    if scale is not None:
        if not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"scale is {scale}: it must be a positive number, 4 for four times the width and height")
        if scale * max(height, width) > MAX_PIXELS:
            raise ValueError(f"scale {scale:g} makes a side of {scale * max(height, width):.3g} pixels: too large")
        wanted = (height * scale, width * scale)
    else:
        assert size is not None
        if size[0] is None and size[1] is None:
            raise ValueError("give a width, a height or both")
        if any(side is not None and side < 1 for side in size):
            raise ValueError(f"width and height must be at least 1 pixel, not {size[1]} x {size[0]}")
        by_height, by_width = (
            None if side is None else side / was for side, was in zip(size, (height, width), strict=True)
        )
        wanted = (height * (by_height or by_width or 1), width * (by_width or by_height or 1))
    result = (max(1, round(wanted[0])), max(1, round(wanted[1])))
    if result[0] * result[1] > MAX_PIXELS:
        raise ValueError(
            f"the result would have {result[1]} x {result[0]} pixels, more than {MAX_PIXELS}: choose a smaller scale"
        )
    return result


@torch.no_grad()
@pictures_in_main_memory()
def upscale(
    image: Tensor,
    *,
    model: InfDiT | None = None,
    scale: float | None = None,
    size: tuple[int | None, int | None] | None = None,
    semantic: Tensor | None = None,
    preset: str = "balanced",
    steps: int | None = None,
    start: float | None = None,
    detail: float | None = None,
    sigmas: Tensor | None = None,
    sampler: str | Sampler | None = None,
    seed: int = 0,
    tile: TileSize = "auto",
    colour: Literal["none", "wavelet", "mean"] = "none",
    on_progress: OnProgress | None = None,
) -> Tensor:
    """Enlarge pictures.

    image: (B, H, W, C) float in 0..1; C = 1 grey, 2 grey and alpha, 3 RGB, 4 RGBA; alpha is resized bicubically.
    model: None loads the shipped default. scale or size (height, width; one may be None): how big the result is;
    a scale other than the network's is reached by whole passes, each resized to where the next one starts or to
    the result. semantic: (1 or B, semantic_size), a CLIP vector for every picture or one for all.
    preset: faithful, balanced or detailed, as the weights define them; steps and start override it: start is the sigma
    of the noise put on a first picture, the predictor's or without one the network's estimate, from where the sampler
    takes `steps` steps; steps = 1 alone is that estimate, one evaluation from the largest sigma, and steps = 0 the
    predictor's picture, without any. sigmas: a schedule of your own in their place, n + 1 falling values; one that
    starts below the weights' largest sigma starts on the first picture. detail: share of the detailer in that picture,
    None: the preset's, or 0 beside steps, start or sigmas, for a sampler brings details of its own. sampler: heun,
    euler, ddim or dpmpp_2m, or a function with the signature of those, instead of the preset's. seed: every picture's
    own, so that it doesn't matter what else is in the batch. tile: blocks a step, "auto" by free memory, None all at
    once; never changes the result. colour: transfer from the input, "wavelet" the low frequencies, "mean" mean and
    deviation.
    on_progress is called after every tile; what it raises stops the work.

    Returns (B, H', W', C) fp32 on image's device. Raises ValueError for what can't be done, MemoryError where no tile
    is small enough or main memory runs out.
    """
    if not image.is_floating_point():
        raise ValueError(f"image is {image.dtype}: it must be floating point in 0..1, so divide levels by 255")
    if image.ndim != 4 or image.shape[3] not in (1, 2, 3, 4) or 0 in image.shape:
        raise ValueError(
            f"image has shape {tuple(image.shape)}: it must be (B, H, W, C) with 1 to 4 channels, none empty"
        )
    if not image.isfinite().all():
        raise ValueError("image holds values that are not numbers (NaN or infinite)")
    if isinstance(sampler, str) and sampler not in SAMPLERS:
        raise ValueError(f"sampler is {sampler!r}: it must be one of {', '.join(SAMPLERS)}")
    if colour not in ("none", "wavelet", "mean"):
        raise ValueError(f"colour is {colour!r}: it must be none, wavelet or mean")
    model = model or _default_model()
    if preset not in model.config.presets:
        raise ValueError(f"preset is {preset!r}: these weights have {', '.join(model.config.presets)}")
    chosen = model.config.presets[preset]
    sampler = sampler or chosen.sampler
    if isinstance(sampler, str):
        sampler = SAMPLERS[sampler]
    semantic = usable_semantic(semantic, model, len(image))
    schedule = _schedule(model.config, chosen, steps, start, sigmas)
    if detail is None:
        detail = chosen.detail if steps is None and start is None and sigmas is None else 0.0
    model.config.check_detail(detail)
    size = target_size(image.shape[1], image.shape[2], scale=scale, size=size)
    passes = _passes((image.shape[1], image.shape[2]), size, model.config.scale)
    # For every pixel that a pass starts from.
    work = model.config.prediction_work(detail) + schedule.evaluations(sampler)
    work *= len(image) * sum(math.prod(start) for start, _ in passes)
    finished = 0.0

    def report(progress: Progress, part: float) -> None:
        if on_progress is not None:
            done = finished + part * progress.done / progress.total
            on_progress(UpscaleProgress(min(1.0, done / work), progress.estimate))

    def complete(part: float) -> None:
        nonlocal finished
        finished += part

    for index, picture in enumerate(image.permute(0, 3, 1, 2).float().split(1)):
        colours, alpha = colours_and_alpha(picture)
        x = colours * 2 - 1
        vector = None if semantic is None else semantic[index % len(semantic)][None]
        for _, wanted in passes:
            x = _enlarge(x, model, schedule, detail, sampler, seed, vector, tile, report, complete)
            x = x if tuple(x.shape[2:]) == wanted else resize(x, wanted)
            x = x.clamp_(-1, 1)
        if not passes:
            x = resize(x, size).clamp(-1, 1)
        if colour != "none":
            reference = resize(colours * 2 - 1, size)
            x = (match_low_frequencies if colour == "wavelet" else match_mean_deviation)(x, reference).clamp(-1, 1)
        x = x.add_(1).div_(2)
        if picture.shape[1] < 3:
            x = x.mean(1, keepdim=True)
        if alpha is not None:
            x = torch.cat([x, resize(alpha, size).clamp(0, 1)], dim=1)
        if index == 0:  # a batch is never held twice
            results = x if len(image) == 1 else x.new_empty(len(image), *x.shape[1:])
        results[index] = x[0]
    return results.permute(0, 2, 3, 1)


def semantics_matter(model: InfDiT) -> bool:
    """Whether a semantic vector changes anything; where it doesn't, this says so, once."""
    if not model.uses_semantics:
        _say_ignored()
    return model.uses_semantics


def usable_semantic(semantic: Tensor | None, model: InfDiT, pictures: int) -> Tensor | None:
    """semantic, (1 or pictures, size), or None where it changes nothing. Raises ValueError for others and for NaN."""
    if semantic is None or not semantics_matter(model):
        return None
    if semantic.ndim != 2 or len(semantic) not in (1, pictures):
        raise ValueError(f"semantic has shape {tuple(semantic.shape)}: it must be one vector, or {pictures}")
    if not semantic.isfinite().all():
        raise ValueError("semantic holds values that are not numbers (NaN or infinite)")
    return semantic


@lru_cache(maxsize=1)
def _say_ignored() -> None:
    log.warning("these weights were trained without semantics: what CLIP sees, and prompts, change nothing")


class _Schedule(NamedTuple):
    estimated: bool  # the first picture is the network's estimate, not what the predictor makes
    sigmas: Tensor | None  # of the noise put on it, down to 0; None: that picture is the result

    def evaluations(self, sampler: Sampler) -> int:
        """How many it takes, counted on a single pixel: samplers differ, and may be a host's."""
        calls = int(self.estimated)
        if self.sigmas is None:
            return calls

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return torch.zeros_like(x)

        sampler(denoise, torch.zeros(1, 3, 1, 1), self.sigmas, noise=torch.zeros_like)
        return calls


def _schedule(
    config: InfDiTConfig, preset: Preset, steps: int | None, start: float | None, sigmas: Tensor | None
) -> _Schedule:
    if sigmas is not None:
        sigmas = sigmas.detach().float().cpu()
        if sigmas.ndim != 1 or len(sigmas) < 2 or not sigmas.isfinite().all() or not (sigmas.diff() < 0).all():
            raise ValueError("sigmas must be at least two numbers, each smaller than the one before")
        if sigmas[-1] != 0 or not config.sigma_min <= sigmas[0] <= config.sigma_max * (1 + 1e-4):
            raise ValueError(
                f"sigmas go from {sigmas[0]:g} to {sigmas[-1]:g}: these weights take {config.sigma_min:g} to "
                f"{config.sigma_max:g} at the start, and at the end it must be 0, or noise would be left"
            )
        below = bool(sigmas[0] < config.sigma_max * (1 - 1e-4))
        return _Schedule(estimated=below and not config.predictor_depth, sigmas=sigmas)
    if start is not None and not config.sigma_min < start <= config.sigma_max:
        raise ValueError(
            f"start is {start}: these weights take a sigma above {config.sigma_min:g} and up to {config.sigma_max:g}"
        )
    if start is None and steps not in (0, 1):
        start = preset.start
    if steps is None:
        steps = preset.steps if start is None else max(1, preset.steps)
    config.check_steps(steps, start)
    if start is None and steps <= 1:
        return _Schedule(estimated=steps == 1, sigmas=None)
    levels = replace(preset, steps=steps, start=start).sigmas(config.sigma_min, config.sigma_max)
    return _Schedule(estimated=start is not None and not config.predictor_depth, sigmas=levels)


def pass_size(start: tuple[int, int], scale: int) -> tuple[int, int]:
    """(height, width) of what one pass makes, whatever the target. Raises ValueError where that is too large."""
    height, width = start[0] * scale, start[1] * scale
    if height * width > MAX_PIXELS:
        raise ValueError(
            f"the network enlarges by {scale} at a time, whatever the result's size, and {width} x {height} pixels on "
            f"the way are more than {MAX_PIXELS}: cut the picture into smaller ones first"
        )
    return height, width


def _passes(
    size: tuple[int, int], target: tuple[int, int], scale: int
) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """From which size every pass of the network starts, and to which its result is resized; the last is the target.

    Where the sides grow by different factors, none falls below its input or its target on the way. Raises ValueError.
    """
    ratio = max(target[0] / size[0], target[1] / size[1])
    count = 0 if ratio <= 1 else math.ceil(math.log(ratio, scale) - 1e-9)

    def side(axis: int, left: int) -> int:
        return max(math.ceil(target[axis] / scale**left), min(target[axis], size[axis]))

    sizes = [size, *((side(0, left), side(1, left)) for left in reversed(range(count)))]
    for start in sizes[:-1]:
        pass_size(start, scale)
    return list(pairwise(sizes))


def _enlarge(
    x: Tensor,
    model: InfDiT,
    schedule: _Schedule,
    detail: float,
    sampler: Sampler,
    seed: int,
    semantic: Tensor | None,
    tile: TileSize,
    on_tile: Callable[..., None],
    on_part: Callable[[float], None],
) -> Tensor:
    """One pass: (1, 3, h, w) in [-1, 1] -> (1, 3, h * scale, w * scale), not clamped.

    on_tile(progress, part=...) is told how much work the part is that the tile belongs to, on_part(part) that it is
    done: evaluations times x's pixels.
    """
    config = model.config
    noise = noise_of(seed)
    evaluation_work = x.shape[2] * x.shape[3]
    prediction_work = config.prediction_work(detail) * evaluation_work
    upsampled = model.upsample(x, on_tile=partial(on_tile, part=prediction_work), detail=detail)
    on_part(prediction_work)
    memory = MemoryPlan(model, (x.shape[2], x.shape[3]), tile)

    def denoise(noisy: Tensor, sigma: Tensor) -> Tensor:
        denoised = evaluation.denoise(
            model, memory, noisy, sigma, x, upsampled, semantic=semantic, on_tile=partial(on_tile, part=evaluation_work)
        )
        on_part(evaluation_work)
        return denoised

    result = upsampled
    if schedule.estimated:
        # A residual network is trained to answer no noise at sigma_max with the mean of all pictures that the
        # low resolution allows; in a picture network noise takes that place, as in the paper's start.
        if config.parametrisation == "picture":
            result = noise(result).mul_(config.sigma_max).add_(result)
        result = denoise(result, torch.tensor(config.sigma_max))
    elif schedule.sigmas is None and config.parametrisation == "residual":
        evaluation.keep_to(x, result, lambda: on_tile(Progress(1, 1, result), part=0.0))
    if schedule.sigmas is not None:
        result = noise(result).mul_(schedule.sigmas[0]).add_(result)
        result = sampler(denoise, result, schedule.sigmas, noise=noise)
    return result


def noise_of(seed: int) -> Noise:
    """Standard normal noise, always the same for a seed: drawn on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    return lambda like: torch.randn(like.shape, generator=generator).to(like.device)


def working_memory(
    model: InfDiT, image_size: tuple[int, int], size: tuple[int, int], tile: TileSize = "auto", free: int | None = None
) -> int:
    """Bytes that `upscale` takes on the network's device beside the weights, from and to a (height, width).

    free: what it may take, None: what is free there now.
    """
    passes = _passes(image_size, size, model.config.scale)
    return max((MemoryPlan(model, start, tile, free).bytes for start, _ in passes), default=0)
