"""The main job on a small network: any picture, any size, the same result however it is cut."""

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from infdit_core import InfDiT, upscale
from infdit_core.evaluation import LEAST_COLOUR, LEAST_DETAIL, STAIN, MemoryPlan, keep_to
from infdit_core.images import resize
from infdit_core.infdit import Preset
from infdit_core.upscale import UpscaleProgress, _passes, target_size

PRESETS = {"faithful": Preset(1), "balanced": Preset(2, 0.1)}


@pytest.fixture
def model(tiny_model: Callable[..., InfDiT]) -> InfDiT:
    return tiny_model(num_layers=1, parametrisation="residual", sigma_data=0.1, sigma_max=2.0, presets=_Frozen(PRESETS))


@pytest.fixture
def two_grids(tiny_model: Callable[..., InfDiT]) -> InfDiT:
    settings = {"parametrisation": "residual", "sigma_data": 0.1, "sigma_max": 2.0, "grids": 2}
    return tiny_model(num_layers=1, presets=_Frozen(PRESETS), **settings)


class _Frozen(dict):  # hashable, so that the fixture can be cached
    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(self.items()))


def image(height: int, width: int, channels: int = 3, batch: int = 1) -> Tensor:
    return torch.rand(batch, height, width, channels, generator=torch.Generator().manual_seed(height * width))


@pytest.mark.parametrize("scale", [0.5, 1, 1.7, 2, 3, 3.3, 4, 5, 8, 17])
def test_any_scale(model: InfDiT, scale: float) -> None:
    result = upscale(image(5, 9), model=model, scale=scale, preset="faithful")
    assert result.shape == (1, round(5 * scale), round(9 * scale), 3)
    assert result.dtype == torch.float32 and result.min() >= 0 and result.max() <= 1


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (200, 1), (4, 4), (13, 7)])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_any_picture(model: InfDiT, size: tuple[int, int], channels: int) -> None:
    result = upscale(image(*size, channels), model=model, scale=4, preset="faithful")
    assert result.shape == (1, 4 * size[0], 4 * size[1], channels)


@pytest.mark.parametrize(("size", "expected"), [((30, None), (30, 54)), ((None, 27), (15, 27)), ((40, 41), (40, 41))])
def test_sizes(model: InfDiT, size: tuple[int | None, int | None], expected: tuple[int, int]) -> None:
    assert upscale(image(5, 9), model=model, size=size, preset="faithful").shape[1:3] == expected


def test_unequal_factors_never_shrink_a_side_on_the_way() -> None:
    assert _passes((1000, 1000), (1000, 6400), 4) == [((1000, 1000), (1000, 1600)), ((1000, 1600), (1000, 6400))]
    assert _passes((4000, 1), (4000, 4000), 4)[1][0][0] == 4000
    assert _passes((10, 10), (80, 80), 4) == [((10, 10), (20, 20)), ((20, 20), (80, 80))]


def test_what_a_pass_makes_must_not_be_too_large_either() -> None:
    assert target_size(9000, 9000, scale=1.2) == (10800, 10800)
    with pytest.raises(ValueError, match="cut the picture"):
        _passes((9000, 9000), (10800, 10800), 4)


@pytest.mark.parametrize("channels", [2, 4])
def test_hidden_colours_leave_no_fringe(model: InfDiT, channels: int) -> None:
    """A white cut-out on transparent black, as editors write it."""
    picture = torch.zeros(1, 24, 24, channels)
    picture[:, 6:17, 5:18] = 1
    result = upscale(picture, model=model, scale=4, preset="faithful")
    shown = result[..., -1:] > 0.05
    assert 2000 < shown.sum() < 3200
    assert (result[..., :-1] - 1).abs()[shown.expand_as(result[..., :-1])].max() < 0.02


def test_a_network_that_adds_nothing_gives_bicubic(tiny_model: Callable[..., InfDiT]) -> None:
    """Padding, cropping, passes and ranges on their own: no shift, no lost border."""
    model = InfDiT(tiny_model(parametrisation="residual", sigma_data=0.1, sigma_max=2.0).config)
    model.initialise(torch.Generator().manual_seed(0))
    ramp = torch.linspace(0.2, 0.8, 23)[:, None, None].expand(1, 23, 31, 3).contiguous()
    for scale in (2, 4, 8):
        got = upscale(ramp, model=model, scale=scale, steps=1)
        inner = slice(2 * scale, -2 * scale)
        centres = (torch.arange(23 * scale) + 0.5) / scale - 0.5
        expected = 0.2 + 0.6 * centres / 22
        assert torch.allclose(got[0, inner, 5, 0], expected[inner], atol=2e-3)


def test_same_picture_whatever_the_tile_or_batch(model: InfDiT) -> None:
    pictures = torch.cat([image(9, 14), image(9, 14).flip(1)])
    whole = upscale(pictures, model=model, scale=4, seed=3, tile=None)
    for tile in ("auto", 1, 2, (1, 3)):
        assert torch.allclose(upscale(pictures, model=model, scale=4, seed=3, tile=tile), whole, atol=1e-5)
    alone = upscale(pictures[1:], model=model, scale=4, seed=3)
    assert torch.allclose(alone, whole[1:], atol=1e-5)
    assert not torch.allclose(upscale(pictures, model=model, scale=4, seed=4), whole, atol=1e-3)


def test_no_global_random_state_is_touched(model: InfDiT) -> None:
    before = torch.get_rng_state()
    for sampler in ("heun", "euler", "ddim", "dpmpp_2m"):
        upscale(image(4, 4), model=model, scale=4, sampler=sampler)
    assert torch.equal(torch.get_rng_state(), before)


def test_settings_choose_the_evaluations(model: InfDiT, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    original = InfDiT.denoise

    def counted(self: InfDiT, noisy: Tensor, sigma: Tensor, *args: object, **kwargs: object) -> Tensor:
        seen.append(round(float(sigma), 3))
        return original(self, noisy, sigma, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(InfDiT, "denoise", counted)

    def sigmas(**settings: object) -> list[float]:
        seen.clear()
        upscale(image(4, 4), model=model, scale=4, **settings)  # type: ignore[arg-type]
        return list(seen)

    assert sigmas(preset="faithful") == sigmas(steps=1) == [2.0]
    assert sigmas() == [2.0, 0.1, 0.002, 0.002]
    assert sigmas(steps=1, start=0.05) == [2.0, 0.05]
    assert sigmas(steps=3, sampler="euler")[:2] == [2.0, 0.1] and len(sigmas(steps=3, sampler="euler")) == 4
    assert sigmas(preset="faithful", steps=2) == [2.0, 0.002, 0.002], "without a start: from the largest sigma"


# From pixel to pixel, but not the same in one low-resolution pixel and the next.
SIGNS = (-1.0) ** (torch.arange(96) + torch.arange(96) // 4)


@pytest.mark.parametrize("size", [(1, 1), (3, 40), (45, 61)])
def test_no_colour_cast_is_kept(size: tuple[int, int]) -> None:
    low_res = image(*size).permute(0, 3, 1, 2) - 0.5
    bicubic = resize(low_res, (4 * size[0], 4 * size[1]))
    along = torch.linspace(0, 1, 4 * size[1]) * torch.tensor([0.2, -0.1, 0.05])[:, None, None]
    for tint in (torch.full_like(bicubic, 0.1), along):
        tinted = bicubic + tint
        keep_to(low_res, tinted)
        assert (tinted - bicubic).abs().max() < 0.2 * tint.abs().max()


def test_patterns_are_kept_only_where_the_low_resolution_has_detail() -> None:
    low_res = torch.zeros(1, 3, 24, 24)
    low_res[..., 12:] = 0.5 * image(24, 12).permute(0, 3, 1, 2)
    bicubic = resize(low_res, (96, 96))
    estimate = bicubic + 0.1 * SIGNS
    keep_to(low_res, estimate)
    kept = (estimate - bicubic).abs()
    assert torch.allclose(kept[..., 8:36], torch.tensor(LEAST_DETAIL), atol=0.002)
    assert torch.allclose(kept[..., 52:], torch.tensor(0.1), atol=0.01)


def test_what_repeats_in_every_low_resolution_pixel_goes() -> None:
    """Beside a line too, which is neither dimmed nor leaves a trace."""
    low_res, pattern = torch.zeros(1, 3, 24, 24), 0.02 * torch.tensor([1.0, -1, -1, 1]).repeat(24)
    estimate = low_res.new_zeros(1, 3, 96, 96) + pattern
    keep_to(low_res, estimate)
    assert estimate.abs().max() < 2e-4
    low_res[:, :, 12] = 0.25  # of a line of 1 px
    original = torch.zeros(1, 3, 96, 96)
    original[:, :, 49] = 1
    estimate = original + pattern
    keep_to(low_res, estimate)
    assert (estimate - original)[:, :, 8:40].abs().max() < 0.2 * 0.02
    assert estimate[:, :, 49].min() > 0.95


def test_what_repeats_is_seen_through_coarse_texture() -> None:
    """Whose values mostly count up to a bound: without making up for that two thirds of the pattern would stay."""
    random, pattern = torch.Generator().manual_seed(0), 0.02 * torch.tensor([1.0, -1, -1, 1]).repeat(48)
    texture = 0.1 * torch.randn(1, 1, 192, 192, generator=random).expand(1, 3, 192, 192)
    low_res = resize(texture, (48, 48))
    estimate = texture + pattern
    keep_to(low_res, estimate)
    repeated = F.pixel_unshuffle((estimate - texture)[:, :1], 4).mean((2, 3))
    assert (repeated - repeated.mean()).abs().mean() < 0.3 * 0.02


def test_detail_of_a_single_low_resolution_pixel_stays() -> None:
    pattern = 0.02 * torch.tensor([1.0, -1, -1, 1]).expand(1, 3, 4, 4)
    estimate = pattern.clone()
    keep_to(torch.zeros(1, 3, 1, 1), estimate)
    assert (estimate - pattern).abs().max() < 0.2 * 0.02


def test_stains_stay_below_what_the_low_resolution_has_around() -> None:
    """A checker of 16 px on a ramp, on a chess board of low-resolution pixels and on noise; its mean is no cast."""
    ramp, chess, noise = torch.linspace(-0.5, 0.5, 24).expand(1, 3, 24, 24), torch.ones(24, 24), image(24, 24)
    chess[::2, ::2] = chess[1::2, 1::2] = -1
    sign = chess[:6, :6].repeat_interleave(16, 0).repeat_interleave(16, 1)
    left = []
    for low_res in (ramp, 0.5 * chess.expand(1, 3, 24, 24), noise.permute(0, 3, 1, 2) - 0.5):
        bicubic = resize(low_res, (96, 96))
        stained = bicubic + 0.06 * sign
        keep_to(low_res, stained)
        left.append(torch.nn.functional.avg_pool2d(stained - bicubic, 8)[..., 1:-1, 1:-1].abs())
    assert left[0].max() < 0.028 and left[1].max() < 0.04  # without: 0.031, what is kept of patterns, and 0.06
    assert left[0].min() > STAIN, "a bit of doubt is left"
    assert left[2].min() > 0.055


def test_grey_gets_no_colour() -> None:
    low_res = 0.5 * image(24, 24, channels=1).permute(0, 3, 1, 2).expand(1, 3, 24, 24).clone()
    low_res[:, 0, :, 12:] += 0.3
    bicubic = resize(low_res, (96, 96))
    estimate = bicubic + 0.1 * torch.tensor([1.0, -1.0, 0.0])[:, None, None] * SIGNS
    keep_to(low_res, estimate)
    kept = estimate - bicubic
    colour = (kept - kept.mean(1, keepdim=True)).abs().amax(1)
    assert colour[..., 8:36].max() < 1.01 * LEAST_COLOUR
    assert colour[..., 60:].min() > 0.08


def test_what_is_true_is_kept() -> None:
    """The original of a low resolution, with an edge where areas of colour meet, is changed by nothing."""
    original = torch.full((1, 3, 160, 256), 0.8)
    original[..., 40:100, 128:] = -0.4
    kept = original.clone()
    keep_to(resize(original, (40, 64)), kept)
    assert torch.allclose(kept, original, atol=0.01)


def test_keeping_to_the_low_resolution_can_be_stopped(two_grids: InfDiT) -> None:
    """Of large pictures it takes seconds, after the last tile."""
    calls = 0

    def stop_at_last(progress: UpscaleProgress) -> None:
        nonlocal calls
        calls += 1
        if calls == last:
            raise KeyboardInterrupt

    last = 0
    upscale(image(9, 9), model=two_grids, scale=4, steps=1, on_progress=stop_at_last)
    last, calls = calls, 0
    with pytest.raises(KeyboardInterrupt):
        upscale(image(9, 9), model=two_grids, scale=4, steps=1, on_progress=stop_at_last)
    tiles = 2
    assert last == tiles + 6  # three channels twice


def borders(like: Tensor, block: int, mark: float) -> Tensor:
    """`like` with brighter pixels on both sides of its block borders."""
    at = [torch.arange(side) % block for side in like.shape[2:]]
    rows, cols = ((place == 0) | (place == block - 1) for place in at)
    return like + mark * (rows[:, None] | cols)


@pytest.mark.parametrize(("side", "left"), [("block_size", 0.2), ("patch_size", 0.4)])
@pytest.mark.parametrize("settings", [{"steps": 1}, {"sigmas": torch.tensor([0.1, 0.0]), "sampler": "euler"}])
def test_borders_of_one_grid_vanish_in_the_other(
    two_grids: InfDiT, settings: dict[str, Any], side: str, left: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def marking(self: InfDiT, noisy: Tensor, *args: object, upsampled: Tensor, **kwargs: object) -> Tensor:
        return borders(upsampled, getattr(self.config, side), 0.5)

    monkeypatch.setattr(InfDiT, "denoise", marking)
    block = two_grids.config.block_size
    low_res = 0.3 + 0.4 * image(2 * block // 4 + 3, 3 * block // 4 + 1)  # of so much detail that the marks may stay
    bicubic = resize(low_res.permute(0, 3, 1, 2), (4 * low_res.shape[1], 4 * low_res.shape[2]))
    result = upscale(low_res, model=two_grids, scale=4, **settings)[0, :, :, 0] - bicubic[0, 0]
    one_grid = borders(torch.zeros(1, 1, *result.shape), getattr(two_grids.config, side), 0.25)
    # Something is left where borders of both cross: most patches' pixels lie at a border.
    assert result.square().mean() < left * one_grid.square().mean()


def test_weights_say_how_many_grids(
    model: InfDiT, two_grids: InfDiT, monkeypatch: pytest.MonkeyPatch, tiny_model: Callable[..., InfDiT]
) -> None:
    seen: list[tuple[int, ...]] = []
    original = InfDiT.denoise

    def watched(self: InfDiT, noisy: Tensor, *args: object, **kwargs: object) -> Tensor:
        seen.append(tuple(noisy.shape[2:]))
        return original(self, noisy, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(InfDiT, "denoise", watched)
    block = model.config.block_size
    side = 2 * block // model.config.scale
    for network, sizes in ((model, [2]), (two_grids, [2, 3])):
        seen.clear()
        upscale(image(side, side), model=network, scale=4, sigmas=torch.tensor([0.1, 0.05, 0.0]), sampler="euler")
        assert seen == [(blocks * block,) * 2 for blocks in sizes] * 3
    with pytest.raises(ValueError, match="grids is 3"):
        tiny_model(grids=3)


def test_what_the_network_sees_is_in_register(two_grids: InfDiT, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noisy picture and enlarged low resolution go on alike beyond the edges: without noise they are the same."""
    grids = 0

    def checked(_: InfDiT, noisy: Tensor, sigma: Tensor, low_res: Tensor, **others: Any) -> Tensor:
        nonlocal grids
        grids += 1
        assert torch.equal(noisy, others["upsampled"])
        assert (resize(noisy, (low_res.shape[2], low_res.shape[3])) - low_res).abs().mean() < 0.15
        return noisy

    monkeypatch.setattr(InfDiT, "denoise", checked)
    picture = resize(image(4, 4).permute(0, 3, 1, 2), (13, 22)).clamp(0, 1).permute(0, 2, 3, 1)
    upscale(picture, model=two_grids, scale=4, steps=1)
    assert grids == 2


def test_a_preset_has_its_sampler(tiny_model: Callable[..., InfDiT]) -> None:
    presets = _Frozen({"faithful": Preset(1), "balanced": Preset(2, 0.1, "euler")})
    settings = {"num_layers": 1, "parametrisation": "residual", "sigma_data": 0.1, "sigma_max": 2.0}
    model = tiny_model(**settings, presets=presets)
    own, euler, heun = (upscale(image(4, 4), model=model, scale=4, sampler=name) for name in (None, "euler", "heun"))
    assert torch.equal(own, euler) and not torch.equal(own, heun)
    with pytest.raises(ValueError, match="dpmpp_2m"):
        tiny_model(**settings, presets=_Frozen({"balanced": Preset(2, 0.1, "magic")}))


def test_a_preset_has_its_last_level(tiny_model: Callable[..., InfDiT]) -> None:
    preset = Preset(3, 0.4, "euler", end=0.08)
    levels = preset.sigmas(0.005, 2.0)
    assert levels[[0, 2, 3]].tolist() == pytest.approx([0.4, 0.08, 0.0]) and len(levels) == 4
    assert replace(preset, start=0.05).sigmas(0.005, 2.0)[2] == pytest.approx(0.005), "an end above the start is none"
    assert replace(preset, start=None).sigmas(0.005, 2.0)[[0, 2]].tolist() == pytest.approx([2.0, 0.08])
    assert "0.4, the last from 0.08" in preset.describe()
    with pytest.raises(ValueError, match="end"):
        tiny_model(presets=_Frozen({"balanced": Preset(2, 0.1, end=50.0)}))
    with pytest.raises(ValueError, match="start"):
        tiny_model(presets=_Frozen({"balanced": Preset(2, 50.0)}))


def test_faithful_feeds_a_residual_network_no_noise(model: InfDiT) -> None:
    first, second = (upscale(image(4, 4), model=model, scale=4, steps=1, seed=seed) for seed in (0, 1))
    assert torch.equal(first, second)


def test_progress_grows_to_one_and_can_stop(model: InfDiT) -> None:
    seen: list[float] = []
    upscale(image(9, 9, batch=2), model=model, scale=8, tile=1, on_progress=lambda p: seen.append(p.fraction))
    assert seen == sorted(seen) and seen[-1] == pytest.approx(1) and len(seen) > 10
    seen.clear()
    upscale(
        image(16, 16),
        model=model,
        scale=16,
        tile=None,
        preset="faithful",
        on_progress=lambda p: seen.append(p.fraction),
    )
    steps = 1 + 6  # one tile, then three channels twice
    assert seen == pytest.approx([1 / 17] * steps + [1] * steps)  # the second pass has 16 times the pixels

    def stop(progress: UpscaleProgress) -> None:
        assert progress.estimate.isfinite().all()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        upscale(image(9, 9), model=model, scale=4, tile=1, on_progress=stop)


def test_out_of_memory_lowers_the_tile_then_moves_keys_and_values(
    model: InfDiT, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    original = InfDiT.denoise
    tried: list[tuple[object, object]] = []

    def short(self: InfDiT, *args: object, **kwargs: object) -> Tensor:
        tried.append((kwargs["tile"], kwargs["cache_device"]))
        if kwargs["cache_device"] is None:
            raise torch.OutOfMemoryError("no memory")
        return original(self, *args, **kwargs)  # type: ignore[arg-type]

    expected = upscale(image(9, 9), model=model, scale=4, steps=1)
    monkeypatch.setattr(InfDiT, "denoise", short)
    assert torch.allclose(upscale(image(9, 9), model=model, scale=4, steps=1, tile=3), expected, atol=1e-5)
    assert tried == [((3, 3), None), ((2, 2), None), ((1, 1), None), ((1, 1), "cpu")]
    assert "1 x 1 blocks" in caplog.text and "host memory" in caplog.text

    def never(self: InfDiT, *args: object, **kwargs: object) -> Tensor:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(InfDiT, "denoise", never)
    with pytest.raises(MemoryError, match="smaller result"):
        upscale(image(9, 9), model=model, scale=4)


def test_main_memory_that_runs_out_is_named(model: InfDiT, monkeypatch: pytest.MonkeyPatch) -> None:
    """Smaller tiles don't help where only the pictures are."""
    tried = []

    def full(self: InfDiT, *args: object, **kwargs: object) -> Tensor:
        tried.append(kwargs["tile"])
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(InfDiT, "denoise", full)
    plan = MemoryPlan(model, (9, 9), 3)
    plan.device = torch.device("cuda")
    monkeypatch.setattr(sys.modules["infdit_core.upscale"], "MemoryPlan", lambda *_: plan)
    with pytest.raises(MemoryError, match="main memory ran out"):
        upscale(image(9, 9), model=model, scale=4, steps=1)
    assert tried == [(3, 3)]


@pytest.mark.parametrize("scale", [0, -1, math.nan, math.inf, 1e6, 1e300])
def test_impossible_scales(scale: float) -> None:
    with pytest.raises(ValueError, match=r"scale|pixels"):
        target_size(4000, 4000, scale=scale)


def test_bad_arguments_say_what_is_wrong(model: InfDiT) -> None:
    good = image(4, 4)
    for changes, said in [
        ({"scale": None}, "how big"),
        ({"size": (8, 8)}, "how big"),
        ({"scale": None, "size": (None, None)}, "width"),
        ({"scale": None, "size": (0, 8)}, "at least 1 pixel"),
        ({"preset": "best"}, "faithful, balanced"),
        ({"steps": 0}, "at least 1"),
        ({"start": 3.0}, "up to 2"),
        ({"start": 0.001}, "above 0.002"),
        ({"sampler": "magic"}, "heun"),
        ({"colour": "red"}, "wavelet"),
        ({"tile": 0}, "at least 1 block"),
        ({"sigmas": torch.tensor([0.5, 0.1])}, "noise would be left"),
        ({"sigmas": torch.tensor([14.6, 1.0, 0.0])}, "to 2 at the start"),
    ]:
        with pytest.raises(ValueError, match=said):
            upscale(good, model=model, **({"scale": 4} | changes))  # type: ignore[arg-type]
    for bad, said in [
        (good * math.nan, "NaN"),
        (good[:0], "shape"),
        (good[0], "shape"),
        (good[..., :0], "shape"),
        (good.byte(), "floating"),
    ]:
        with pytest.raises(ValueError, match=said):
            upscale(bad, model=model, scale=4)
