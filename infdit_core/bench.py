"""One evaluation of a random-weight network, whole and streamed: time, rate and memory."""

import multiprocessing
import statistics
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .infdit.config import CHANNELS, InfDiTConfig
from .infdit.model import InfDiT
from .memory import peak_memory, reset_peak_memory, resident_memory

NETWORKS = {
    "nano": InfDiTConfig(hidden_size=256, num_layers=6, num_heads=4, block_size=32),
    "medium": InfDiTConfig(hidden_size=256, num_layers=6, num_heads=4),
    "published": InfDiTConfig(),
}


class Case(NamedTuple):
    """A picture of width x height and the blocks a step, None for the whole picture."""

    width: int
    height: int
    tile: tuple[int, int] | None


class Result(NamedTuple):
    case: Case
    seconds: float  # median
    flops: float  # of the model, a multiply-add is two
    share_of_matmul: float  # median of the rounds, each against the matmul measured beside it
    matmul_flops_per_second: float  # median
    peak_bytes: int  # above the loaded model, pictures included
    picture_bytes: int  # of these, the noisy, the upsampled and the estimated picture


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating point operations a second of a matrix product large enough to fill the device, median of five."""
    side = 8192 if device.type == "cuda" else 2048
    a = torch.ones(side, side, device=device, dtype=dtype)
    return 2 * side**3 / statistics.median(_seconds(lambda: a @ a, device) for _ in range(5))


def run(
    network: str, cases: list[Case], *, device: torch.device, dtype: torch.dtype, rounds: int = 3, seed: int = 0
) -> list[Result]:
    """Time all cases in turn, `rounds` times after a warm-up, beside a matmul; memory each in a process of its own."""
    model = _model(network, device, dtype, seed)
    pictures = {case: _pictures(model.config, case) for case in cases}
    seconds: dict[Case, list[float]] = {case: [] for case in cases}
    rates: dict[Case, list[float]] = {case: [] for case in cases}
    for round_number in range(rounds + 1):
        for case in cases:
            rate = matmul_rate(device, dtype)
            noisy, low_res = pictures[case]
            took = _seconds(lambda n=noisy, lr=low_res, t=case.tile: model.denoise(n, 1.0, lr, tile=t), device)
            if round_number:
                seconds[case].append(took)
                rates[case].append(rate)
    results = []
    for case in cases:
        flops = model.config.evaluation_flops(case.width, case.height)
        shares = [flops / took / rate for took, rate in zip(seconds[case], rates[case], strict=True)]
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            peak = pool.apply(_peak, (network, case, str(device), dtype, torch.get_num_threads(), seed))
        median = statistics.median
        pictures_bytes = 3 * 4 * CHANNELS * case.width * case.height
        results.append(
            Result(case, median(seconds[case]), flops, median(shares), median(rates[case]), peak, pictures_bytes)
        )
    return results


def _model(network: str, device: torch.device | str, dtype: torch.dtype, seed: int) -> InfDiT:
    model = InfDiT(NETWORKS[network], device=device, dtype=dtype)
    model.initialise(torch.Generator(device).manual_seed(seed))
    return model.eval().requires_grad_(False)


def _pictures(config: InfDiTConfig, case: Case) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    low_res = torch.rand(1, 3, case.height // config.scale, case.width // config.scale, generator=generator) * 2 - 1
    return torch.randn(1, 3, case.height, case.width, generator=generator), low_res


def _seconds(action: Any, device: torch.device) -> float:
    start = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _peak(network: str, case: Case, device: str, dtype: torch.dtype, threads: int, seed: int) -> int:
    torch.set_num_threads(threads)
    where = torch.device(device)
    model = _model(network, where, dtype, seed)
    warm_up = Case(model.config.block_size, model.config.block_size, None)
    model.denoise(_pictures(model.config, warm_up)[0], 1.0, _pictures(model.config, warm_up)[1])
    before = resident_memory(where)
    reset_peak_memory(where)
    noisy, low_res = _pictures(model.config, case)
    model.denoise(noisy, 1.0, low_res, tile=case.tile)
    return peak_memory(where) - before
