"""Degradation: every part against its formula or Pillow, and what the whole draws against the published shares."""

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from infdit_core.degradation import degrade, degrade_mildly, synthesis
from infdit_core.degradation.synthesis import (
    add_noise,
    blur,
    gaussian,
    jpeg,
    normalised,
    plateau,
    quantisation_steps,
    random_kernels,
    sinc,
    squared_distance,
)

OSPREY = Path(__file__).parents[1] / "docs" / "osprey.png"

CloseTo = Callable[..., None]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None] / 255


def share(condition: Tensor | list[bool]) -> float:
    return torch.as_tensor(condition).float().mean().item()


@pytest.fixture(scope="module")
def photograph() -> Tensor:
    """(1, 3, 180, 320); 180 is no multiple of 16."""
    return tensor(Image.open(OSPREY))


# --- JPEG


def stored(x: Tensor, quality: int) -> Image.Image:
    file = io.BytesIO()
    pixels = (x[0] * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality, subsampling=2)
    return Image.open(file)


def psnr(x: Tensor, y: Tensor) -> float:
    return float(-10 * torch.log10((x - y).square().mean()))


@pytest.mark.parametrize(
    ("quality", "least"), [(10, 43.5), (30, 43.5), (60, 44.5), (75, 45.0), (90, 45.5), (95, 45.5), (100, 49.5)]
)
def test_jpeg_is_pillows(photograph: Tensor, quality: int, least: float) -> None:
    """Measured 44.3, 44.5, 45.6, 46.0, 46.7, 46.8 and 50.8 dB; without fancy upsampling 3 to 9 dB less.

    The loss itself is of 25 to 40 dB. What differs are coefficients that libjpeg's integer DCT rounds the other way.
    """
    found = jpeg(photograph, vector(quality))
    expected = tensor(stored(photograph, quality))
    assert psnr(found, expected) > least
    assert psnr(found, photograph) == pytest.approx(psnr(expected, photograph), abs=0.25)


def test_quantisation_steps_are_libjpegs(photograph: Tensor) -> None:
    """A wrong digit in a table would hide in the noise of the pictures."""
    for quality in (1, 9, 30, 49, 50, 51, 75, 96, 100):
        tables = stored(photograph, quality).quantization  # type: ignore[attr-defined]
        assert quantisation_steps(vector(quality))[0].flatten(1).tolist() == [list(tables[0]), list(tables[1])]


def test_jpeg_takes_every_sample_at_its_own_quality(assert_close: CloseTo, photograph: Tensor) -> None:
    qualities = vector(60, 95, 77.7)
    batch = torch.cat([photograph, photograph.flip(3), 1 - photograph])[..., :96, :80]
    found = jpeg(batch, qualities)
    for i in range(3):
        assert_close(found[i : i + 1], jpeg(batch[i : i + 1], qualities[i : i + 1]), 1e-5)


def test_jpeg_of_one_colour_keeps_it(assert_close: CloseTo) -> None:
    """A shift of colour that no one would see in a natural picture adds up in training. Sides of 1 to 17 pixels."""
    for size in ((1, 1), (7, 17), (16, 9)):
        x = vector(0.2, 0.5, 0.9)[None, :, None, None].expand(1, 3, *size)
        assert_close(jpeg(x, vector(100.0)), x, 1.5 / 255)


def test_jpeg_stays_within_range() -> None:
    """Ringing beyond black and white, and what came in beyond them, is cut off as in a file."""
    x = 3 * torch.randn(1, 3, 32, 32, generator=generator())
    found = jpeg(x, vector(60.0))
    assert found.min() == 0
    assert found.max() == 1
    assert torch.equal(found, jpeg(x.clamp(0, 1), vector(60.0)))


# --- kernels


def test_gaussian_is_its_formula(assert_close: CloseTo) -> None:
    """exp(-x' C^-1 x / 2) with C^-1 from an explicit inverse, at a pixel off both axes."""
    sigma, angle, beta = (2.5, 0.8), 0.6, 1.7
    cos, sin = math.cos(angle), math.sin(angle)
    rotation = torch.tensor([[cos, -sin], [sin, cos]])
    inverse = torch.linalg.inv(rotation @ torch.diag(vector(*sigma) ** 2) @ rotation.T)
    offset = vector(3, -2)
    distance = offset @ inverse @ offset

    found = squared_distance(vector(sigma[0]), vector(sigma[1]), vector(angle))
    assert_close(found[0, 10 - 2, 10 + 3], distance, 1e-4)  # rows are y
    assert_close(gaussian(found, vector(beta))[0, 8, 13], torch.exp(-0.5 * distance**beta), 1e-5)
    assert_close(plateau(found, vector(beta))[0, 8, 13], 1 / (distance**beta + 1), 1e-5)
    assert gaussian(found, vector(beta))[0, 10, 10] == plateau(found, vector(beta))[0, 10, 10] == 1


def test_equal_sigmas_are_isotropic(assert_close: CloseTo) -> None:
    """Then rotation changes nothing, and a quarter turn never does where it swaps the sigmas."""
    round_ones = squared_distance(vector(1.5, 1.5), vector(1.5, 1.5), vector(0.0, 0.7))
    assert_close(round_ones[0], round_ones[1], 1e-4)
    swapped = squared_distance(vector(1.0, 3.0), vector(3.0, 1.0), vector(0.0, math.pi / 2))
    assert_close(swapped[0], swapped[1], 1e-3)
    assert not torch.allclose(swapped[0], swapped[0].T)


def test_deviation_of_a_gaussian_kernel() -> None:
    """sigma is in pixels, along the first axis of x at rotation 0."""
    kernel = normalised(gaussian(squared_distance(vector(1.5), vector(0.9), vector(0.0)), vector(1.0)), vector(21))[0]
    squares = (torch.arange(21.0) - 10) ** 2
    assert (kernel.sum(0) * squares).sum().sqrt().item() == pytest.approx(1.5, rel=1e-3)
    assert (kernel.sum(1) * squares).sum().sqrt().item() == pytest.approx(0.9, rel=1e-3)


@pytest.mark.parametrize("cutoff", [math.pi / 5, 1.7, math.pi])
def test_sinc_is_an_ideal_low_pass(cutoff: float) -> None:
    """Its values are the integral of cos(k x) / 4 pi^2 over the disc |k| < cutoff, done here on a grid."""
    found = sinc(vector(cutoff))[0]
    assert found[10, 10].item() == pytest.approx(cutoff**2 / (4 * math.pi))
    k = (torch.arange(800, dtype=torch.float64) + 0.5) / 800 * 2 * cutoff - cutoff
    inside = k[:, None] ** 2 + k[None] ** 2 < cutoff**2
    for x, y in ((0, 0), (1, 0), (2, 1), (-3, 5)):
        waves = torch.cos(k[:, None] * y + k[None] * x) * inside
        integral = waves.sum().item() * (2 * cutoff / 800) ** 2 / (4 * math.pi**2)
        assert found[10 + y, 10 + x].item() == pytest.approx(integral, abs=1e-4)


def test_random_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each sums to 1 and is the same turned by 180 degrees; sizes, families and shapes in their shares."""
    drawn: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}

    def record(family: Callable[..., Tensor]) -> None:
        def recorded(*arguments: Tensor) -> Tensor:
            drawn[family.__name__] = arguments[-1]
            values[family.__name__] = family(*arguments)
            return values[family.__name__]

        monkeypatch.setattr(synthesis, family.__name__, recorded)

    for family in (gaussian, plateau, sinc):
        record(family)
    kernels = random_kernels(4000, (0.2, 3.0), generator())
    assert kernels.shape == (4000, 21, 21)
    assert (kernels.sum((1, 2)) - 1).abs().max() < 1e-5
    assert torch.allclose(kernels, kernels.flip(1, 2), atol=1e-6)

    def of_family(name: str) -> Tensor:
        """Before they sum to 1, kernels of a family differ by a factor only."""
        neighbours, centres = (values[name][:, 10, x] for x in (11, 10))
        return (kernels[:, 10, 11] / kernels[:, 10, 10] - neighbours / centres).abs() < 1e-6

    sincs = of_family("sinc")
    assert share(sincs) == pytest.approx(0.1, abs=0.015)
    assert share(of_family("plateau") & ~of_family("gaussian")) == pytest.approx(0.9 * 0.15, abs=0.02)
    isotropic = (kernels - kernels.transpose(1, 2)).abs().amax((1, 2)) < 1e-6
    assert share(isotropic) == pytest.approx(0.1 + 0.9 * 0.69, abs=0.025)

    beta = drawn["gaussian"]
    assert share(beta == 1) == pytest.approx(0.7 + 0.15 / 2, abs=0.02)  # and half of the plateaus
    assert share(beta < 1) == pytest.approx(0.15 / 2, abs=0.015)
    assert share(beta > 2) == pytest.approx(0.15 / 2 * 2 / 3, abs=0.01)
    assert [beta.min().item(), beta.max().item()] == pytest.approx([0.5, 4], abs=0.05)

    # Of the others the narrow ones vanish before their size ends.
    sizes = (kernels[sincs] != 0).any(1).sum(1)
    found, counts = torch.unique(sizes, return_counts=True)
    assert found.tolist() == [7, 9, 11, 13, 15, 17, 19, 21]
    assert (counts / counts.sum()).sub(1 / 8).abs().max() < 0.05
    cutoffs = drawn["sinc"][sincs]
    for chosen, least in ((sizes < 13, math.pi / 3), (sizes >= 13, math.pi / 5)):
        limits = [cutoffs[chosen].min().item(), cutoffs[chosen].max().item()]
        assert limits == pytest.approx([least, math.pi], abs=0.05)


def test_kernels_hold_no_denormal_numbers() -> None:
    """A convolution with them takes ten times as long on a CPU."""
    magnitudes = random_kernels(1000, (0.2, 3.0), generator()).abs()
    assert magnitudes[magnitudes > 0].min() > 1e-20


def test_blur_reflects_borders(assert_close: CloseTo) -> None:
    """Zeros beyond the border would darken it; the border's own pixel isn't repeated."""
    box = torch.full((1, 3, 3), 1 / 9)
    x = torch.rand(1, 2, 12, 15, generator=generator())
    assert_close(blur(torch.ones(1, 3, 12, 15), box), torch.ones(1, 3, 12, 15), 1e-6)
    corner = x[..., :2, :2] * torch.tensor([[1.0, 2.0], [2.0, 4.0]]) / 9
    assert_close(blur(x, box)[..., 0, 0], corner.sum((2, 3)), 1e-6)


def test_blur_gives_every_sample_its_kernel(assert_close: CloseTo) -> None:
    x = torch.rand(3, 3, 24, 30, generator=generator())
    kernels = random_kernels(3, (0.5, 3.0), generator(1))
    kernels[1] = 0
    kernels[1, 10, 10] = 1
    found = blur(x, kernels)
    assert_close(found[1], x[1], 1e-6)
    for i in range(3):
        assert_close(found[i : i + 1], blur(x[i : i + 1], kernels[i : i + 1]), 1e-6)
    assert not torch.allclose(found[0], x[0], atol=0.05)


# --- noise

GAUSSIAN, POISSON = torch.tensor([True]), torch.tensor([False])
GREY, COLOUR = torch.tensor([True]), torch.tensor([False])


@pytest.mark.parametrize("sigma", [1 / 255, 15 / 255])
def test_gaussian_noise(sigma: float) -> None:
    x = torch.full((1, 3, 128, 128), 0.5)
    noise = add_noise(x, GAUSSIAN, vector(sigma), COLOUR, generator()) - x
    assert noise.mean().item() == pytest.approx(0, abs=sigma / 50)
    assert noise.std().item() == pytest.approx(sigma, rel=0.02)
    correlation = torch.corrcoef(noise[0].flatten(1))
    assert (correlation - torch.eye(3)).abs().max() < 0.03


def ramp(levels: int) -> Tensor:
    """So many neighbouring 8-bit levels around the middle, evenly; (1, 3, 120, 128)."""
    values = 128 - levels // 2 + torch.arange(128 * 120) % levels
    return values.view(1, 1, 120, 128).expand(1, 3, -1, -1) / 255


@pytest.mark.parametrize(("levels", "v"), [(1, 1), (2, 2), (5, 8), (16, 16), (17, 32), (150, 256)])
@pytest.mark.parametrize("grey", [COLOUR, GREY])
def test_poisson_noise(levels: int, v: int, grey: Tensor) -> None:
    """Of a count of x v photons: a variance of x / v; v is the number of levels, rounded up to a power of two."""
    x, scale = ramp(levels), 0.1
    noise = add_noise(x, POISSON, vector(scale), grey, generator()) - x
    deviation = scale * math.sqrt(x.mean().item() / v)
    assert noise.mean().item() == pytest.approx(0, abs=deviation / 30)
    assert noise.std().item() == pytest.approx(deviation, rel=0.05)


def test_poisson_noise_of_the_luma() -> None:
    """Two lumas, but four values of red, green and blue: grey noise has v = 2, coloured noise 4."""
    left, right = vector(0.4, 0.2, 0.6), vector(0.6, 0.4, 0.2)
    x = torch.stack([left, right], 1).round(decimals=2)[None, :, None].repeat_interleave(64, 3).repeat(1, 1, 128, 1)
    deviations = [(add_noise(x, POISSON, vector(0.1), grey, generator()) - x).std().item() for grey in (GREY, COLOUR)]
    luma = (vector(0.299, 0.587, 0.114) * x.mean((0, 2, 3))).sum().item()
    assert deviations[0] == pytest.approx(0.1 * math.sqrt(luma / 2), rel=0.05)
    assert deviations[1] == pytest.approx(0.1 * math.sqrt(x.mean().item() / 4), rel=0.05)


@pytest.mark.parametrize("kind", [GAUSSIAN, POISSON])
def test_grey_noise_is_the_same_in_all_channels(assert_close: CloseTo, kind: Tensor) -> None:
    x = 0.4 + 0.2 * torch.rand(1, 3, 32, 32, generator=generator())
    noise = add_noise(x, kind, vector(0.05), GREY, generator()) - x
    assert_close(noise[:, 1:], noise[:, :1].expand(-1, 2, -1, -1), 1e-6)
    coloured = add_noise(x, kind, vector(0.05), COLOUR, generator()) - x
    assert (coloured[:, 1] - coloured[:, 0]).abs().mean() > 0.003


def test_noise_is_of_each_sample_s_kind(assert_close: CloseTo) -> None:
    """Strength 0 adds none: values are clipped, and not rounded to 8 bit."""
    x = 2 * torch.rand(4, 3, 32, 32, generator=generator()) - 0.5
    kinds, greys = torch.tensor([True, False, True, False]), torch.tensor([True, True, False, False])
    assert_close(add_noise(x, kinds, torch.zeros(4), greys, generator()), x.clamp(0, 1), 0)

    x = torch.full((4, 3, 64, 64), 0.5)
    noise = add_noise(x, kinds, vector(0.02, 0.2, 0.01, 0.1), greys, generator()) - x
    # One level: Poisson noise of a mean of a half, in whole numbers.
    deviations = noise.std((1, 2, 3))
    assert deviations[[0, 2]].tolist() == pytest.approx([0.02, 0.01], rel=0.05)
    assert [len(sample.unique()) > 100 for sample in noise] == [True, False, True, False]
    assert [torch.equal(sample[0], sample[1]) for sample in noise] == greys.tolist()


# --- the whole


@pytest.mark.parametrize(("scale", "size"), [(4, (44, 44)), (4, (64, 100)), (2, (46, 38)), (3, (72, 45))])
def test_size_and_levels(photograph: Tensor, scale: int, size: tuple[int, int]) -> None:
    x = photograph[..., : size[0], : size[1]].repeat(2, 1, 1, 1)
    for seed in range(12):
        found = degrade(x, scale, generator(seed))
        assert found.shape == (2, 3, size[0] // scale, size[1] // scale)
        levels = found * 255
        assert torch.equal(found, levels.round() / 255)
        assert levels.min() >= 0
        assert levels.max() <= 255


def test_the_picture_is_still_there(photograph: Tensor) -> None:
    """No shift, no mirroring, no change of colour: on the average the degraded pictures are the reduced one."""
    x = photograph[..., 40:168, 80:208]
    found = torch.cat([degrade(x, 4, generator(seed)) for seed in range(40)]).mean(0, keepdim=True)
    reduced = torch.nn.functional.interpolate(x, (32, 32), mode="area")
    assert (found.mean((2, 3)) - reduced.mean((2, 3))).abs().max() < 2 / 255
    best = psnr(found, reduced)
    for axis in (2, 3):
        assert psnr(found.roll(1, axis), reduced) < best - 2
        assert psnr(found.roll(-1, axis), reduced) < best - 2


def test_softness(photograph: Tensor) -> None:
    """Less of it leaves more detail, and as much noise and JPEG."""
    x = photograph[..., :128, :128]

    def mean(softness: float) -> Tensor:
        return torch.cat([degrade(x, 4, generator(seed), softness) for seed in range(40)]).mean(0)

    sharp, soft, reduced = mean(0.0), mean(1.0), torch.nn.functional.interpolate(x, (32, 32), mode="area")[0]
    detail, lost, kept = (t.diff().abs().mean() for t in (reduced, soft, sharp))
    assert lost < 0.6 * detail
    assert 0.85 * detail < kept
    noisy = [degrade(torch.full_like(x, 0.5), 4, generator(seed), 0.0).std() for seed in range(8)]
    assert min(noisy) > 1 / 255


def test_mildly(photograph: Tensor) -> None:
    """As sharp as before: what differs is noise and JPEG, and no more than they are drawn."""
    x = photograph[..., :120, :100].repeat(60, 1, 1, 1)
    kept, found = x.clone(), degrade_mildly(x, generator(0))
    assert torch.equal(x, kept)
    assert torch.equal(found, (found * 255).round() / 255)
    assert found.min() >= 0
    assert found.max() <= 1
    assert (found.mean((0, 2, 3)) - x.mean((0, 2, 3))).abs().max() < 1 / 255
    assert psnr(synthesis._luma(found).mean(0), synthesis._luma(x)[0]) > 36  # colours lose what 4:2:0 takes
    each = [psnr(sample, x[0]) for sample in found]
    assert min(each) > 20
    assert max(each) > min(each) + 6
    assert torch.equal(degrade_mildly(x, generator(0)), found)
    assert not torch.equal(found[0], found[1])
    flat = degrade_mildly(torch.full((60, 3, 64, 64), 0.5), generator(1)).std((1, 2, 3))
    assert flat.max() < 12 / 255  # the noise of 10 levels, and what JPEG's rounding makes of it
    assert flat.min() < 1 / 255


def test_same_seed_same_picture(photograph: Tensor) -> None:
    x = photograph[..., :64, :80].repeat(3, 1, 1, 1)
    kept, state = x.clone(), torch.get_rng_state()
    first = degrade(x, 4, generator(5))
    assert torch.equal(degrade(x, 4, generator(5)), first)
    assert not torch.equal(degrade(x, 4, generator(6)), first)
    assert not torch.equal(first[0], first[1])  # samples draw their own
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, kept)

    running = generator(5)
    assert torch.equal(degrade(x, 4, running), first)
    assert not torch.equal(degrade(x, 4, running), first)  # the next batch is another


@pytest.mark.parametrize(
    ("shape", "message"),
    [((3, 64, 64), r"\(3, 64, 64\)"), ((1, 1, 64, 64), "1, 1"), ((1, 3, 64, 62), "62 x 64"), ((1, 3, 40, 64), "44")],
)
def test_refuses_other_shapes(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        degrade(torch.zeros(shape), 4, generator())


Step = tuple[str, dict[str, Any]]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[list[Step]]:
    """What 400 calls of degrade do to a batch of four 120 x 160 pictures, in order: (name, arguments)."""
    calls: list[list[Step]] = []
    resize = torch.nn.functional.interpolate

    def record(name: str, *names: str) -> Callable[..., Tensor]:
        def step(x: Tensor, *values: Any) -> Tensor:
            calls[-1].append((name, dict(zip(names, values, strict=False))))
            return x

        return step

    def resized(x: Tensor, size: tuple[int, int], **options: Any) -> Tensor:
        assert not options.get("antialias")
        assert not options.get("align_corners")
        calls[-1].append(("resize", {"size": size, "mode": options["mode"]}))
        return resize(x, size)

    monkeypatch.setattr(synthesis, "blur", record("blur", "kernels"))
    monkeypatch.setattr(synthesis, "add_noise", record("noise", "gaussian", "strength", "grey"))
    monkeypatch.setattr(synthesis, "jpeg", record("jpeg", "quality"))
    monkeypatch.setattr(torch.nn.functional, "interpolate", resized)
    x, source = torch.zeros(4, 3, 120, 160), generator()
    for _ in range(400):
        calls.append([])
        degrade(x, 4, source)
    return calls


def test_draws(steps: list[list[Step]]) -> None:
    """Every branch is reached as often as published, with parameters of the published ranges."""
    order = [[name for name, _ in call] for call in steps]
    stages = ["blur", "resize", "noise", "jpeg", "blur", "resize", "noise"]
    file_last, file_first = [*stages, "resize", "blur", "jpeg"], [*stages, "jpeg", "resize", "blur"]
    assert all(names in (file_last, file_first) for names in order)
    assert share([names == file_last for names in order]) == pytest.approx(0.5, abs=0.08)

    def every(name: str, nth: int, argument: str) -> list[Any]:
        return [[values for step, values in call if step == name][nth][argument] for call in steps]

    # resizes: of 120 first, of 30 then
    ranges = ((120, 0.3, 1.5, 0.2, 0.7), (30, 0.6, 1.2, 0.3, 0.4))
    for nth, (full, least, largest, enlarged, reduced) in enumerate(ranges):
        heights = torch.tensor([size[0] for size in every("resize", nth, "size")])
        assert heights.min() / full == pytest.approx(least, abs=0.05)
        assert heights.max() / full == pytest.approx(largest, abs=0.05)
        assert share(heights > full) == pytest.approx(enlarged, abs=0.06)
        assert share(heights < full) == pytest.approx(reduced, abs=0.06)
        assert all(abs(width - height * 4 / 3) <= 1.2 for height, width in every("resize", nth, "size"))
    assert set(every("resize", 2, "size")) == {(30, 40)}
    for nth in range(3):
        for mode in ("area", "bilinear", "bicubic"):
            assert share([m == mode for m in every("resize", nth, "mode")]) == pytest.approx(1 / 3, abs=0.08)

    # kernels: the first always, the second of half the samples, the last of eight in ten
    for nth, blurred in enumerate((1.0, 0.5, 0.8)):
        centres = torch.cat(every("blur", nth, "kernels"))[:, 10, 10]
        assert share(centres < 1) == pytest.approx(blurred, abs=0.04)
    assert (torch.cat(every("blur", 0, "kernels")).amin((1, 2)) < 0).any()

    for nth, (deviation, scale) in enumerate(((15, 2.0), (12, 1.0))):
        gaussian = torch.cat(every("noise", nth, "gaussian"))
        strength, grey = torch.cat(every("noise", nth, "strength")), torch.cat(every("noise", nth, "grey"))
        assert share(gaussian) == pytest.approx(0.5, abs=0.04)
        assert share(grey[gaussian]) == pytest.approx(0.4, abs=0.05)
        assert share(grey[~gaussian]) == pytest.approx(0.4, abs=0.05)
        levels = strength[gaussian] * 255
        assert [levels.min().item(), levels.max().item()] == pytest.approx([1, deviation], abs=0.1)
        assert levels.mean().item() == pytest.approx((1 + deviation) / 2, rel=0.05)
        scales = strength[~gaussian]
        assert [scales.min().item(), scales.max().item()] == pytest.approx([0.05, scale], abs=0.02)

    for nth, best in enumerate((95, 100)):
        qualities = torch.cat(every("jpeg", nth, "quality"))
        assert [qualities.min().item(), qualities.max().item()] == pytest.approx([60, best], abs=0.2)
        assert qualities.mean().item() == pytest.approx((60 + best) / 2, abs=1)
