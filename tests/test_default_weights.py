"""The shipped weights do what they are shipped for."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from infdit_core import load_infdit, upscale
from infdit_core.evaluation import grids
from infdit_core.images import resize
from infdit_core.infdit.checkpoint import DEFAULT_FILE
from infdit_core.metrics import luma, psnr_y, seam_energy

EXAMPLE = Path(__file__).parents[1] / "docs" / "osprey.png"


def planes(pixels: Tensor) -> Tensor:
    return pixels.permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def pictures() -> dict[str, Tensor]:
    """The example taken for an original, reduced to a quarter and enlarged again: (1, H, W, 3) each."""
    image = Image.open(EXAMPLE).convert("RGB")
    small = image.resize((image.width // 4, image.height // 4), Image.Resampling.BICUBIC)
    original, low_res = (torch.from_numpy(np.asarray(i, dtype=np.float32) / 255)[None] for i in (image, small))
    bicubic = resize(planes(low_res), (180, 320)).clamp(0, 1).permute(0, 2, 3, 1)
    results = {preset: upscale(low_res, scale=4, preset=preset) for preset in ("faithful", "balanced", "detailed")}
    return {"original": original, "bicubic": bicubic} | results


def test_they_are_small_and_say_what_they_are() -> None:
    assert DEFAULT_FILE.stat().st_size <= 16_000_000
    config = load_infdit().config
    assert config.parametrisation == "residual" and list(config.presets) == ["faithful", "balanced", "detailed"]
    # Nothing is drawn: the node for everyone has no seed.
    assert all(preset.start is None and preset.steps <= 1 for preset in config.presets.values())


def test_faithful_is_nearer_to_the_original_than_bicubic(pictures: dict[str, Tensor]) -> None:
    original = planes(pictures["original"])
    gain = psnr_y(planes(pictures["faithful"]), original) - psnr_y(planes(pictures["bicubic"]), original)
    assert gain > 0.6


def test_the_dial_adds_detail(pictures: dict[str, Tensor]) -> None:
    energy = {
        name: float(luma(planes(picture)).diff(dim=3).square().mean().sqrt()) for name, picture in pictures.items()
    }
    assert energy["bicubic"] < energy["faithful"] < energy["balanced"] <= energy["detailed"] < 1.1 * energy["original"]


@pytest.mark.parametrize("preset", ["faithful", "balanced", "detailed"])
def test_no_colour_shift(pictures: dict[str, Tensor], preset: str) -> None:
    result, bicubic = planes(pictures[preset]), planes(pictures["bicubic"])
    assert (result.mean((0, 2, 3)) - bicubic.mean((0, 2, 3))).abs().max() < 1 / 255


@pytest.mark.parametrize("preset", ["faithful", "balanced", "detailed"])
def test_block_borders_stay_faint(pictures: dict[str, Tensor], preset: str) -> None:
    """Weights that look one way only can leave a trace there, at the borders of either grid."""
    original, result = (
        seam_energy(planes(pictures[name]), 32, grids(load_infdit().config)) for name in ("original", preset)
    )
    assert result < 1.1 * original
