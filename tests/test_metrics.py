"""Metrics against values that can be worked out otherwise."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from infdit_core.metrics import load_lpips, luma, psnr_y, seam_energy, ssim_y
from infdit_core.weights import WeightsError


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
    later = torch.roll(step, (14, 14), (2, 3))
    assert seam_energy(later, 32) == pytest.approx(1, abs=0.05)
    assert seam_energy(later, 32, (18,)) > 1.1
    both = (seam_energy(step, 32) + seam_energy(step, 32, (18,))) / 2
    assert seam_energy(step, 32, (0, 18)) == pytest.approx(both)
    with pytest.raises(ValueError, match="no border"):
        seam_energy(x[..., :32, :32], 32)


@pytest.mark.parametrize("network", ["alexnet", "vgg16"])
def test_lpips_is_a_distance_that_gradients_pass(network: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    save_file(request.getfixturevalue(network), tmp_path / "lpips.safetensors")
    lpips = load_lpips(tmp_path / "lpips.safetensors")
    x = torch.cat([noise(), noise(1)])
    near, far = x + 0.05 * torch.cat([noise(2), noise(3)]), 1 - x
    assert torch.equal(lpips(x, x), torch.zeros(2))
    assert torch.all(lpips(near, x) < lpips(far, x)) and torch.all(lpips(near, x) > 0)
    assert torch.allclose(lpips(near, x), torch.cat([lpips(near[:1], x[:1]), lpips(near[1:], x[1:])]), atol=1e-6)
    flat = torch.full((1, 3, 64, 64), 0.5, requires_grad=True)
    lpips(flat, noise().new_zeros(1, 3, 64, 64)).sum().backward()
    assert flat.grad is not None and flat.grad.isfinite().all()


@pytest.mark.parametrize(("network", "name"), [("alexnet", "AlexNet"), ("vgg16", "VGG16")])
def test_lpips_wants_its_own_file(network: str, name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    whole = request.getfixturevalue(network)
    short = {key: weight for key, weight in whole.items() if key != "lin3.model.1.weight"}
    save_file(short, tmp_path / "short.safetensors")
    with pytest.raises(WeightsError, match=f"{name}.*lin3"):
        load_lpips(tmp_path / "short.safetensors")
