"""Training crops from a folder of photographs."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ..images import resize

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff")


class Batch(NamedTuple):
    """Aligned crops in [-1, 1]; low_res has `margin` more pixels on every side."""

    original: Tensor  # (B, 3, S, S)
    low_res: Tensor  # (B, 3, S / scale + 2 margin, S / scale + 2 margin)
    upsampled: Tensor  # (B, 3, S, S)


class Photograph(NamedTuple):
    name: str
    original: NDArray[np.uint8]  # (H, W, 3), sides multiples of the scale
    low_res: NDArray[np.uint8]  # (H / scale, W / scale, 3), Pillow's bicubic


def load_photographs(folder: Path, scale: int, least: int) -> list[Photograph]:
    """Every picture in a folder with both sides of at least `least` pixels, in order of name.

    Raises ValueError where there is none.
    """
    photographs = []
    for path in sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES):
        with Image.open(path) as file:
            width, height = (side - side % scale for side in file.size)
            if min(width, height) < least:
                continue
            picture = file.convert("RGB").crop((0, 0, width, height))
            small = picture.resize((width // scale, height // scale), Image.Resampling.BICUBIC)
            photographs.append(Photograph(path.name, np.asarray(picture), np.asarray(small)))
    if not photographs:
        raise ValueError(f"{folder} holds no picture with sides of at least {least} pixels")
    return photographs


def _detail(picture: NDArray[np.uint8]) -> float:
    """Mean absolute gradient of a low-resolution picture's green channel, in levels of 255."""
    green = picture[..., 1].astype(np.int16)
    return float(np.abs(np.diff(green, axis=0)).mean() + np.abs(np.diff(green, axis=1)).mean())


class CropSampler:
    """Random crops, photographs drawn by area times detail, of two crops the more detailed one."""

    def __init__(self, photographs: list[Photograph], crop: int, scale: int, margin: int, seed: int) -> None:
        self.photographs = photographs
        self.crop, self.scale, self.margin = crop, scale, margin
        self.random = np.random.default_rng(seed)
        weight = np.array([_detail(p.low_res) * p.low_res.shape[0] * p.low_res.shape[1] for p in photographs])
        self.probability = weight / weight.sum()

    def _draw(self) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        photograph = self.photographs[self.random.choice(len(self.photographs), p=self.probability)]
        side, s = self.crop // self.scale + 2 * self.margin, self.scale
        top, left = (int(self.random.integers(0, n - side + 1)) for n in photograph.low_res.shape[:2])
        y, x = (top + self.margin) * s, (left + self.margin) * s
        return (
            photograph.original[y : y + self.crop, x : x + self.crop],
            photograph.low_res[top : top + side, left : left + side],
        )

    def batch(self, size: int) -> Batch:
        """Draw `size` crops, each mirrored and transposed at random."""
        pairs = []
        for _ in range(size):
            pair = max((self._draw() for _ in range(2)), key=lambda pair: _detail(pair[1]))
            vertical, horizontal, transposed = self.random.integers(0, 2, 3).astype(bool)
            mirrored = (crop[:: -1 if vertical else 1, :: -1 if horizontal else 1] for crop in pair)
            pairs.append([crop.swapaxes(0, 1) if transposed else crop for crop in mirrored])
        original, low_res = (
            torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() / 127.5 - 1
            for crops in zip(*pairs, strict=True)
        )
        upsampled = resize(low_res, (low_res.shape[2] * self.scale, low_res.shape[3] * self.scale)).clamp(-1, 1)
        edge = self.margin * self.scale
        inner = slice(edge, edge + self.crop)
        return Batch(original, low_res, upsampled[:, :, inner, inner])
