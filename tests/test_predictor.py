"""The network that gives the diffusion its first picture."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from infdit_core import upscale
from infdit_core.evaluation import keep_to
from infdit_core.images import resize
from infdit_core.infdit import InfDiT, InfDiTConfig, Preset, load_infdit, predictor
from infdit_core.infdit.checkpoint import describe, save_infdit
from infdit_core.upscale import UpscaleProgress
from infdit_core.weights import WeightsError, open_weights

MakeModel = Callable[..., InfDiT]
CloseTo = Callable[..., None]

SIZES = {"predictor_width": 6, "predictor_depth": 2, "parametrisation": "residual", "sigma_data": 0.1, "sigma_max": 2.0}
SEEN = 2 * 2 + 2  # pixels around one that two blocks, the head and the tail look at


@pytest.fixture(scope="module")
def model(tiny_model: MakeModel) -> InfDiT:
    return tiny_model(**SIZES)


@pytest.fixture(scope="module")
def conditioned(tiny_model: MakeModel) -> InfDiT:
    """Told how its low resolution was degraded."""
    return tiny_model(**SIZES, predictor_condition=5)


@pytest.fixture(scope="module")
def detailed(tiny_model: MakeModel, tmp_path_factory: pytest.TempPathFactory) -> InfDiT:
    """With a detailer, as a file holds it."""
    path = tmp_path_factory.mktemp("detailed") / "own.safetensors"
    presets = {"faithful": Preset(1), "balanced": Preset(1, detail=0.5), "detailed": Preset(1, detail=1)}
    save_infdit(path, tiny_model(**SIZES, detail_rank=3, presets=presets), torch.float32)
    return load_infdit(path)


def low_res(height: int, width: int) -> torch.Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(height)) * 2 - 1


@pytest.mark.parametrize("size", [(8, 8), (9, 20), (21, 10), (33, 17), (1, 1)])
def test_tiles_change_nothing(
    model: InfDiT, monkeypatch: pytest.MonkeyPatch, assert_close: CloseTo, size: tuple[int, int]
) -> None:
    whole = model.predict(low_res(*size))
    assert whole.shape == (1, 3, 4 * size[0], 4 * size[1])
    monkeypatch.setattr(predictor, "TILE", 8)
    assert_close(model.predict(low_res(*size)), whole, 1e-5)


@pytest.mark.parametrize("size", [(9, 20), (1, 1)])
def test_a_condition_is_the_whole_pictures(
    conditioned: InfDiT, monkeypatch: pytest.MonkeyPatch, assert_close: CloseTo, size: tuple[int, int]
) -> None:
    whole = conditioned.predict(low_res(*size))
    monkeypatch.setattr(predictor, "TILE", 8)
    assert_close(conditioned.predict(low_res(*size)) / whole.abs().max(), whole / whole.abs().max(), 1e-5)


def test_what_lies_far_away_changes_a_condition_alone(conditioned: InfDiT, model: InfDiT) -> None:
    """Of two pictures that are the same on the left."""
    for network, told in ((conditioned, True), (model, False)):
        first = low_res(16, 64)
        second = first.clone()
        second[:, :, :, 32:] = 0
        left = (..., slice(64))
        assert torch.allclose(network.predict(first)[left], network.predict(second)[left], atol=1e-5) != told


def test_a_level_is_no_condition(conditioned: InfDiT) -> None:
    """Only what differs from the mean around counts: a flat picture's condition is that of any other."""
    assert conditioned.predictor is not None
    flat = [torch.full((1, 3, 9, 9), level) for level in (-0.5, 0.7)]
    first, second = (conditioned.predictor.condition_of(x, x.device, x.dtype) for x in flat)
    assert first is not None and second is not None and torch.allclose(first, second, atol=1e-4)


def test_a_pixel_looks_as_far_as_is_said(model: InfDiT) -> None:
    """Too small a radius would make seams between tiles, too large a one wastes work."""
    assert model.predictor is not None and model.predictor.radius == SEEN
    picture = low_res(32, 32).requires_grad_()
    model.predictor(picture)[0, 1, 64, 66].backward()
    assert picture.grad is not None
    rows, cols = picture.grad[0].abs().sum(0).nonzero().unbind(1)
    assert (rows.min(), rows.max(), cols.min(), cols.max()) == (16 - SEEN, 16 + SEEN, 16 - SEEN, 16 + SEEN)


def test_fresh_weights_predict_bicubic() -> None:
    sizes = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "block_size": 16, **SIZES}
    fresh = InfDiT(InfDiTConfig(**sizes))  # type: ignore[arg-type]
    fresh.initialise(torch.Generator().manual_seed(0))
    assert torch.equal(fresh.predict(low_res(8, 6)), resize(low_res(8, 6), (32, 24)))
    fresh.predict(low_res(8, 6)).sum().backward()
    assert fresh.predictor is not None
    assert fresh.predictor.tail.weight.grad is not None and fresh.predictor.tail.weight.grad.any()


def test_it_is_what_the_network_refines(model: InfDiT) -> None:
    small, noisy = low_res(8, 4), torch.randn(1, 3, 32, 16)
    predicted = model.upsample(small)
    assert predicted.abs().max() == 1  # these weights go beyond
    assert not torch.equal(predicted, resize(small, (32, 16)).clamp(-1, 1))
    assert torch.equal(model.denoise(noisy, 0.3, small), model.denoise(noisy, 0.3, small, upsampled=predicted))


def test_turning_the_picture_turns_what_is_refined(model: InfDiT, assert_close: CloseTo) -> None:
    small = low_res(9, 6)
    turned = torch.rot90(small, 1, (2, 3))
    assert_close(model.upsample(turned), torch.rot90(model.upsample(small), 1, (2, 3)), 1e-5)
    assert not torch.allclose(model.predict(turned), torch.rot90(model.predict(small), 1, (2, 3)), atol=0.01)


def test_progress_comes_while_it_is_predicted(model: InfDiT, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictor, "TILE", 8)
    told: list[UpscaleProgress] = []
    upscale(low_res(8, 20).permute(0, 2, 3, 1) / 2 + 0.5, model=model, scale=4, steps=1, on_progress=told.append)
    share = model.config.prediction_work() / (1 + model.config.prediction_work())
    assert [t.fraction for t in told[:12]] == pytest.approx([share * n / 12 for n in range(1, 13)])  # turns of tiles
    assert told[12].fraction > share and told[-1].fraction == pytest.approx(1)


def test_what_is_around_a_crop_is_looked_at_and_cut_off(model: InfDiT, assert_close: CloseTo) -> None:
    whole = model.predict(low_res(32, 32))
    around = model.predict(low_res(32, 32)[:, :, 4:28, 4:28], margin=SEEN)
    assert_close(around, whole[:, :, 40:-40, 40:-40], 1e-5)


def predicted_alone(model: InfDiT, image: torch.Tensor) -> torch.Tensor:
    """The predicted picture, kept to the low resolution."""
    small = image.permute(0, 3, 1, 2) * 2 - 1
    expected = model.upsample(small)
    keep_to(small, expected)
    return expected.clamp(-1, 1).permute(0, 2, 3, 1) / 2 + 0.5


def test_upscaling_starts_from_it(tiny_model: MakeModel, assert_close: CloseTo) -> None:
    """A transformer that answers nothing leaves it as the estimate."""
    model = tiny_model(**SIZES)
    model.final.weight.data.zero_()
    model.final.bias.data.zero_()
    image = torch.rand(1, 10, 7, 3, generator=torch.Generator().manual_seed(0))
    assert_close(upscale(image, model=model, scale=4, steps=1), predicted_alone(model, image), 1e-5)


def test_without_steps_it_is_the_result(tiny_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(**SIZES, presets={"faithful": Preset(0), "balanced": Preset(1)})
    image = torch.rand(1, 10, 7, 3, generator=torch.Generator().manual_seed(0))
    started, told = upscale(image, model=model, scale=4, steps=1, start=0.3), list[UpscaleProgress]()
    assert torch.equal(upscale(image, model=model, scale=4, preset="faithful", start=0.3), started), "a start is kept"
    with pytest.raises(ValueError, match="steps is 0: at least 1"):
        upscale(image, model=model, scale=4, steps=0, start=0.3)
    monkeypatch.setattr(InfDiT, "denoise", lambda *_, **__: pytest.fail("an evaluation"))
    for asked in ({"steps": 0}, {"preset": "faithful"}):
        result = upscale(image, model=model, scale=4, on_progress=told.append, **asked)
        assert torch.equal(result, predicted_alone(model, image))
    assert told[-1].fraction == told[-2].fraction == 1, "it can be stopped while it is kept to the low resolution"


def test_without_a_predictor_steps_are_needed(tiny_model: MakeModel) -> None:
    with pytest.raises(ValueError, match=r"steps is 0.*no predictor"):
        upscale(torch.rand(1, 4, 4, 3), model=tiny_model(), scale=4, steps=0)
    with pytest.raises(ValueError, match=r"preset quick: steps is 0.*no predictor"):
        InfDiTConfig(presets={"quick": Preset(0)}).check()
    InfDiTConfig(predictor_width=6, predictor_depth=2, presets={"quick": Preset(0)}).check()


def test_no_evaluation_is_spent_on_a_first_picture(tiny_model: MakeModel) -> None:
    model = tiny_model(**SIZES)
    image = torch.rand(1, 8, 8, 3, generator=torch.Generator().manual_seed(0))
    given: list[tuple[float, torch.Tensor]] = []

    def sampler(
        denoise: Callable[..., torch.Tensor], x: torch.Tensor, sigmas: torch.Tensor, **_: object
    ) -> torch.Tensor:
        given.append((float(sigmas[0]), x))
        return denoise(x, sigmas[0])

    evaluated: list[float] = []
    original = model.denoise
    model.denoise = lambda x, sigma, *a, **k: evaluated.append(float(sigma)) or original(x, sigma, *a, **k)  # type: ignore
    upscale(image, model=model, scale=4, steps=2, start=0.25, sampler=sampler)
    assert evaluated == pytest.approx([0.25])
    predicted = model.upsample(image.permute(0, 3, 1, 2) * 2 - 1)
    noise = (given[-1][1] - predicted) / 0.25
    assert abs(float(noise.mean())) < 0.1 and abs(float(noise.std()) - 1) < 0.1


@pytest.mark.parametrize(("condition", "told"), [(0, ""), (5, ", told the degradation in 5 numbers")])
def test_files_hold_it(tiny_model: MakeModel, tmp_path: Path, condition: int, told: str) -> None:
    path, model = tmp_path / "own.safetensors", tiny_model(**SIZES, predictor_condition=condition)
    save_infdit(path, model, torch.float32)
    again = load_infdit(path)
    assert again.config == model.config
    assert torch.equal(again.predict(low_res(8, 8)), model.predict(low_res(8, 8)))
    assert describe(open_weights(path))["predictor"] == "2 residual blocks, width 6" + told


@pytest.mark.parametrize("name", ["predictor.blocks.1.conv_out.bias", "detailer.blocks.1.conv_out.down"])
def test_a_file_that_lacks_a_part_is_refused(detailed: InfDiT, tmp_path: Path, name: str) -> None:
    path = tmp_path / "own.safetensors"
    save_infdit(path, detailed)
    tensors, metadata = load_file(path), open_weights(path).metadata
    del tensors[name]
    save_file(tensors, path, dict(metadata))
    with pytest.raises(WeightsError, match="missing: " + re.escape(name)):
        load_infdit(path)


def test_less_than_no_condition_is_refused() -> None:
    with pytest.raises(ValueError, match=r"predictor_condition is -1: it must be at least 0"):
        InfDiTConfig(predictor_width=6, predictor_depth=2, predictor_condition=-1).check()


@pytest.mark.parametrize("sizes", [(6, 0), (0, 2), (-1, -1)])
def test_half_a_predictor_is_refused(sizes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"predictor_width and predictor_depth are .*both"):
        InfDiTConfig(predictor_width=sizes[0], predictor_depth=sizes[1]).check()


def test_detail_is_the_share_of_the_detailers_answer(detailed: InfDiT, assert_close: CloseTo) -> None:
    small = low_res(9, 6)
    assert detailed.detailer is not None
    first, second = detailed.predict(small), detailed.predict(small, detail=1)
    assert_close(second, resize(small, (36, 24)) + detailed.detailer(small), 1e-5)
    assert (second - first).abs().max() > 0.1
    assert_close(detailed.predict(small, detail=0.25), first.lerp(second, 0.25), 1e-5)
    turned = detailed.predict(small, turns=4)
    assert_close(detailed.predict(small, turns=4, detail=0.25), turned.lerp(second, 0.25), 1e-5)


def test_a_preset_says_how_much_detail_unless_a_sampler_is_asked_for(detailed: InfDiT) -> None:
    image = low_res(8, 8).permute(0, 2, 3, 1) / 2 + 0.5
    given = {"model": detailed, "scale": 4.0}
    plain, half, whole = (upscale(image, preset=p, **given) for p in ("faithful", "balanced", "detailed"))
    assert not torch.equal(plain, half) and not torch.equal(half, whole)
    assert torch.equal(upscale(image, preset="faithful", detail=0.5, **given), half)
    assert torch.equal(upscale(image, preset="detailed", steps=1, **given), plain)
    started = upscale(image, preset="detailed", steps=2, start=0.3, **given)
    assert torch.equal(upscale(image, preset="faithful", steps=2, start=0.3, **given), started)
    levels = torch.tensor([0.3, 0.1, 0.0])
    sampled = upscale(image, preset="detailed", sigmas=levels, **given)
    assert torch.equal(upscale(image, preset="faithful", sigmas=levels, **given), sampled)


def test_progress_comes_from_both(detailed: InfDiT, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictor, "TILE", 8)
    told: list[UpscaleProgress] = []
    image = low_res(8, 20).permute(0, 2, 3, 1) / 2 + 0.5
    upscale(image, model=detailed, scale=4, preset="balanced", on_progress=told.append)
    share = detailed.config.prediction_work(0.5) / (1 + detailed.config.prediction_work(0.5))
    assert [t.fraction for t in told[:15]] == pytest.approx([share * n / 15 for n in range(1, 16)])
    assert told[15].fraction > share and told[-1].fraction == pytest.approx(1)


def test_files_hold_a_detailer_as_what_it_adds(detailed: InfDiT, tmp_path: Path, assert_close: CloseTo) -> None:
    path = tmp_path / "own.safetensors"
    save_infdit(path, detailed, torch.float32)
    file, again = open_weights(path), load_infdit(path)
    assert file.shapes["detailer.blocks.1.conv_in.up"] == (6, 3)
    assert file.shapes["detailer.blocks.1.conv_in.down"] == (3, 6 * 9)
    assert "detailer.blocks.1.conv_in.weight" not in file.shapes
    assert again.config == detailed.config
    assert_close(again.predict(low_res(8, 8), detail=1), detailed.predict(low_res(8, 8), detail=1), 1e-4)
    assert describe(file)["detailer"] == "adds to the predictor's kernels with rank 3"
    assert describe(file)["presets"].endswith("detailed: the estimate alone, detail 1")


def test_detail_that_cant_be_is_refused(model: InfDiT, detailed: InfDiT) -> None:
    image = low_res(8, 8).permute(0, 2, 3, 1) / 2 + 0.5
    with pytest.raises(ValueError, match=r"detail is 0\.5: these weights have no detailer, so it must be 0"):
        upscale(image, model=model, scale=4, detail=0.5)
    with pytest.raises(ValueError, match=r"detail is 1\.5: it must be a share, from 0 to 1"):
        upscale(image, model=detailed, scale=4, detail=1.5)
    with pytest.raises(ValueError, match=r"detail_rank is 7: it must be 0, for no detailer, or up to .* width, 6"):
        InfDiTConfig(predictor_width=6, predictor_depth=2, detail_rank=7).check()
