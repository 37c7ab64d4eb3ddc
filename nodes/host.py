"""The only file that touches comfy.* and folder_paths: model patcher, memory, progress, interrupt, folders."""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.model_management as management
import comfy.model_patcher
import comfy.model_sampling
import comfy.ops
import comfy.patcher_extension
import comfy.samplers
import comfy.supported_models_base
import comfy.utils
import folder_paths
import torch
from PIL import Image
from torch import Tensor, nn

from ..infdit_core import evaluation, semantics
from ..infdit_core import upscale as upscale_pictures
from ..infdit_core.diffusion import samplers
from ..infdit_core.evaluation import MemoryPlan, TileSize, block_grid
from ..infdit_core.infdit import InfDiT, load_infdit
from ..infdit_core.upscale import Sampler, UpscaleProgress, noise_of, working_memory
from ..infdit_core.weights import WeightsError

log = logging.getLogger(__name__)

# --- folders

FOLDER = "infdit"
SHIPPED = "default (shipped)"
EXTENSIONS = {".safetensors", ".pt", ".pth", ".ckpt", ".bin"}


def register_model_folder() -> None:
    """Make models/infdit known to the host, beside what extra_model_paths.yaml added under that name."""
    folder = Path(folder_paths.models_dir) / FOLDER
    folder_paths.add_model_folder_path(FOLDER, str(folder))
    paths, extensions = folder_paths.folder_names_and_paths[FOLDER]
    folder_paths.folder_names_and_paths[FOLDER] = (paths, set(extensions) | EXTENSIONS)  # empty would list any file
    with suppress(OSError):  # a read-only models folder: then it lists nothing
        folder.mkdir(parents=True, exist_ok=True)


def model_names() -> list[str]:
    """What the loader offers: the shipped default, then the files in models/infdit."""
    return [SHIPPED, *folder_paths.get_filename_list(FOLDER)]


def model_path(name: str) -> Path | None:
    """The file of a name, None for the shipped default. Raises WeightsError that says where to put it."""
    if name == SHIPPED:
        return None
    found = folder_paths.get_full_path(FOLDER, name)
    if found is None:
        folders = " or ".join(folder_paths.get_folder_paths(FOLDER))
        raise WeightsError(
            f"There is no Inf-DiT file {name!r}: put it into {folders}, or choose {SHIPPED!r}, which is always there."
        )
    return Path(found)


def fingerprint(find: Callable[[str], Path | None], name: str | None, *beside: str) -> str:
    """Changes when the file of a name does, so that the host loads it anew. find: `model_path` or `clip_path`.

    name: None where it is linked, and not known yet. beside: files in the same folder that count too.
    """
    if name is None:
        return "linked"
    try:
        path = find(name)
        files = [] if path is None else [path, *filter(Path.is_file, (path.parent / other for other in beside))]
        found = [file.stat() for file in files]
    except (ValueError, OSError):
        return "missing"
    return name + "".join(f" {stat.st_size} {stat.st_mtime_ns}" for stat in found)


def is_there(find: Callable[[str], Path | None], name: str | None) -> bool | str:
    """For validate_inputs: the host's own check of a combo doesn't say where to put a file that is missing."""
    try:
        if name is not None:
            find(name)
    except ValueError as error:
        return str(error)
    return True


# --- the model


class _Picture(comfy.latent_formats.LatentFormat):
    """The "latent" is the picture itself, RGB in [-1, 1], which gives the host's previews for free."""

    latent_channels = 3
    latent_rgb_factors = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))


class _ModelConfig(comfy.supported_models_base.BASE):
    latent_format = _Picture
    memory_usage_factor = 1.0


class _Sampling(comfy.model_sampling.ModelSamplingContinuousEDM, comfy.model_sampling.EDM):
    """Picture plus sigma times noise, at the largest sigma too: the host would add sqrt(1 + sigma^2) times there."""

    def noise_scaling(self, sigma: Tensor, noise: Tensor, latent_image: Tensor, max_denoise: bool = False) -> Tensor:
        return super().noise_scaling(sigma, noise, latent_image, max_denoise=False)


LOW_RES, SEMANTIC = "infdit_low_res", "infdit_semantic"  # entries of the CONDITIONING


class InfDiTModel(comfy.model_base.BaseModel):
    """An Inf-DiT as the host's samplers want it. Preconditioning is the network's own, for every parametrisation."""

    def __init__(self, network: InfDiT, weight_dtype: torch.dtype) -> None:
        config = _ModelConfig({"disable_unet_model_creation": True, "dtype": weight_dtype})
        own = network.config
        config.sampling_settings = {
            "sigma_min": own.sigma_min,
            "sigma_max": own.sigma_max,
            "sigma_data": own.sigma_data,
        }
        compute_dtype = network.compute()[1]
        config.manual_cast_dtype = None if compute_dtype == weight_dtype else compute_dtype
        super().__init__(config, comfy.model_base.ModelType.EDM)
        self.model_sampling = _Sampling(config)
        self.diffusion_model = network
        self.weight_dtype = weight_dtype
        self.forget()

    def forget(self) -> None:
        """Before and after a sampling, in which what ran out of memory isn't tried again."""
        self.plan: MemoryPlan | None = None
        self.refined: list[tuple[Tensor, Tensor]] = []  # low resolutions, and the picture that evaluations refine

    def get_dtype(self) -> torch.dtype:
        return self.weight_dtype

    def extra_conds(self, **kwargs: Any) -> dict[str, comfy.conds.CONDRegular]:
        return {
            key: comfy.conds.CONDRegular(kwargs[key].to(kwargs["device"]))
            for key in (LOW_RES, SEMANTIC)
            if kwargs.get(key) is not None
        }

    def _apply_model(self, x: Tensor, t: Tensor, *_: Any, **kwargs: Any) -> Tensor:
        """x: (B, 3, H, W), t: (B,) sigma -> the estimate of the clean picture."""
        network: InfDiT = self.diffusion_model
        low_res, semantic = kwargs.get(LOW_RES), kwargs.get(SEMANTIC)
        if low_res is None:
            raise ValueError(
                "This model needs the picture that it enlarges: connect the conditioning of 'Inf-DiT Conditioning' "
                "to the sampler, as negative too."
            )
        scale = network.config.scale
        wanted = (3, low_res.shape[2] * scale, low_res.shape[3] * scale)
        if tuple(x.shape[1:]) != wanted:
            raise ValueError(
                f"The latent has {x.shape[1]} channels and {x.shape[3]} x {x.shape[2]} values, but this conditioning "
                f"needs 3 channels and {wanted[2]} x {wanted[1]}: connect the latent of its 'Inf-DiT Conditioning'."
            )
        size = (low_res.shape[2], low_res.shape[3])
        if self.plan is None or self.plan.grid != block_grid(size, network.config):
            self.plan = MemoryPlan(network, size, "auto")

        def stop_if_asked(_: object) -> None:
            management.throw_exception_if_processing_interrupted()

        def refined(picture: Tensor) -> Tensor:
            for known, upsampled in self.refined:
                if torch.equal(known, picture):
                    return upsampled
            upsampled = network.upsample(picture, on_tile=stop_if_asked)
            self.refined.append((picture, upsampled))
            return upsampled

        def denoise(i: int) -> Tensor:
            return evaluation.denoise(
                network,
                self.plan,
                x[i : i + 1],
                t[i],
                low_res[i : i + 1],
                refined(low_res[i : i + 1]),
                semantic=None if semantic is None else semantic[i : i + 1],
                on_tile=stop_if_asked,
            )

        return torch.cat([denoise(i) for i in range(len(x))])  # one after another: memory doesn't grow with the batch

    def memory_required(self, input_shape: Iterable[int], cond_shapes: Any = None) -> float:
        """Bytes of one step of the host's samplers; it asks for twice the batch first."""
        batch, _, height, width = input_shape
        scale = self.diffusion_model.config.scale
        size = (max(1, height // scale), max(1, width // scale))
        plan = MemoryPlan(self.diffusion_model, size, "auto", _obtainable(self.diffusion_model))
        # Measured: 17 to 21 fp32 pictures of a batch in all; one more for a second grid, one for what each refines.
        pictures = 12 * 3 * 4 * batch * height * width
        return float(plan.bytes + pictures)


def load_model(path: Path | None, precision: str) -> comfy.model_patcher.ModelPatcher:
    """The network of a file, None the shipped default, under the host's model management.

    precision: auto, bf16, fp16, fp32, or fp8, which keeps the layers' matrices so and computes in more.
    """
    device = management.get_torch_device()
    weight_dtype, compute_dtype = _precisions(precision, device)
    operations = comfy.ops.pick_operations(weight_dtype, compute_dtype)
    small = weight_dtype.itemsize == 1
    network = load_infdit(
        path,
        device=management.unet_offload_device(),
        dtype=compute_dtype if small else weight_dtype,
        operations=operations,
    )
    if small:
        for module in network.layers.modules():  # type: ignore[attr-defined]
            if isinstance(module, nn.Linear):
                module.weight = nn.Parameter(module.weight.to(weight_dtype), requires_grad=False)
    network.compute_device, network.compute_dtype = device, compute_dtype
    patcher = comfy.model_patcher.ModelPatcher(
        InfDiTModel(network, weight_dtype), load_device=device, offload_device=management.unet_offload_device()
    )
    for moment in (comfy.patcher_extension.CallbacksMP.ON_PRE_RUN, comfy.patcher_extension.CallbacksMP.ON_CLEANUP):
        patcher.add_callback(moment, lambda p: p.model.forget())
    return patcher


PRECISIONS = {
    "auto": None,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp8": torch.float8_e4m3fn,
}


def _precisions(name: str, device: torch.device) -> tuple[torch.dtype, torch.dtype]:
    """Types of the weights and of the computation. Published weights are bf16: fp16 only where somebody asks for it."""
    if name not in PRECISIONS:
        raise ValueError(f"Precision is {name!r}: it must be one of {', '.join(PRECISIONS)}.")
    supported = [torch.bfloat16, torch.float32]
    weights = PRECISIONS[name] or management.unet_dtype(device, supported_dtypes=supported)
    if weights.itemsize == 1 and not management.supports_cast(device, weights):
        raise ValueError(f"Precision fp8 needs a device that can convert it, and {device} can't: choose auto.")
    if weights == torch.float16:
        supported = [torch.float16, *supported]
    return weights, management.unet_manual_cast(weights, device, supported) or weights


def network_of(model: Any) -> InfDiT:
    """The Inf-DiT in a MODEL. Raises ValueError for any other."""
    network = getattr(getattr(model, "model", None), "diffusion_model", None)
    if not isinstance(network, InfDiT):
        kind = type(getattr(model, "model", model)).__name__
        raise ValueError(f"The connected model is no Inf-DiT but {kind}: connect the output of 'Load Inf-DiT'.")
    return network


def on_result_device(x: Tensor) -> Tensor:
    """Where the host wants what a node returns."""
    return x.to(management.intermediate_device())


# --- the streaming path


def _obtainable(network: InfDiT) -> int | None:
    """Bytes that could be had for work if the host moved every other model away; None on the CPU: what is free."""
    device = network.compute()[0]
    if device.type == "cpu":
        return None
    weights = comfy.model_management.module_size(network)
    return max(0, int(management.get_total_memory(device)) - management.extra_reserved_memory() - weights)


def upscale(
    model: comfy.model_patcher.ModelPatcher,
    image: Tensor,
    size: tuple[int, int],
    *,
    seed: int,
    sampler: Any = None,
    tile: int = 0,
    **settings: Any,
) -> Tensor:
    """The library's upscale under the host's care. sampler: a SAMPLER or None; tile: blocks, 0 for auto."""
    network = network_of(model)
    blocks: TileSize = tile or "auto"
    start, end = (image.shape[1], image.shape[2]), (size[0], size[1])
    needed = working_memory(network, start, end, blocks, _obtainable(network))
    least = working_memory(network, start, end, 1)
    log.info(
        "Inf-DiT: %d x %d -> %d x %d on %s, about %.0f MiB beside the weights",
        *(*start[::-1], *end[::-1], network.compute()[0], needed / 2**20),
    )
    management.load_models_gpu([model], memory_required=needed, minimum_memory_required=min(least, needed))
    if sampler is not None:
        settings["sampler"] = _driven(sampler, model, seed)
    try:
        result = upscale_pictures(
            image.cpu(), model=network, size=size, seed=seed, tile=blocks, on_progress=_Progress(), **settings
        )
    finally:
        management.soft_empty_cache()
    return on_result_device(result)


class _Progress:
    """Moves the node's progress bar, shows the picture as it is now, and stops when told to."""

    STEPS, SIDE, SECONDS = 1000, 512, 0.5

    def __init__(self) -> None:
        self.bar = comfy.utils.ProgressBar(self.STEPS)
        self.shown = -math.inf

    def __call__(self, progress: UpscaleProgress) -> None:
        management.throw_exception_if_processing_interrupted()
        now, preview = time.monotonic(), None
        if now - self.shown >= self.SECONDS:
            self.shown = now
            preview = ("JPEG", self._picture(progress.estimate), self.SIDE)
        self.bar.update_absolute(round(progress.fraction * self.STEPS), self.STEPS, preview)

    def _picture(self, estimate: Tensor) -> Image.Image:
        """Every n-th pixel: averaging a picture of any size would take longer than a tile."""
        step = max(1, math.ceil(max(estimate.shape[2:]) / self.SIDE))
        pixels = estimate[0, :, ::step, ::step].float().cpu()
        return Image.fromarray(pixels.add(1).mul(127.5).clamp(0, 255).byte().permute(1, 2, 0).contiguous().numpy())


# --- CLIP

DOWNLOAD = f"{semantics.ARCHITECTURE} {semantics.PRETRAINED} (download, 1.7 GB)"
NO_CLIP = "choose a file"
_VISION = "clip_vision"  # the host's folder, where some keep open_clip's files


def clip_names() -> list[str]:
    """What 'Load CLIP' offers: at first nothing, then the files of two folders, and the download."""
    return [
        NO_CLIP,
        *folder_paths.get_filename_list(FOLDER),
        *(f"{_VISION}/{name}" for name in folder_paths.get_filename_list(_VISION)),
        DOWNLOAD,
    ]


def clip_path(name: str) -> Path | None:
    """The file of a name, None for the download. Raises WeightsError that says where to put it."""
    if name == DOWNLOAD:
        return None
    folder = _VISION if name.startswith(f"{_VISION}/") else FOLDER
    found = folder_paths.get_full_path(folder, name.removeprefix(f"{_VISION}/"))
    if found is None:
        folders = " or ".join(folder_paths.get_folder_paths(folder))
        missing = "No CLIP is chosen" if name == NO_CLIP else f"There is no CLIP file {name!r}"
        raise WeightsError(f"{missing}: put one into {folders} and choose it, or choose {DOWNLOAD!r}.")
    return Path(found)


class HostClip(NamedTuple):
    """A CLIP under the host's model management."""

    clip: semantics.Clip
    patcher: comfy.model_patcher.ModelPatcher

    def get_ram_usage(self) -> int:
        """Asked by the host's cache, where it must give memory back (`--cache-ram`)."""
        return int(self.patcher.get_ram_usage())


def load_clip(path: Path | None) -> HostClip:
    """path: None downloads the CLIP of the published Inf-DiT, once."""
    clip = semantics.load_clip(path or semantics.download_clip(), management.text_encoder_offload_device())
    places = {
        "load_device": management.text_encoder_device(),
        "offload_device": management.text_encoder_offload_device(),
    }
    return HostClip(clip, comfy.model_patcher.ModelPatcher(clip.model, **places))


@contextmanager
def _in_use(patcher: comfy.model_patcher.ModelPatcher) -> Iterator[None]:
    """The model is where it computes, whole, and away from there afterwards: the upscaler needs the room."""
    management.load_models_gpu([patcher], force_full_load=True)  # open_clip's modules can't be moved in parts
    try:
        yield
    finally:
        for loaded in [m for m in management.current_loaded_models if m.model is patcher]:
            loaded.model_unload()
            management.current_loaded_models.remove(loaded)


def _clip_of(clip: Any) -> HostClip:
    if not isinstance(clip, HostClip):
        raise ValueError(
            f"The connected clip is {type(clip).__name__}: connect the output of 'Load CLIP (Inf-DiT)', for those of "
            "checkpoints are other ones."
        )
    return clip


def encode_image(clip: Any, x: Tensor, view: semantics.View) -> Tensor:
    """Unit vectors (B, size) of pictures (B, 3, H, W) in [-1, 1]."""
    clip = _clip_of(clip)
    with _in_use(clip.patcher):
        return on_result_device(clip.clip.encode_image(x, view, _part_done))


def vision_vectors(clip_vision: Any, x: Tensor, view: semantics.View) -> Tensor:
    """The same with a CLIP_VISION of the host's, where its activation is that of open_clip's datacomp weights."""
    layers = getattr(getattr(getattr(clip_vision.model, "vision_model", None), "encoder", None), "layers", None)
    activation = None if layers is None else layers[0].mlp.activation
    one = torch.ones(1)
    if activation is None or not torch.equal(activation(one), torch.nn.functional.gelu(one)):
        raise ValueError(
            "This CLIP_VISION computes with another activation than the CLIP that Inf-DiT was trained with (GELU), so "
            "its vectors would mean something else: use 'Load CLIP (Inf-DiT)' with open_clip's file."
        )
    management.load_model_gpu(clip_vision.patcher)
    statistics = (clip_vision.image_mean, clip_vision.image_std)
    seen = semantics.preprocess(x, clip_vision.image_size, view, *statistics).to(clip_vision.load_device)

    def encode(part: Tensor) -> Tensor:
        vectors: Tensor = clip_vision.model(pixel_values=part, intermediate_output=-2)[2]
        return vectors.float()

    return on_result_device(semantics.mean_of_views(semantics.in_parts(encode, seen, _part_done), len(x)))


def _part_done(done: int, total: int) -> None:
    """Moves the node's progress bar, and stops when told to."""
    management.throw_exception_if_processing_interrupted()
    comfy.utils.ProgressBar(total).update_absolute(done, total)


def steer(clip: Any, vectors: Tensor, positive: str, negative: str, strength: float) -> tuple[Tensor, str]:
    """The vectors steered by text, and a report: how similar they are to both texts before and after."""
    clip = _clip_of(clip)
    with _in_use(clip.patcher):
        steering = semantics.Steering(clip.clip, positive, negative, strength)
    steered = steering(vectors)
    lines = [
        f"{name}: {(vectors @ text.to(vectors).T).mean():.3f} -> {(steered @ text.to(vectors).T).mean():.3f}"
        for name, text in (("positive", steering.positive), ("negative", steering.negative))
        if text is not None
    ]
    return on_result_device(steered), "\n".join(["similarity to", *lines]) if lines else "nothing to steer by"


def show_text(text: str, node_id: Any) -> None:
    """On the node itself, where one is running in a graph."""
    if node_id is not None:
        from server import PromptServer  # starts much of the host where it doesn't run yet

        PromptServer.instance.send_progress_text(text, node_id)


# --- samplers


def _driven(sampler: Any, model: comfy.model_patcher.ModelPatcher, seed: int) -> Sampler:
    """A SAMPLER of the host as a function with the signature of the library's."""

    def run(denoise: samplers.Denoise, x: Tensor, sigmas: Tensor, *, noise: samplers.Noise) -> Tensor:
        # A sampler may seed its own noise with this, as the start's was: v0.3.64 then draws the very same.
        options = {"model_options": {}, "seed": seed if isinstance(sampler, _Heun) else (seed + 1) % (2**64 - 1)}
        # x has its noise already: it goes in as the picture that no noise is added to.
        return sampler.sample(
            _Guider(model, denoise), sigmas.to(x.device), options, None, torch.zeros_like(x), x, None, True
        )

    return run


class _Guider:
    """What the host's samplers take for its guider: a denoiser that also knows the model's sigmas."""

    def __init__(self, model: comfy.model_patcher.ModelPatcher, denoise: samplers.Denoise) -> None:
        self.model_patcher, self.inner_model = model, model.model
        self.denoise = denoise

    def __call__(self, x: Tensor, sigma: Tensor, model_options: dict[str, Any], seed: int | None = None) -> Tensor:
        denoised = self.denoise(x, sigma)
        for function in model_options.get("sampler_post_cfg_function", []):  # CFG++ samplers look at both halves
            both = {"cond_denoised": denoised, "uncond_denoised": denoised}
            own = {"model": self.inner_model, "model_options": model_options, "cond_scale": 1.0}
            denoised = function({"denoised": denoised, "sigma": sigma, "input": x, **both, **own})
        return denoised


class _Heun(comfy.samplers.KSAMPLER):
    """Takes another stream than the initial noise by itself."""


def heun_sampler(**churn: float) -> comfy.samplers.KSAMPLER:
    """The library's EDM Heun as a SAMPLER. churn: s_churn, s_tmin, s_tmax, s_noise."""

    def sample(
        model: Callable[..., Tensor],
        x: Tensor,
        sigmas: Tensor,
        extra_args: dict[str, Any] | None = None,
        callback: samplers.StepCallback | None = None,
        disable: bool | None = None,
    ) -> Tensor:
        options = extra_args or {}

        def denoise(noisy: Tensor, sigma: Tensor) -> Tensor:
            return model(noisy, sigma * noisy.new_ones(len(noisy)), **options)

        # Another stream than the initial noise, which the host drew from the seed itself.
        noise = noise_of(((options.get("seed") or 0) + 1) % 2**64)
        return samplers.heun(denoise, x, sigmas, noise=noise, callback=callback, **churn)

    return _Heun(sample)
