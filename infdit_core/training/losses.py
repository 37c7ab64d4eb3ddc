"""The denoising loss, and how it is weighted over noise levels."""

import torch
from torch import Tensor


def unit_weight(sigma: Tensor) -> Tensor:
    return torch.ones_like(sigma)


def epsilon_weight(sigma: Tensor) -> Tensor:
    """1 / sigma^2: an error of the predicted unit noise counts the same at every level."""
    return sigma**-2


def v_weight(sigma: Tensor) -> Tensor:
    """EDM's weight at sigma_data 1."""
    return (sigma**2 + 1) / sigma**2


def denoising_loss(denoised: Tensor, original: Tensor, weight: Tensor, power: int = 2) -> Tensor:
    """weight * mean |denoised - original|^power per picture: (B, C, H, W) twice, (B,) -> (B,)."""
    return weight * (denoised - original).abs().pow(power).flatten(1).mean(1)
