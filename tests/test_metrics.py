"""Metrics against values that can be worked out otherwise."""

import math

import pytest
import torch
from torch import Tensor

from infdit_core.metrics import luma, psnr_y, seam_energy, ssim_y


def noise(seed: int = 0) -> Tensor:
    return torch.rand(1, 3, 48, 64, generator=torch.Generator().manual_seed(seed))


def test_luma_spans_16_to_235() -> None:
    black_white = torch.stack([torch.zeros(3, 1, 1), torch.ones(3, 1, 1)])
    assert luma(black_white).flatten().tolist() == pytest.approx([16, 235], abs=1e-3)


def test_psnr_of_a_constant_error() -> None:
    x = noise() * 0.5
    # 0.1 on all channels is 21.9 levels of Y.
    assert psnr_y(x + 0.1, x) == pytest.approx(20 * math.log10(255 / 21.9), abs=1e-3)


def test_psnr_ignores_the_border() -> None:
    x = noise()
    y = x.clone()
    y[..., :4, :] = 0
    y[..., 30, 30] += 0.1
    assert psnr_y(y, x) > 40 > psnr_y(y, x, crop=0)


def test_ssim_is_one_for_equal_and_falls() -> None:
    x = noise()
    values = [ssim_y(x * (1 - share) + noise(1) * share, x) for share in (0, 0.1, 0.5, 1)]
    assert values[0] == pytest.approx(1) and values == sorted(values, reverse=True) and values[-1] < 0.1
    # Without structure only the means count: (2 a b + c1) / (a^2 + b^2 + c1) of the lumas.
    flat = torch.full((1, 3, 32, 32), 0.4)
    a, b, c1 = float(luma(flat).mean()), float(luma(flat + 0.2).mean()), (0.01 * 255) ** 2
    assert ssim_y(flat + 0.2, flat) == pytest.approx((2 * a * b + c1) / (a * a + b * b + c1), abs=1e-4)


def test_seams_show_and_plain_noise_does_not() -> None:
    x = torch.rand(1, 3, 512, 512, generator=torch.Generator().manual_seed(0))
    assert seam_energy(x, 32) == pytest.approx(1, abs=0.05)
    step = x + 0.2 * ((torch.arange(512) // 32) % 2)
    assert seam_energy(step, 32) > 1.1
    assert seam_energy(step.transpose(2, 3), 32) > 1.1
    with pytest.raises(ValueError, match="no border"):
        seam_energy(x[..., :32, :32], 32)
