"""Samplers against a problem solved on paper: pixels drawn from a Gaussian, whose ideal denoiser is a formula."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from infdit_core.diffusion import edm
from infdit_core.diffusion.samplers import SAMPLERS, ddim, dpmpp_2m, euler, heun

MEAN, DEVIATION = 0.3, 0.5
DETERMINISTIC = {
    "heun": heun,
    "euler": euler,
    "dpmpp_2m": dpmpp_2m,
    "ddim": lambda *args, **options: ddim(*args, s_noise=0.0, **options),
}

CloseTo = Callable[..., None]


def ideal(x: Tensor, sigma: Tensor) -> Tensor:
    """E[clean | x] for pixels drawn from N(MEAN, DEVIATION^2)."""
    return MEAN + DEVIATION**2 / (DEVIATION**2 + sigma**2) * (x - MEAN)


def exact(x: Tensor, start: float, end: float) -> Tensor:
    """Where the probability flow ODE dx/dsigma = (x - D) / sigma takes x from one noise level to another."""
    return MEAN + (x - MEAN) * math.sqrt((DEVIATION**2 + end**2) / (DEVIATION**2 + start**2))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Recorder:
    """A denoiser that remembers what it was asked."""

    def __init__(self, denoise: Callable[[Tensor, Tensor], Tensor] = ideal) -> None:
        self.denoise = denoise
        self.asked: list[tuple[Tensor, Tensor]] = []
        self.answers: list[Tensor] = []

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        self.asked.append((x.clone(), sigma))
        self.answers.append(self.denoise(x, sigma))
        return self.answers[-1]


# --- convergence


def error(sampler: Callable[..., Tensor], steps: int) -> float:
    sigmas = edm.sigmas(steps + 1, 0.05, 10.0)[:-1]  # without the step to 0, which is exact for all samplers
    x = MEAN + 10.0 * noise(1, 3, 4, 4)
    return (sampler(ideal, x, sigmas) - exact(x, 10.0, 0.05)).abs().max().item()


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("ddim", 1), ("heun", 2), ("dpmpp_2m", 2)], ids=str)
def test_order_of_convergence(name: str, order: int) -> None:
    """A second-order sampler that lost its order needs many times the steps for the same picture."""
    errors = [error(DETERMINISTIC[name], steps) for steps in (10, 20, 40, 80)]
    rates = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert rates[-1] == pytest.approx(order, abs=0.25), (errors, rates)
    assert all(rate > order - 0.4 for rate in rates), (errors, rates)


@pytest.mark.parametrize("name", ["heun", "dpmpp_2m"])
def test_second_order_pays(name: str) -> None:
    """As above, at the number of steps that people use."""
    assert error(DETERMINISTIC[name], 20) < error(euler, 20) / 4


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_down_to_zero(name: str) -> None:
    """The last step ends in a picture without noise."""
    x = MEAN + 40.0 * noise(1, 3, 4, 4)
    found = DETERMINISTIC[name](ideal, x, edm.sigmas(200))
    assert (found - exact(x, 40.0, 0.0)).abs().max() < 0.02


@pytest.mark.parametrize("name", DETERMINISTIC)
@pytest.mark.parametrize("steps", [1, 2, 3, 10])
def test_a_sure_network_is_believed(assert_close: CloseTo, name: str, steps: int) -> None:
    """If the network always answers the same picture, that picture comes out, to the last bit of colour."""
    picture = noise(2, 3, 4, 4, seed=1)
    start = picture + 40.0 * noise(2, 3, 4, 4)
    found = DETERMINISTIC[name](lambda x, sigma: picture, start, edm.sigmas(steps))
    assert_close(found, picture, 1e-5)


def test_ddim_without_fresh_noise_is_euler(assert_close: CloseTo) -> None:
    """s_noise = 0 makes DDIM deterministic: Euler's step, written another way."""
    x, sigmas = MEAN + 10.0 * noise(2, 3, 4, 4), edm.sigmas(7, 0.01, 10.0)
    assert_close(ddim(ideal, x, sigmas, s_noise=0.0), euler(ideal, x, sigmas), 1e-5)


# --- noise


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_fresh_noise_of_ddim_keeps_its_level(share: float) -> None:
    """Too much or too little noise for the level that the network is told shows as grain, or as blur."""
    generator = torch.Generator().manual_seed(3)

    def draw(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=generator)

    recorder = Recorder(lambda x, sigma: torch.zeros_like(x))
    sigmas = edm.sigmas(6, 0.1, 10.0)
    ddim(recorder, 10.0 * noise(1, 3, 128, 128), sigmas, s_noise=share, noise=draw)
    for x, sigma in recorder.asked:
        assert x.std().item() == pytest.approx(sigma.item(), rel=0.02)


def test_churn_keeps_the_distribution() -> None:
    """As above for the stochastic sampler: contrast and colour of many pictures stay right."""
    generator = torch.Generator().manual_seed(4)

    def draw(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=generator)

    start = MEAN + math.hypot(10.0, DEVIATION) * noise(1, 3, 128, 128)
    found = heun(ideal, start, edm.sigmas(40, 0.01, 10.0), s_churn=20.0, noise=draw)
    assert found.mean().item() == pytest.approx(MEAN, abs=0.01)
    assert found.std().item() == pytest.approx(DEVIATION, rel=0.02)


def test_churn_between_its_limits(assert_close: CloseTo) -> None:
    """s_tmin, s_tmax, s_noise and the cap on gamma (algorithm 2): noise where it was asked for, and as much."""
    sigmas = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.0])
    x = noise(1, 3, 4, 4)
    drawn: list[Tensor] = []

    def draw(like: Tensor) -> Tensor:
        drawn.append(noise(*like.shape, seed=len(drawn) + 1))
        return drawn[-1]

    recorder = Recorder(lambda x, sigma: torch.zeros_like(x))
    reports: list[dict[str, Any]] = []
    heun(recorder, x, sigmas, s_churn=100.0, s_tmin=2.0, s_tmax=4.0, s_noise=1.5, noise=draw, callback=reports.append)
    raised = [report["sigma"].item() for report in reports]
    assert raised == pytest.approx([8.0, 4.0 * math.sqrt(2), 2.0 * math.sqrt(2), 1.0])
    assert len(drawn) == 2
    # With an answer of zero a step to sigma' scales x by sigma' / sigma; from 8 to 4 by a half.
    added = 1.5 * drawn[0] * math.sqrt((4.0 * math.sqrt(2)) ** 2 - 4.0**2)
    assert_close(reports[1]["x"], x / 2 + added, 1e-5)


@pytest.mark.parametrize(
    ("name", "options", "draws"),
    [
        ("heun", {}, 0),
        ("heun", {"s_churn": 4.0}, 5),
        ("euler", {}, 0),
        ("euler", {"s_churn": 4.0}, 5),
        ("ddim", {}, 5),
        ("dpmpp_2m", {}, 0),
    ],
)
def test_noise_comes_from_the_caller(name: str, options: dict[str, float], draws: int) -> None:
    """The same seed would give another picture, and the user's other nodes other pictures too."""
    calls: list[torch.Size] = []

    def draw(x: Tensor) -> Tensor:
        calls.append(x.shape)
        return noise(*x.shape, seed=len(calls))

    before = torch.get_rng_state()
    sampler, x, sigmas = SAMPLERS[name], 10.0 * noise(2, 3, 4, 4), edm.sigmas(5, 0.01, 10.0)
    first = sampler(ideal, x, sigmas, noise=draw, **options)
    assert calls == [x.shape] * draws
    assert torch.equal(torch.get_rng_state(), before)

    calls.clear()
    assert torch.equal(sampler(ideal, x, sigmas, noise=draw, **options), first)
    other = sampler(ideal, x, sigmas, noise=lambda x: -noise(*x.shape, seed=99), **options)
    assert torch.equal(other, first) == (draws == 0)


# --- the signature


@pytest.mark.parametrize("name", SAMPLERS)
def test_callback(name: str) -> None:
    """Previews and progress: k-diffusion's dict, every step once, with what the network was asked and answered."""
    recorder = Recorder()
    reports: list[dict[str, Any]] = []
    x, sigmas = 10.0 * noise(1, 3, 4, 4), edm.sigmas(4, 0.01, 10.0)
    SAMPLERS[name](recorder, x, sigmas, noise=torch.zeros_like, callback=reports.append)
    assert [report["i"] for report in reports] == [0, 1, 2, 3]
    firsts = recorder.asked[::2] if name == "heun" else recorder.asked  # heun asks a second time in every step
    answers = recorder.answers[::2] if name == "heun" else recorder.answers
    for report, (asked_x, asked_sigma), answer, sigma in zip(reports, firsts, answers, sigmas[:-1], strict=True):
        assert report.keys() == {"x", "i", "sigma", "denoised"}
        assert torch.equal(report["x"], asked_x)
        assert report["sigma"] == asked_sigma == sigma
        assert torch.equal(report["denoised"], answer)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_callback_can_stop(name: str) -> None:
    """Cancel: what a callback raises ends the run, before another evaluation is paid for."""
    recorder = Recorder()

    def callback(report: dict[str, Any]) -> None:
        if report["i"] == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        SAMPLERS[name](recorder, noise(1, 3, 4, 4), edm.sigmas(4), noise=torch.zeros_like, callback=callback)
    assert len(recorder.asked) == (3 if name == "heun" else 2)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 6])
def test_number_of_evaluations(name: str, steps: int) -> None:
    """Evaluations are the cost, and the progress bar counts on their number."""
    recorder = Recorder()
    SAMPLERS[name](recorder, noise(1, 3, 4, 4), edm.sigmas(steps), noise=torch.zeros_like)
    assert len(recorder.asked) == (2 * steps - 1 if name == "heun" else steps)
    assert all(sigma.ndim == 0 and sigma > 0 for _, sigma in recorder.asked)


@pytest.mark.parametrize("name", SAMPLERS)
def test_one_step_is_the_network_s_answer(assert_close: CloseTo, name: str) -> None:
    """steps = 1, the fastest setting."""
    x = 40.0 * noise(1, 3, 4, 4)
    share = {"s_noise": 0.0} if name == "ddim" else {}
    found = SAMPLERS[name](ideal, x, edm.sigmas(1), **share)
    assert_close(found, ideal(x, torch.tensor(40.0)), 1e-5)


@pytest.mark.parametrize("name", DETERMINISTIC)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_state_is_float32(name: str, dtype: torch.dtype) -> None:
    """Steps summed up in bfloat16 leave bands in skies."""
    x = (10.0 * noise(1, 3, 4, 4)).to(dtype)
    recorder = Recorder(lambda x, sigma: ideal(x, sigma).bfloat16())  # as a network in bfloat16 answers
    found = DETERMINISTIC[name](recorder, x, edm.sigmas(5, 0.01, 10.0).double())
    assert found.dtype == torch.float32
    assert {t.dtype for asked in recorder.asked for t in asked} == {torch.float32}
    assert torch.equal(recorder.asked[0][0], x.float())


@pytest.mark.parametrize("name", SAMPLERS)
def test_inputs_stay_what_they_were(name: str) -> None:
    """A caller's noise and schedule would be written over, and its next run differ."""
    x, sigmas = 10.0 * noise(1, 3, 4, 4), edm.sigmas(5)
    kept = x.clone(), sigmas.clone()
    SAMPLERS[name](ideal, x, sigmas, noise=torch.zeros_like)
    assert torch.equal(x, kept[0]) and torch.equal(sigmas, kept[1])


# --- schedules


@pytest.mark.parametrize("n", [1, 2, 7, 40])
def test_schedule_falls_from_end_to_end(n: int) -> None:
    """A level out of order, or noise left at the end."""
    sigmas = edm.sigmas(n, 0.05, 2.0)
    assert sigmas.shape == (n + 1,) and sigmas.dtype == torch.float32
    assert (sigmas.diff() < 0).all()
    assert sigmas[0].item() == pytest.approx(2.0) and sigmas[-1] == 0
    assert n == 1 or sigmas[-2].item() == pytest.approx(0.05)


@pytest.mark.parametrize("arguments", [(0,), (-1,), (5, 0.0, 1.0), (5, -0.1, 1.0), (5, 2.0, 1.0)])
def test_schedules_that_cannot_be(arguments: tuple[Any, ...]) -> None:
    """A wrong setting would come out as a black picture of NaN."""
    with pytest.raises(ValueError, match="schedule needs"):
        edm.sigmas(*arguments)
