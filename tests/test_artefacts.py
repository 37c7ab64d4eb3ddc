"""What the shipped weights do to made pictures: flat areas, gradients, text, line art, screenshots, checkers.

Levels are those of 8 bits, 0..255. The bounds are what was measured when they were set and about a half more.
"""

from collections.abc import Callable
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from infdit_core import upscale
from infdit_core.images import resize
from infdit_core.metrics import psnr_y

BLOCK, PATCH = 32, 4  # pixels of the shipped network; a second grid of blocks begins half of both earlier
SMALL, LARGE = 96, 128

Draw = ImageDraw.ImageDraw
Colour = tuple[int, int, int]
WHITE, BLACK = (255, 255, 255), (0, 0, 0)


# --- the pictures: originals that are reduced to a quarter


def drawn(side: int, background: Colour, draw: Callable[[Draw], None], finer: int = 1) -> Image.Image:
    """What `draw` draws, `finer` times as large and then averaged: smooth edges."""
    image = Image.new("RGB", (side * finer, side * finer), background)
    draw(ImageDraw.Draw(image))
    return image.reduce(finer)


def ramps(*channels: tuple[float, float, float]) -> Image.Image:
    """Each channel from one level at the top left, by so much to the bottom and by so much to the right."""
    y, x = np.mgrid[:SMALL, :SMALL] / (SMALL - 1)
    levels = np.stack([level + down * y + right * x for level, down, right in channels], axis=-1)
    return Image.fromarray(levels.round().astype(np.uint8))


def frame() -> Image.Image:
    """Black around soft waves with grain."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[:56, :56] / 56
    patch = np.full((56, 56, 3), 128.0)
    for rows, columns, phase in random.normal(size=(8, 3)) * 9:
        patch += 20 * np.sin(rows * y + columns * x + phase)[..., None] * random.uniform(-1, 1, 3)
    patch += random.normal(size=patch.shape) * 5
    levels = np.pad(patch.clip(0, 255), ((20, 20), (20, 20), (0, 0)))
    return Image.fromarray(levels.astype(np.uint8))


def saturated(draw: Draw) -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 255, 255), (255, 0, 255), (255, 255, 0)]
    for i, colour in enumerate(colours):
        left, top = 38 * (i % 3), 42 * (i // 3)
        draw.rectangle((left, top, left + 38, 95 if top else 41), colour)


def text(draw: Draw) -> None:
    draw.text((3, 2), "Inf-DiT", (30, 30, 30), ImageFont.load_default(26))
    draw.text((3, 34), "reads as it is", (30, 30, 30), ImageFont.load_default(14))
    draw.rectangle((0, 56, 95, 95), (50, 80, 140))
    draw.text((5, 58), "8 + 1 = 9", (240, 240, 240), ImageFont.load_default(20))


def line_art(draw: Draw) -> None:
    ink = (40, 40, 40)
    draw.ellipse((40, 40, 230, 230), outline=ink, width=12)
    draw.arc((150, 120, 370, 350), 200, 420, ink, 16)
    draw.polygon([(210, 40), (350, 30), (300, 150)], outline=ink, width=8)
    draw.line([(20, 270), (120, 330), (180, 280), (260, 365)], ink, 20, joint="curve")


def diagonals(draw: Draw) -> None:
    for i, (end, width) in enumerate([(110, 6), (190, 8), (280, 10), (370, 14)]):
        draw.line((20, 20 + 30 * i, end + 10, 370), (235, 235, 235), width)
        draw.line((20 + 90 * i, 14, 370, end - 40), (235, 235, 235), width)


def screenshot(draw: Draw) -> None:
    small, large = ImageFont.load_default(11), ImageFont.load_default(14)
    draw.rectangle((6, 6, 121, 121), (240, 240, 240), (90, 90, 90))
    draw.rectangle((7, 7, 120, 25), (40, 90, 170))
    draw.text((11, 8), "Settings", WHITE, large)
    draw.line((108, 12, 115, 19), WHITE, 2)
    draw.line((115, 12, 108, 19), WHITE, 2)
    draw.rectangle((13, 33, 114, 84), WHITE, (150, 150, 150))
    for i, line in enumerate(["Scale: 4", "Preset: balanced", "Seed: 0"]):
        draw.text((17, 35 + 16 * i), line, BLACK, small)
    for left, label, colour in [(20, "OK", (205, 225, 250)), (68, "Cancel", (220, 220, 220))]:
        draw.rounded_rectangle((left, 94, left + 40, 112), 4, colour, (110, 110, 110))
        draw.text((left + 20, 103), label, BLACK, small, anchor="mm")


def checkers() -> Image.Image:
    """Squares of 4 px, each one pixel of the low resolution."""
    y, x = np.mgrid[:SMALL, :SMALL] // 4
    levels = np.where((x + y) % 2 == 0, 60, 200).astype(np.uint8)
    return Image.fromarray(levels).convert("RGB")


def grass(draw: Draw) -> None:
    """Blades about as wide as a pixel of the low resolution and less."""
    random = np.random.default_rng(0)
    for _ in range(1800):
        x, y, lean, height = random.uniform((-40, 0, -60, 60), (552, 600, 60, 200))
        light = random.uniform(0.3, 1.3)
        colour = tuple(int(light * c) for c in random.normal((100, 135, 50), 12).clip(0, 190))
        tip = (x + lean, y - height)
        draw.line([(x, y), (x + lean / 4, y - height / 2), tip], colour, int(random.integers(4, 14)), joint="curve")


ORIGINALS: dict[str, Callable[[], Image.Image]] = {
    "flat": lambda: Image.new("RGB", (SMALL, SMALL), (118, 171, 226)),
    "sky": lambda: ramps((105, 30, 0), (160, 25, 0), (225, 15, 0)),
    "gradient": lambda: ramps((20, 110, 110), (200, -90, -60), (90, 60, -60)),
    "frame": frame,
    "saturated": lambda: drawn(SMALL, WHITE, saturated),
    "text": lambda: drawn(SMALL, (225, 225, 225), text),
    "line art": lambda: drawn(SMALL, (220, 220, 220), line_art, finer=4),
    "diagonals": lambda: drawn(SMALL, (50, 50, 50), diagonals, finer=4),
    "screenshot": lambda: drawn(LARGE, (70, 130, 130), screenshot),
    "grass": lambda: drawn(LARGE, (60, 80, 30), grass, finer=4),
    "checkers": checkers,
}
SMOOTH = ("flat", "sky", "gradient")
EDGES = ("text", "line art", "diagonals", "screenshot")
PRESETS = ("faithful", "balanced")


# --- what comes out, and figures of it


class Planes(NamedTuple):
    """(1, 3, H, W) in levels each."""

    original: Tensor
    bicubic: Tensor
    result: Tensor


@lru_cache
def upscaled(name: str, preset: str) -> Planes:
    image = ORIGINALS[name]()
    filter_ = Image.Resampling.NEAREST if name == "checkers" else Image.Resampling.BICUBIC
    small = image.resize((image.width // 4, image.height // 4), filter_)
    original, low_res = (torch.from_numpy(np.asarray(i, dtype=np.float32) / 255)[None] for i in (image, small))
    result = upscale(low_res, scale=4, preset=preset)
    original, low_res, result = (t.permute(0, 3, 1, 2) for t in (original, low_res, result))
    bicubic = resize(low_res, (image.height, image.width)).clamp(0, 1)
    return Planes(original * 255, bicubic * 255, result * 255)


def greatest(x: Tensor) -> float:
    return float(x.abs().max())


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def tint(x: Tensor) -> float:
    """The greatest mean of a channel over 8 x 8 pixels: what grain averages out to."""
    return greatest(F.avg_pool2d(x, 8))


def local_range(x: Tensor, radius: int) -> tuple[Tensor, Tensor]:
    """(lowest, highest) of each channel within so many pixels."""
    window = 2 * radius + 1
    return -F.max_pool2d(-x, window, 1, radius), F.max_pool2d(x, window, 1, radius)


def overshoot(x: Tensor, original: Tensor) -> Tensor:
    """How far outside of what the original holds within two pixels of the low resolution."""
    low, high = local_range(original, 8)
    return (x - high).relu() + (low - x).relu()


def far_from_edges(x: Tensor) -> Tensor:
    """Where within three pixels of the low resolution nothing steps by more than 10 levels."""
    low, high = local_range(x, 1)
    edges = ((high - low) > 10).any(1, keepdim=True).float()
    return (F.max_pool2d(edges, 25, 1, 12) == 0).expand_as(x)


def border_steps(deviation: Tensor) -> list[Tensor]:
    """(1, 3, along, borders) for either direction: steps across the borders of both grids."""
    steps = [t.diff(dim=3) for t in (deviation, deviation.transpose(2, 3))]
    firsts = (BLOCK - 1, (BLOCK - PATCH) // 2 - 1)
    return [torch.cat([t[..., first::BLOCK] for first in firsts], dim=3) for t in steps]


def screen(x: Tensor) -> float:
    """Energy at the frequencies of what all patches repeat, over that of frequencies around: 1 where they don't."""
    grey = x.mean((0, 1))
    energy = torch.fft.fft2(grey - grey.mean()).abs().square().roll((3, 3), (0, 1))
    height, width = (side // PATCH for side in grey.shape)
    around = [
        energy[y * height : y * height + 7, x * width : x * width + 7] for y in range(PATCH) for x in range(PATCH)
    ]
    ratios = [float(e[3, 3] / ((e.sum() - e[3, 3]) / 48)) for e in around[1:]]
    return sum(ratios) / len(ratios)


# --- the tests


@pytest.mark.parametrize(("name", "preset"), list(product(ORIGINALS, PRESETS)))
def test_no_colour_shift(name: str, preset: str) -> None:
    _, bicubic, result = upscaled(name, preset)
    assert greatest((result - bicubic).mean((0, 2, 3))) < 0.45


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", ["line art", "diagonals"])
def test_grey_stays_grey(name: str, preset: str) -> None:
    result = upscaled(name, preset).result
    assert tint(result - result.mean(1, keepdim=True)) < 1


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", ["line art", "diagonals"])
def test_edges_get_no_colour(name: str, preset: str) -> None:
    result = upscaled(name, preset).result
    assert rms(result - result.mean(1, keepdim=True)) < 0.85  # `keep_to` lets 0.94 through


@pytest.mark.parametrize(("preset", "grain"), [("faithful", 1.1), ("balanced", 1.8), ("detailed", 1.8)])
@pytest.mark.parametrize("name", SMOOTH)
def test_smooth_stays_smooth(name: str, preset: str, grain: float) -> None:
    _, bicubic, result = upscaled(name, preset)
    assert rms(result - bicubic) < grain


@pytest.mark.parametrize(("preset", "stain"), [("faithful", 2.2), ("balanced", 3.2), ("detailed", 3.2)])
@pytest.mark.parametrize("name", SMOOTH)
def test_smooth_gets_no_stains(name: str, preset: str, stain: float) -> None:
    _, bicubic, result = upscaled(name, preset)
    assert tint(result - bicubic) < stain


@pytest.mark.parametrize(("preset", "grain"), [("faithful", 0.5), ("balanced", 1.2)])
@pytest.mark.parametrize("name", ["frame", "saturated"])
def test_flat_areas_beside_edges_stay_flat(name: str, preset: str, grain: float) -> None:
    original, _, result = upscaled(name, preset)
    assert rms((result - original)[far_from_edges(original)]) < grain


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(("name", "speck"), [("gradient", 6.5), ("frame", 4), ("saturated", 5)])
def test_no_specks(name: str, speck: float, preset: str) -> None:
    """`keep_to` alone lets 7.6, 6.7 and 8.6 through; on flat areas and skies it sees to it."""
    original, bicubic, result = upscaled(name, preset)
    assert greatest((result - bicubic)[far_from_edges(original)]) < speck


@pytest.mark.parametrize(("preset", "step"), [("faithful", 1), ("balanced", 1.7)])
@pytest.mark.parametrize("name", SMOOTH)
def test_no_seams_where_it_is_smooth(name: str, preset: str, step: float) -> None:
    """No stretch of a border as long as a block steps by more, in the mean along it."""
    _, bicubic, result = upscaled(name, preset)
    for steps in border_steps(result - bicubic):
        assert greatest(steps.unflatten(2, (-1, BLOCK)).mean(3)) < step


@pytest.mark.parametrize(("preset", "step"), [("faithful", 0.8), ("balanced", 1.4)])
@pytest.mark.parametrize("name", ["line art", "diagonals"])
def test_no_seams_through_drawings(name: str, preset: str, step: float) -> None:
    """The median along a border leaves out what crosses it."""
    _, bicubic, result = upscaled(name, preset)
    medians = [steps.median(2).values.flatten() for steps in border_steps(result - bicubic)]
    assert rms(torch.cat(medians)) < step


@pytest.mark.parametrize(("preset", "factor"), [("faithful", 1), ("balanced", 1.15)])
@pytest.mark.parametrize("name", EDGES)
def test_edges_ring_no_more_than_bicubic(name: str, preset: str, factor: float) -> None:
    original, bicubic, result = upscaled(name, preset)
    assert rms(overshoot(result, original)) < factor * rms(overshoot(bicubic, original))


@pytest.mark.parametrize(("preset", "more"), [("faithful", 14), ("balanced", 17)])
@pytest.mark.parametrize("name", [*EDGES, "frame"])
def test_hardly_a_pixel_overshoots_far(name: str, preset: str, more: float) -> None:
    """All but one of a thousand values; bicubic's are cut off at black and white in the last one."""
    original, bicubic, result = upscaled(name, preset)
    far, bicubics = (float(overshoot(x, original).flatten().quantile(0.999)) for x in (result, bicubic))
    assert far < bicubics + more


@pytest.mark.parametrize(("preset", "gain"), [("faithful", 15), ("balanced", 12)])
def test_saturated_colours_overshoot_little_and_are_much_nearer(preset: str, gain: float) -> None:
    """Bicubic's overshoots are cut off at black and white there."""
    original, bicubic, result = upscaled("saturated", preset)
    assert overshoot(result, original).flatten().quantile(0.999) < 11
    assert psnr_y(result / 255, original / 255) - psnr_y(bicubic / 255, original / 255) > gain


@pytest.mark.parametrize(("preset", "gain"), [("faithful", 0.3), ("balanced", 0.2)])
@pytest.mark.parametrize("name", [*EDGES, "frame"])
def test_edges_are_nearer_to_the_original(name: str, preset: str, gain: float) -> None:
    original, bicubic, result = (x / 255 for x in upscaled(name, preset))
    assert psnr_y(result, original) - psnr_y(bicubic, original) > gain


@pytest.mark.parametrize("preset", PRESETS)
def test_checkers_stay(preset: str) -> None:
    original, bicubic, result = upscaled("checkers", preset)
    squares = original - original.mean()
    assert (result * squares).mean() > 0.7 * (bicubic * squares).mean()


@pytest.mark.parametrize("preset", [*PRESETS, "detailed"])
def test_checkers_get_no_stripes(preset: str) -> None:
    """Diagonal stripes have the same low resolution; checkers are waves along both diagonals, equally strong."""
    result = upscaled("checkers", preset).result.mean((0, 1))
    waves = torch.fft.fft2(result - result.mean()).abs()
    falling, rising = waves[SMALL // 8, SMALL // 8], waves[SMALL // 8, -SMALL // 8]
    assert 0.75 < falling / rising < 1.33


@pytest.mark.parametrize("preset", PRESETS)
def test_checkers_get_no_tint(preset: str) -> None:
    _, bicubic, result = upscaled("checkers", preset)
    assert tint(result - bicubic) < 4


@pytest.mark.parametrize(("preset", "bound"), [("faithful", 2), ("balanced", 3), ("detailed", 3)])
def test_grass_gets_no_screen(preset: str, bound: float) -> None:
    original, _, result = upscaled("grass", preset)
    assert screen(original) < 1.5
    assert screen(result) < bound
