"""EDM: noise schedule and loss weighting (Karras et al. 2022, arXiv 2206.00364)."""

import torch
from torch import Tensor


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


def loss_weight(sigma: Tensor, sigma_data: float | Tensor) -> Tensor:
    """lambda(sigma) = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 (table 1)."""
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
