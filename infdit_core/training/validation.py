"""How well the weights do: on crops of held pictures while training, on whole test pictures at its end."""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..images import resize
from ..infdit.checkpoint import load_infdit
from ..infdit.model import InfDiT
from ..metrics import Lpips, psnr_y, ssim_y
from ..semantics import Clip
from ..upscale import upscale
from .config import DataConfig, TrainConfig
from .data import Batch, Crops, PictureFile, looked_at, read_pixels, reduce
from .losses import detail_loss, detail_shares, loss_at, prediction_loss, with_prediction


class Held(NamedTuple):
    """A validation crop, with one low resolution for every kind that the training sees."""

    original: Tensor  # (1, 3, S, S) in 0..1
    batches: dict[str, Batch]  # by kind: "clean", "degraded", "mild"


def held_crops(
    pictures: Sequence[PictureFile],
    side: int,
    scale: int,
    config: DataConfig,
    device: torch.device,
    clip: Clip | None = None,
) -> list[Held]:
    """The most detailed of eight crops of every picture, the same at each call."""
    upright = dataclasses.replace(config, direct=1.0, mirror=0.0, turn=False, candidates=8)
    shares = {
        "clean": 1 - config.degraded,
        "degraded": config.degraded * (1 - config.mild),
        "mild": config.degraded * config.mild,
    }
    flag = {value: torch.tensor([value], device=device) for value in (False, True)}
    held = []
    for number, picture in enumerate(pictures):
        crop = torch.from_numpy(Crops([picture], side, upright, seed=0)[0].pixels).permute(2, 0, 1)[None].to(device)
        generator = torch.Generator(device).manual_seed(number)
        batches = {
            kind: reduce(crop, scale, 0, flag[kind != "clean"], flag[kind == "mild"], config.softness, generator)
            for kind, share in shares.items()
            if share > 0
        }
        batches = {kind: looked_at(batch, scale, clip) for kind, batch in batches.items()}
        held.append(Held(crop.float() / 255, batches))
    return held


@torch.no_grad()
def validate(
    network: InfDiT,
    config: TrainConfig,
    held: Sequence[Held],
    lpips: Sequence[Lpips],
) -> Iterator[tuple[dict[str, float], list[Tensor]]]:
    """Of every held crop in turn: its figures, and pictures (LR, bicubic, one a preset, original) in 0..1.

    Loss: as trained, at three noise levels, one deviation apart, and without noise where that is trained, with every
    share of the detailer that is; PSNR-Y in dB and LPIPS of each preset, beside bicubic. While the predictor or the
    detailer is trained: its loss and its picture in their place.
    """
    loss = config.loss
    levels = [math.exp(loss.sigma_log_mean + loss.sigma_log_deviation * z) for z in (-1, 0, 1)]
    levels = [min(level, network.config.sigma_max) for level in levels]
    for original, batches in held:
        figures: dict[str, float] = {}
        pictures: list[Tensor] = []
        for kind, given in batches.items():
            results = {"bicubic": given.upsampled / 2 + 0.5}
            batch = given if config.stage == "detailer" else with_prediction(given, network)
            if config.stage == "predictor":
                figures[f"{kind}_loss_mean"] = float(prediction_loss(network.predict, network.config.scale, batch))
                results["predicted"] = batch.upsampled / 2 + 0.5
            elif config.stage == "detailer":
                detailed = detail_loss(network.predict, network.config.scale, loss, batch, lpips)
                figures[f"{kind}_loss_mean"] = float(detailed)
                margin = batch.margin(network.config.scale)
                results["predicted"] = network.upsample(batch.low_res, margin, detail=1.0) / 2 + 0.5
            else:
                noise = torch.randn(original.shape, generator=torch.Generator().manual_seed(5)).to(original.device)
                cases = [
                    (f"{kind}_loss_{level:.3g}", batch, level, batch.original + level * noise, False, 0.0)
                    for level in levels
                ]
                if loss.own_input:
                    cases += [
                        (f"{kind}_own_loss_{level:.3g}", batch, level, batch.upsampled + level * noise, True, 0.0)
                        for level in levels
                        if level < loss.perceptual_below
                    ]
                for share in detail_shares(network.config, loss) if loss.regression else ():
                    first = with_prediction(given, network, share)
                    name = f"{kind}_loss_mean" + (f"_{share:g}" if share else "")
                    cases.append((name, first, network.config.sigma_max, first.upsampled, False, share))
                ask = functools.partial(loss_at, network.denoise, network.config, loss)
                for name, asked, level, noisy, is_own, share in cases:
                    sigma, own = (torch.tensor([x], device=original.device) for x in (level, is_own))
                    figures[name] = float(ask(asked, sigma, noisy, own, lpips, detail=share))
                low_res = batch.low_res.permute(0, 2, 3, 1) / 2 + 0.5
                for preset in config.presets:
                    large = upscale(
                        low_res, model=network, scale=network.config.scale, preset=preset, semantic=batch.semantic
                    )
                    results[preset] = large.permute(0, 3, 1, 2)
            for name, result in results.items():
                figures[f"{kind}_{name}_psnr_y"] = psnr_y(result, original)
                if lpips:
                    figures[f"{kind}_{name}_lpips"] = float(lpips[0](result, original))
            nearest = torch.nn.functional.interpolate(batch.low_res / 2 + 0.5, size=original.shape[2:])
            pictures += [nearest, *results.values(), original]
        yield figures, pictures


def contact_sheet(rows: Sequence[Sequence[Tensor]]) -> Image.Image:
    """One row of pictures (1, 3, S, S) in 0..1 for every crop."""
    sheet = torch.cat([torch.cat([t.cpu() for t in row], dim=3) for row in rows], dim=2)
    return Image.fromarray((sheet[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())


@torch.no_grad()
def test(
    weights: Path,
    pictures: Sequence[PictureFile],
    presets: Sequence[str],
    lpips: Sequence[Lpips],
    device: torch.device,
    clip: Clip | None = None,
) -> Iterator[tuple[str, dict[str, float]]]:
    """Reduce every picture to a quarter (or the network's scale) by Pillow's bicubic and enlarge it, whole.

    Yields its name, and PSNR-Y, SSIM and LPIPS of bicubic, of what a predictor gives, and of each preset.
    """
    model = load_infdit(weights, device)
    scale = model.config.scale
    for picture in pictures:
        pixels = read_pixels(picture)
        height, width = (side - side % scale for side in pixels.shape[:2])
        image = Image.fromarray(pixels[:height, :width])
        small = image.resize((width // scale, height // scale), Image.Resampling.BICUBIC)
        low_res = torch.from_numpy(np.asarray(small, dtype=np.float32) / 255)[None].to(device)
        planes = low_res.permute(0, 3, 1, 2)
        results = {"bicubic": resize(planes, (height, width)).clamp(0, 1)}
        if model.predictor is not None:
            results["predicted"] = model.upsample(planes * 2 - 1) / 2 + 0.5
        semantic = None if clip is None else clip.encode_image(planes * 2 - 1)
        for preset in presets:
            large = upscale(low_res, model=model, scale=scale, preset=preset, semantic=semantic)
            results[preset] = large.permute(0, 3, 1, 2)
        original = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).permute(2, 0, 1)[None]
        figures = {}
        for name, result in results.items():
            eight_bit = (result.cpu() * 255).round() / 255
            figures[f"{name}_psnr_y"] = psnr_y(eight_bit, original)
            figures[f"{name}_ssim_y"] = ssim_y(eight_bit, original)
            if lpips:
                figures[f"{name}_lpips"] = float(lpips[0](eight_bit.to(device), original.to(device)))
        yield picture.name, figures
