"""EDM: noise schedule, preconditioning and loss weighting (Karras et al. 2022, arXiv 2206.00364)."""

import torch
from torch import Tensor

SIGMA_FLOOR = 0.001  # the network never sees less noise than this


def sigmas(n: int, sigma_min: float = 0.002, sigma_max: float = 40.0, rho: float = 7.0) -> Tensor:
    """Noise levels of an n-step run (eq. 5): n + 1 fp32 values, from sigma_max down to sigma_min, the last 0.

    n = 1 gives [sigma_max, 0]. Raises ValueError for n < 1 or an empty range.
    """
    if n < 1:
        raise ValueError(f"a schedule needs at least 1 step, not {n}")
    if not 0 < sigma_min <= sigma_max:
        raise ValueError(f"a schedule needs 0 < sigma_min <= sigma_max, not {sigma_min} and {sigma_max}")
    ramp = torch.linspace(0, 1, n)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return torch.cat([(high + ramp * (low - high)) ** rho, torch.zeros(1)])


def preconditioning(sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(c_skip, c_out, c_in, c_noise) of table 1, each of sigma's shape; sigma is clamped below at SIGMA_FLOOR."""
    sigma = sigma.clamp(min=SIGMA_FLOOR)
    total = sigma**2 + sigma_data**2
    return sigma_data**2 / total, sigma * sigma_data / total.sqrt(), 1 / total.sqrt(), 0.25 * sigma.log()


def loss_weight(sigma: Tensor, sigma_data: float) -> Tensor:
    """lambda(sigma) = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 (table 1)."""
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
