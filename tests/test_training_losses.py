"""What the network is asked in training, in numbers: noise levels, weights, what is replaced, what it is told."""

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from infdit_core.diffusion import edm, preconditioning
from infdit_core.evaluation import share_of_second
from infdit_core.images import pad_by_reflection
from infdit_core.infdit import InfDiT, InfDiTConfig
from infdit_core.infdit.config import Preconditioning
from infdit_core.metrics import Lpips
from infdit_core.training.config import LossConfig
from infdit_core.training.data import Batch, reduce
from infdit_core.training.losses import (
    CONDITION,
    NEAR_ENOUGH,
    LossMeter,
    blended,
    condition_loss,
    detail_loss,
    loss_at,
    overshoot,
    prediction_loss,
    training_loss,
)

MakeModel = Callable[..., InfDiT]
CloseTo = Callable[..., None]

NETWORK = InfDiTConfig(sigma_data=0.5)
PLAIN = LossConfig(lr_dropout=0.0)
COUNT = 4000


class Recorder:
    """In place of InfDiT.denoise: keeps what it was asked, answers zeros."""

    def __init__(self) -> None:
        self.asked: dict[str, Any] = {}

    def __call__(self, noisy: Tensor, sigma: Tensor, low_res: Tensor, **others: Any) -> Tensor:
        self.asked = {"noisy": noisy, "sigma": sigma, "low_res": low_res} | others
        return torch.zeros_like(noisy)


@pytest.fixture(scope="module")
def batch() -> Batch:
    generator = torch.Generator().manual_seed(3)
    original, upsampled = (torch.rand(COUNT, 3, 4, 4, generator=generator) * 2 - 1 for _ in range(2))
    return Batch(original, torch.rand(COUNT, 3, 1, 1, generator=generator) * 2 - 1, upsampled)


def ask(
    batch: Batch, config: LossConfig = PLAIN, network: InfDiTConfig = NETWORK, seed: int = 0
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Losses, noise levels, and what the network was asked."""
    recorder = Recorder()
    losses, sigma = training_loss(recorder, network, config, batch, torch.Generator().manual_seed(seed))
    return losses, sigma, recorder.asked


# --- noise


def test_noise_levels_are_those_of_the_published_recipe(batch: Batch) -> None:
    _, sigma, asked = ask(batch)
    assert torch.equal(asked["sigma"], sigma)
    assert sigma.log().mean().item() == pytest.approx(-1.0, abs=0.08)
    assert sigma.log().std().item() == pytest.approx(1.4, abs=0.06)


def test_noise_levels_follow_the_settings(batch: Batch) -> None:
    _, sigma, _ = ask(batch, replace(PLAIN, sigma_log_mean=-2.4, sigma_log_deviation=0.3))
    assert sigma.log().mean().item() == pytest.approx(-2.4, abs=0.02)
    assert sigma.log().std().item() == pytest.approx(0.3, abs=0.02)


def test_noise_levels_stay_in_the_networks_range(batch: Batch) -> None:
    _, sigma, _ = ask(batch, network=replace(NETWORK, sigma_min=0.2, sigma_max=0.6))
    assert sigma.min().item() == pytest.approx(0.2)
    assert sigma.max().item() == pytest.approx(0.6)


def test_noise_has_the_deviation_that_the_network_is_told(batch: Batch) -> None:
    _, sigma, asked = ask(batch)
    noise = (asked["noisy"] - batch.original) / sigma[:, None, None, None]
    assert noise.mean().item() == pytest.approx(0, abs=0.01)
    assert noise.std().item() == pytest.approx(1, abs=0.01)
    small = noise[sigma < sigma.median()].std().item()
    assert small == pytest.approx(1, abs=0.02)


def test_low_resolution_reaches_the_network_as_it_is(batch: Batch) -> None:
    _, _, asked = ask(batch)
    assert torch.equal(asked["low_res"], batch.low_res)
    assert torch.equal(asked["upsampled"], batch.upsampled)


def test_everything_random_comes_from_the_generator(batch: Batch) -> None:
    state = torch.get_rng_state()
    config = replace(PLAIN, lr_dropout=0.3, regression=0.3)
    (first, _, asked), (again, _, asked_again), (other, *_) = (ask(batch, config, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert asked["offset"] == asked_again["offset"]
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


# --- weights


@pytest.mark.parametrize(
    ("kind", "weight"),
    [
        ("edm", lambda s: (s**2 + 0.25) / (s * 0.5) ** 2),
        ("unit", lambda s: s**0),
        ("v", lambda s: 1 + s**-2),
        ("epsilon", lambda s: s**-2),
    ],
)
@pytest.mark.parametrize("power", [1, 2])
def test_an_error_weighs_as_configured(batch: Batch, kind: Any, weight: Callable[[Tensor], Tensor], power: int) -> None:
    losses, sigma, _ = ask(batch, replace(PLAIN, weight=kind, power=power))
    expected = weight(sigma) * batch.original.abs().pow(power).mean((1, 2, 3))  # the recorder answered zeros
    torch.testing.assert_close(losses, expected)


def test_a_residual_networks_error_weighs_by_what_the_crops_residual_holds(batch: Batch) -> None:
    network = replace(NETWORK, parametrisation="residual")
    upsampled = batch.original + 0.1 * torch.linspace(0, 1, COUNT)[:, None, None, None] * batch.upsampled
    losses, sigma, _ = ask(batch._replace(upsampled=upsampled), network=network)
    variance = (upsampled - batch.original).square().mean((1, 2, 3)) + NEAR_ENOUGH
    expected = (sigma**2 + variance) / (sigma**2 * variance) * batch.original.square().mean((1, 2, 3))
    torch.testing.assert_close(losses, expected)


def test_the_prediction_loss_is_psnr_up_to_scale(batch: Batch) -> None:
    losses = prediction_loss(lambda low_res, margin: batch.upsampled, 4, batch)
    psnr = 10 * (4 / (batch.upsampled - batch.original).square().mean((1, 2, 3))).log10()
    torch.testing.assert_close(losses, math.log(2) - psnr * math.log(10) / 20, atol=1e-3, rtol=0)
    perfect = prediction_loss(lambda low_res, margin: batch.original, 4, batch)
    assert perfect.isfinite().all() and perfect.max() < losses.min() - 3


def test_a_detailer_is_judged_by_lpips_overshoot_and_what_repeats() -> None:
    config, random = LossConfig(perceptual=2.0, overshoot=5.0), torch.Generator().manual_seed(0)
    original = torch.rand(2, 3, 32, 32, generator=random) - 0.5
    batch = Batch(original, torch.zeros(2, 3, 8, 8), original)
    asked: list[object] = []

    def loss_of(picture: Tensor, shift: tuple[int, int] = (0, 0)) -> Tensor:
        def predict(low_res: Tensor, margin: int, detail: float) -> Tensor:
            asked.append(detail)
            return picture

        def lpips(x: Tensor, y: Tensor) -> Tensor:
            asked.append(x.shape[2:])
            return (x - y).mean((1, 2, 3)).abs()

        return detail_loss(predict, 4, config, batch, [lpips], shift)  # type: ignore[list-item]

    perfect = loss_of(original, (2, 3))
    assert asked == [1.0, (30, 29)]
    torch.testing.assert_close(perfect, torch.full((2,), math.log(NEAR_ENOUGH) / 2))
    far = loss_of(original + 2) - loss_of(original - 2)  # as far from it, and beyond it
    torch.testing.assert_close(far, torch.zeros(2), atol=0.2, rtol=0)
    near, beyond = loss_of(original.clamp(-0.1, 0.1)), loss_of(original + 0.3 * original.sign())
    assert (beyond - near > 0.01).all()

    levels = 0.1 * torch.randn(4, 4, generator=random)
    repeated = levels.repeat(8, 8).expand_as(original)
    shuffled = repeated.flatten(2)[:, :, torch.randperm(32 * 32, generator=random)].view_as(repeated)
    more = loss_of(original + repeated) - loss_of(original + shuffled)
    torch.testing.assert_close(
        more, (config.perceptual * config.screen * levels.var(correction=0)).expand(2), atol=0.02, rtol=0.1
    )


def test_a_condition_learns_what_the_low_resolution_lost(
    tiny_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By log(1 + levels), in a crop with a margin: what is beyond, and only the low resolution shows, isn't judged."""
    sizes = {"predictor_width": 4, "predictor_depth": 1, "parametrisation": "residual"}
    network, plain = (tiny_model(**sizes, predictor_condition=n) for n in (3, 0))
    crops = torch.randint(0, 256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    none = torch.zeros(2, dtype=torch.bool)
    batch = reduce(crops, 4, 16, none, none, 1.0, torch.Generator())
    batch.low_res[1] += 20 / 127.5
    said = torch.tensor([[0.5, 9, 9], [0.5, 9, 9]])
    assert network.predictor is not None
    monkeypatch.setattr(network.predictor, "condition_of", lambda *_: said)
    expected = CONDITION * torch.tensor([0.5 - math.log(1.3), math.log(21) - 0.5])  # rounding is 0.3 levels
    torch.testing.assert_close(condition_loss(network, batch), expected, atol=0.03 * CONDITION, rtol=0)
    assert not condition_loss(plain, batch).any()


# --- what is replaced


def test_regression_samples_get_the_upsampled_picture_and_the_largest_sigma(batch: Batch) -> None:
    network = replace(NETWORK, parametrisation="residual", sigma_max=2.0)
    low = replace(PLAIN, sigma_log_mean=-3.0, sigma_log_deviation=0.5)  # no other sample comes near sigma_max
    losses, sigma, asked = ask(batch, replace(low, regression=0.25), network)
    chosen = sigma == 2.0
    assert chosen.float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert torch.equal(asked["noisy"][chosen], batch.upsampled[chosen])
    assert not (asked["noisy"][~chosen] == batch.upsampled[~chosen]).any()
    variance = (batch.original - batch.upsampled)[chosen].square().mean((1, 2, 3)) + NEAR_ENOUGH
    weight = (4 + variance) / (4 * variance)
    torch.testing.assert_close(losses[chosen], weight * batch.original[chosen].square().mean((1, 2, 3)))
    assert not (ask(batch, low, network)[1] == 2.0).any()


def test_own_input_starts_from_the_upsampled_picture_where_noise_is_little(batch: Batch) -> None:
    config = replace(PLAIN, sigma_log_mean=-1.2, sigma_log_deviation=0.5, perceptual_below=0.3, regression=0.25)
    losses, sigma, without = ask(batch, config)
    own_losses, own_sigma, asked = ask(batch, replace(config, own_input=0.5))
    assert torch.equal(own_sigma, sigma), "the same noise"
    moved = (asked["noisy"] - without["noisy"]).flatten(1)
    own = moved.abs().amax(1) > 1e-6
    torch.testing.assert_close(moved[own], (batch.upsampled - batch.original)[own].flatten(1), atol=1e-6, rtol=0)
    assert sigma[own].max() < 0.3
    little = sigma < 0.3
    assert own.sum().item() / little.sum().item() == pytest.approx(0.5 / 0.75, abs=0.05)
    assert torch.equal(own_losses[~own], losses[~own])
    error = batch.original[own].square().mean((1, 2, 3))  # still of the original, weighed as without noise
    torch.testing.assert_close(own_losses[own], edm.loss_weight(torch.tensor(NETWORK.sigma_max), 0.5) * error)


def test_two_grids_are_blended(tiny_model: MakeModel) -> None:
    generator = torch.Generator().manual_seed(0)
    noisy, upsampled, low_res = (torch.rand(2, 3, side, side, generator=generator) for side in (32, 32, 8))
    sigma, asked = torch.tensor([0.1, 0.3]), []

    def denoise(x: Tensor, sigma: Tensor, low_res: Tensor, **given: Any) -> Tensor:
        asked.append((x, sigma, low_res, given))
        number = torch.arange(len(x)) >= len(x) / 2
        return x + number[:, None, None, None]

    one, two = (blended(denoise, replace(NETWORK, block_size=16, grids=count)) for count in (1, 2))
    assert one is denoise
    result = two(noisy, sigma, low_res, upsampled=upsampled, semantic=None, offset=(1, 2))
    ((x, levels, low_res_seen, given),) = asked
    for seen, picture in ((x, noisy), (given["upsampled"], upsampled)):
        assert torch.equal(seen[:2], picture)
        assert torch.equal(seen[2:], pad_by_reflection(picture, 48, 48, 10)[:, :, :32, :32])
    assert torch.equal(levels, sigma.repeat(2)) and torch.equal(low_res_seen[:2], low_res)
    assert torch.equal(low_res_seen[2:], pad_by_reflection(low_res, 12, 12, 2)[:, :, :8, :8])
    assert given["offset"] == (1, 2) and given["semantic"] is None
    share = result - noisy[:, :, :-10, :-10]  # of the second
    assert torch.allclose(share, share_of_second((22, 22), replace(NETWORK, block_size=16, grids=2)), atol=1e-6)


def test_lr_dropout_replaces_both_low_resolutions_by_clamped_noise(batch: Batch) -> None:
    _, _, asked = ask(batch, replace(PLAIN, lr_dropout=0.3))
    replaced = (asked["low_res"] != batch.low_res).flatten(1).all(1)
    assert replaced.float().mean().item() == pytest.approx(0.3, abs=0.03)
    assert torch.equal((asked["upsampled"] != batch.upsampled).flatten(1).any(1), replaced)
    assert torch.equal(asked["low_res"][~replaced], batch.low_res[~replaced])
    for noise in (asked["low_res"][replaced], asked["upsampled"][replaced]):
        assert noise.abs().max() == 1
        # Standard normal, clamped: 32 % lie on the bounds.
        assert (noise.abs() == 1).float().mean().item() == pytest.approx(0.317, abs=0.03)
        assert noise.mean().item() == pytest.approx(0, abs=0.05)


def test_lr_dropout_keeps_the_noise_levels(batch: Batch) -> None:
    _, without, asked_without = ask(batch)
    _, sigma, asked = ask(batch, replace(PLAIN, lr_dropout=0.5))
    assert torch.equal(sigma, without)
    assert torch.equal(asked["noisy"], asked_without["noisy"])


# --- positions and direction


def test_offsets_are_drawn_apart_up_to_seven_crops() -> None:
    small = Batch(torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 16, 16))
    network = replace(NETWORK, rope_side=8 * 4)  # 8 crops of 4 patches
    offsets = [ask(small, network=network, seed=seed)[2]["offset"] for seed in range(600)]
    for axis in (0, 1):
        assert {offset[axis] for offset in offsets} == set(range(7 * 4 + 1))
    assert len({row - column for row, column in offsets}) > 40


@pytest.mark.parametrize("direction", ["lt", "rb"])
def test_the_direction_reaches_the_network(batch: Batch, direction: Any) -> None:
    assert ask(batch, replace(PLAIN, direction=direction))[2]["direction"] == direction


def test_lpips_counts_below_its_noise_level_and_on_a_detailers_picture(batch: Batch) -> None:
    few = Batch(*(t[:64] for t in batch[:3]))
    config = replace(PLAIN, perceptual=2.0, perceptual_below=0.3, screen=0.0, regression=0.25)
    seen: list[tuple[Tensor, Tensor]] = []

    def lpips(x: Tensor, original: Tensor) -> Tensor:
        seen.append((x, original))
        return torch.full((len(x),), 0.5)

    def losses(config: LossConfig, judges: Sequence[Lpips], detail: float = 0) -> tuple[Tensor, Tensor]:
        return training_loss(Recorder(), NETWORK, config, few, torch.Generator().manual_seed(1), None, judges, detail)

    without, sigma = losses(replace(config, perceptual=0.0), [lpips])
    assert not seen
    with_it, _ = losses(config, [lpips])
    with_two, _ = losses(config, [lpips, lambda x, original: torch.full((len(x),), 0.25)])
    judged = sigma < 0.3
    assert 0 < judged.sum() < len(judged)
    assert torch.allclose(with_it, without + judged * sigma / 0.3)
    assert torch.allclose(with_two, without + judged * 1.5 * sigma / 0.3)
    x, original = seen[0]
    assert len(x) == judged.sum() and x.shape == original.shape
    shown = few.original[judged] / 2 + 0.5
    top, left = (4 - side for side in original.shape[2:])
    assert torch.equal(original, shown[:, :, top:, left:]) and torch.all(x == 0.5), "pictures in 0..1"
    assert torch.equal(losses(config, [])[0], without)
    detailed, _ = losses(config, [lpips], 0.7)
    no_noise = sigma == NETWORK.sigma_max
    assert 0 < no_noise.sum() < (~judged).sum()
    assert torch.allclose(detailed, with_it + no_noise * 0.7)
    repeated, _ = losses(replace(config, screen=1.0), [lpips])  # what one low-resolution pixel holds repeats
    assert torch.equal(repeated > with_it, judged)


def test_overshoot_is_what_lies_beyond_the_surroundings() -> None:
    original = torch.zeros(1, 1, 32, 40)
    original[0, 0, 12, 20] = 1
    bright, dark = (overshoot(x, original, 8) for x in (torch.full_like(original, 1.25), -original))
    near = torch.full((32, 40), 1.25)
    near[4:21, 12:29] = 0.25
    assert torch.equal(bright[0, 0], near)
    assert torch.equal(dark, original)


@pytest.mark.parametrize("power", [1, 2])
def test_overshoot_counts_as_configured(batch: Batch, power: int) -> None:
    above = batch._replace(original=batch.original / 4 + 0.5)  # zeros, the answer, lie below all of it
    config = replace(PLAIN, weight="v", power=power)
    without, sigma, _ = ask(above, config)
    losses, _, _ = ask(above, replace(config, overshoot=3.0))
    below = above.original.amin((2, 3)).pow(power).mean(1)
    assert torch.allclose(losses - without, 3 * (sigma**2 + 1) / sigma**2 * below, rtol=1e-3)


def test_directions_are_trained_apart(tiny_model: MakeModel) -> None:
    generator = torch.Generator().manual_seed(0)
    draw = [torch.rand(1, 3, side, side, generator=generator) for side in (32, 8, 32)]
    crop, sigma = Batch(*draw), torch.tensor([0.4])
    model = tiny_model()
    lt, rb = (
        loss_at(model.denoise, model.config, replace(PLAIN, direction=direction), crop, sigma, crop.original)[0]
        for direction in ("lt", "rb")
    )
    assert abs(lt.item() / rb.item() - 1) > 1e-4


# --- the meter


def test_losses_are_told_apart_by_noise_level() -> None:
    config = LossConfig(sigma_log_mean=math.log(0.1), sigma_log_deviation=math.log(10) / 0.6745)
    meter = LossMeter(config, sigma_max=2.0, device=torch.device("cpu"))  # edges 0.01, 0.1, 1
    meter.add(torch.tensor([1.0, 3.0, 10.0]), torch.tensor([0.005, 0.009, 0.05]))
    meter.add(torch.tensor([20.0, 30.0, 50.0]), torch.tensor([0.5, 1.5, 2.0]))
    means = meter.means(meter.sums)
    assert means == {
        "loss": pytest.approx(19.0),
        "loss_below_0.01": pytest.approx(2.0),
        "loss_0.01_0.1": pytest.approx(10.0),
        "loss_0.1_1": pytest.approx(20.0),
        "loss_above_1": pytest.approx(30.0),
        "loss_mean": pytest.approx(50.0),
    }
    meter.sums.zero_()
    meter.add(torch.tensor([4.0]), torch.tensor([0.05]))
    means = meter.means(meter.sums)
    assert means["loss"] == means["loss_0.01_0.1"] == 4
    assert math.isnan(means["loss_below_0.01"])


def test_levels_of_the_meter_hold_a_quarter_each(batch: Batch) -> None:
    losses, sigma, _ = ask(batch)
    meter = LossMeter(PLAIN, sigma_max=NETWORK.sigma_max, device=torch.device("cpu"))
    meter.add(losses, sigma)
    assert (meter.sums[1, :4] / COUNT).tolist() == pytest.approx([0.25] * 4, abs=0.03)
    assert meter.sums[0].sum().item() == pytest.approx(losses.sum().item(), rel=1e-4)


def test_the_meter_keeps_no_graph() -> None:
    meter = LossMeter(PLAIN, sigma_max=2.0, device=torch.device("cpu"))
    meter.add(torch.ones(2, requires_grad=True) * 2, torch.tensor([0.1, 0.2]))
    assert not meter.sums.requires_grad


# --- preconditionings

SIGMAS = torch.tensor([0.002, 0.1, 0.7, 1.0, 5.0, 40.0])


def test_v_is_what_generative_models_calls_v_scaling(assert_close: CloseTo) -> None:
    total = SIGMAS**2 + 1
    expected = (1 / total, -SIGMAS / total.sqrt(), 1 / total.sqrt(), 0.25 * SIGMAS.log())  # told EDM's c_noise
    for found, value in zip(preconditioning.v(SIGMAS, 1.0), expected, strict=True):
        assert_close(found, value, 1e-6)


def test_epsilon_is_what_generative_models_calls_eps_scaling(assert_close: CloseTo) -> None:
    expected = (torch.ones(6), -SIGMAS, 1 / (SIGMAS**2 + 1).sqrt(), SIGMAS)
    for found, value in zip(preconditioning.epsilon(SIGMAS, 1.0), expected, strict=True):
        assert_close(found, value, 1e-6)


def test_a_perfect_answer_gives_back_the_picture(assert_close: CloseTo) -> None:
    generator = torch.Generator().manual_seed(0)
    picture, noise = (torch.randn(6, 50, generator=generator, dtype=torch.float64) for _ in range(2))
    sigma = SIGMAS.double()[:, None]
    noisy = picture + sigma * noise
    alpha, spread = 1 / (1 + sigma**2).sqrt(), sigma / (1 + sigma**2).sqrt()
    answers = {"v": alpha * noise - spread * picture, "epsilon": noise}  # arXiv 2202.00512, appendix D; DDPM
    for name, answer in answers.items():
        c_skip, c_out, _, _ = preconditioning.PRECONDITIONINGS[name](sigma, 1.0)
        assert_close(c_skip * noisy + c_out * answer, picture, 1e-10)


def test_every_preconditioning_gives_the_network_unit_variance() -> None:
    for name, deviation in itertools.product(("edm", "v", "epsilon"), (0.1, 0.5, 1.0)):
        c_in = preconditioning.PRECONDITIONINGS[name](SIGMAS, deviation)[2]
        torch.testing.assert_close(c_in**2 * (SIGMAS**2 + deviation**2), torch.ones(6))


def test_no_preconditioning_is_told_less_than_the_smallest_noise() -> None:
    floor = torch.tensor([preconditioning.SIGMA_FLOOR])
    for function in preconditioning.PRECONDITIONINGS.values():
        assert function(torch.zeros(1), 0.5) == function(floor, 0.5)


def with_preconditioning(model: InfDiT, name: Preconditioning) -> InfDiT:
    other = copy.deepcopy(model)
    other.config = replace(model.config, preconditioning=name)
    return other


@pytest.mark.parametrize("parametrisation", ["picture", "residual"])
def test_v_denoises_as_edm_with_the_answer_negated(tiny_model: MakeModel, parametrisation: str) -> None:
    generator = torch.Generator().manual_seed(4)
    noisy, low_res = (torch.rand(2, 3, side, side, generator=generator) * 2 - 1 for side in (32, 8))
    sigma = torch.tensor([0.05, 1.3])
    edm = tiny_model(parametrisation=parametrisation)
    v = with_preconditioning(edm, "v")
    assert not torch.allclose(v.denoise(noisy, sigma, low_res), edm.denoise(noisy, sigma, low_res), atol=0.01)
    with torch.no_grad():
        v.final.weight.neg_()
        v.final.bias.neg_()
    assert torch.equal(v.denoise(noisy, sigma, low_res), edm.denoise(noisy, sigma, low_res))


def test_epsilon_starts_from_the_noisy_picture_and_takes_noise_away(tiny_model: MakeModel) -> None:
    generator = torch.Generator().manual_seed(4)
    noisy, low_res = (torch.rand(1, 3, side, side, generator=generator) * 2 - 1 for side in (32, 8))
    model = with_preconditioning(tiny_model(), "epsilon")
    with torch.no_grad():
        model.final.weight.zero_()
        model.final.bias.fill_(0.5)  # the noise that it sees
    torch.testing.assert_close(model.denoise(noisy, 0.2, low_res), noisy - 0.2 * 0.5)


# --- memory


def test_recomputed_activations_give_the_same_gradients(tiny_model: MakeModel) -> None:
    generator = torch.Generator().manual_seed(0)
    crop = Batch(*(torch.rand(2, 3, side, side, generator=generator) * 2 - 1 for side in (32, 8, 32)))
    gradients, calls = [], []
    for checkpointing in (False, True):
        model = tiny_model().requires_grad_(True)
        model.checkpointing = checkpointing
        count = itertools.count(1)
        model.layers[1].register_forward_pre_hook(lambda *_, count=count: calls.append(next(count)))
        config = replace(PLAIN, lr_dropout=0.5)
        losses, _ = training_loss(model.denoise, model.config, config, crop, torch.Generator().manual_seed(1))
        losses.mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert calls == [1, 1, 2]  # once more in the backward pass
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


@pytest.mark.parametrize("dropout", [0.0, 1.0])
def test_clip_sees_what_the_network_is_given(tiny_model: MakeModel, dropout: float) -> None:
    generator = torch.Generator().manual_seed(0)
    crop = Batch(*(torch.rand(2, 3, side, side, generator=generator) * 2 - 1 for side in (32, 8, 32)))
    seen, given = [], []

    def look(x: Tensor) -> Tensor:
        seen.append(x)
        return torch.full((2, 8), 0.5)

    def denoise(noisy: Tensor, sigma: Tensor, low_res: Tensor, **options: Any) -> Tensor:
        given.append((low_res, options["semantic"]))
        return noisy

    config = replace(PLAIN, lr_dropout=dropout)
    clip: Any = SimpleNamespace(encode_image=look)
    training_loss(denoise, tiny_model().config, config, crop, torch.Generator().manual_seed(1), clip)
    ((low_res, semantic),) = given
    assert torch.equal(seen[0], low_res)
    assert torch.equal(seen[0], crop.low_res) == (dropout == 0)
    assert torch.equal(semantic, torch.full((2, 8), 0.5))
