"""How near a picture is to its original, and whether block borders show."""

import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .weights import WeightsError, open_weights


def luma(x: Tensor) -> Tensor:
    """(B, 3, H, W) RGB in 0..1 -> (B, 1, H, W) Y of BT.601 in 16..235, the scale that super-resolution papers use."""
    weights = torch.tensor([65.481, 128.553, 24.966], dtype=x.dtype, device=x.device)
    return 16 + (x * weights[:, None, None]).sum(1, keepdim=True)


def psnr_y(x: Tensor, original: Tensor, crop: int = 4) -> float:
    """Peak signal-to-noise ratio of Y in dB, `crop` pixels cut off every side. (1, 3, H, W) in 0..1, both."""
    difference = _cropped(luma(x), crop) - _cropped(luma(original), crop)
    return float(10 * torch.log10(255**2 / difference.square().mean()))


def ssim_y(x: Tensor, original: Tensor, crop: int = 4) -> float:
    """Structural similarity of Y, Gaussian window of 11 and deviation 1.5 (Wang et al. 2004); arguments as psnr_y."""
    a, b = (_cropped(luma(t.double()), crop) for t in (x, original))
    if min(a.shape[2:]) < 11:
        raise ValueError(f"SSIM needs pictures of at least {11 + 2 * crop} pixels a side, not {tuple(x.shape[2:])}")
    window = torch.exp(-((torch.arange(11, dtype=a.dtype, device=a.device) - 5) ** 2) / (2 * 1.5**2))
    window = window / window.sum()

    def blur(t: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(t, window[None, None, None]), window[None, None, :, None])

    mean_a, mean_b = blur(a), blur(b)
    variance_a, variance_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = ((2 * mean_a * mean_b + c1) * (2 * covariance + c2)) / (
        (mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2)
    )
    return float(similarity.mean())


def seam_energy(x: Tensor, block: int, befores: Sequence[int] = (0,), grid: int = 4) -> float:
    """Mean squared step of Y across block borders over that elsewhere; 1 where borders don't show. (1, 3, H, W).

    block: pixels of a block's side. befores: for every grid of blocks, how many pixels of one come before the picture;
    the mean of all.
    """
    energies = []
    for before in befores:
        at_borders, elsewhere = border_steps(x, block, before, grid)
        energies.append(at_borders / max(elsewhere, 1e-12))
    return sum(energies) / len(energies)


def border_steps(x: Tensor, block: int, before: int = 0, grid: int = 4) -> tuple[float, float]:
    """Mean squared step of Y across block borders, and elsewhere, of (1, 3, H, W): what `seam_energy` divides.

    Raises ValueError where no border crosses the picture.
    Elsewhere: by multiples of `grid` pixels, the scale, away. An enlarged picture's steps differ by where they lie
    between two low-resolution pixels (bicubic's by a third).
    """
    y = luma(x)
    on, elsewhere = [], []
    for axis in (2, 3):
        steps = y.diff(dim=axis).square().mean(dim=(0, 1, 5 - axis))
        place = torch.arange(1, len(steps) + 1) + before
        on.append(steps[place % block == 0])
        elsewhere.append(steps[(place % block != 0) & (place % grid == 0)])
    if not len(torch.cat(on)):
        raise ValueError(f"a picture of {x.shape[3]} x {x.shape[2]} has no border of {block}-pixel blocks")
    return float(torch.cat(on).mean()), float(torch.cat(elsewhere).mean())


Lpips = Callable[[Tensor, Tensor], Tensor]  # pictures (B, 3, H, W) in 0..1, twice -> distances (B,)


class _Convolution(NamedTuple):
    number: int  # in torchvision's network
    padding: int = 1
    stride: int = 1
    pooled: int = 0  # window of the maximum taken before it, every 2 px
    judged: bool = True  # has a head


_ALEXNET = (
    _Convolution(0, padding=2, stride=4),
    _Convolution(3, padding=2, pooled=3),
    _Convolution(6, pooled=3),
    _Convolution(8),
    _Convolution(10),
)
_VGG16 = tuple(
    _Convolution(first + 2 * i, pooled=2 if i == 0 and first else 0, judged=i == count - 1)
    for first, count in ((0, 2), (5, 2), (10, 3), (17, 3), (24, 3))
    for i in range(count)
)


def load_lpips(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Lpips:
    """LPIPS v0.1 on AlexNet or VGG16 (arXiv 1801.03924, eq. 1), a distance that gradients pass.

    path: a file with the network's `features.N.weight|bias` (torchvision's numbers) and the heads'
    `linN.model.1.weight`. Written out here because the package lpips needs torchvision, which has no build beside a
    CPU-only torch. Raises WeightsError for an unusable file.
    """
    file = open_weights(path)
    # Only VGG16 has a convolution there.
    network, convolutions = ("VGG16", _VGG16) if "features.2.weight" in file.shapes else ("AlexNet", _ALEXNET)
    names = [f"features.{layer.number}.{part}" for layer in convolutions for part in ("weight", "bias")]
    names += [f"lin{i}.model.1.weight" for i in range(5)]
    missing = [name for name in names if name not in file.shapes]
    if missing:
        raise WeightsError(f"{file.path} is no LPIPS file for {network}: it lacks {missing[0]}")
    weights = {name: file.read(name).to(device, torch.float32) for name in names}
    shift = torch.tensor([-0.030, -0.088, -0.188], device=device)[:, None, None]
    deviation = torch.tensor([0.458, 0.448, 0.450], device=device)[:, None, None]

    def features(x: Tensor) -> list[Tensor]:
        x = (x * 2 - 1 - shift) / deviation
        levels = []
        for number, padding, stride, pooled, judged in convolutions:
            if pooled:
                x = F.max_pool2d(x, pooled, 2)
            weight, bias = weights[f"features.{number}.weight"], weights[f"features.{number}.bias"]
            x = F.relu(F.conv2d(x, weight, bias, stride, padding))
            if judged:
                levels.append(x / (x.square().sum(1, keepdim=True) + 1e-20).sqrt())
        return levels

    def distance(x: Tensor, original: Tensor) -> Tensor:
        if min(x.shape[2:]) < 31:
            raise ValueError(f"LPIPS needs pictures of at least 31 pixels a side, not {tuple(x.shape[2:])}")
        with torch.autocast(x.device.type, enabled=False):  # small differences, in fp32 while training too
            pairs = zip(features(x.float()), features(original.float()), strict=True)
            heads = (weights[f"lin{i}.model.1.weight"] for i in range(5))
            each = [F.conv2d((a - b).square(), head).mean((1, 2, 3)) for (a, b), head in zip(pairs, heads, strict=True)]
        return torch.stack(each).sum(0)

    return distance


def _cropped(x: Tensor, crop: int) -> Tensor:
    return x[:, :, crop : x.shape[2] - crop, crop : x.shape[3] - crop]
