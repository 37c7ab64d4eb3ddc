"""Originals, and how the scripts that measure reduce them: all alike, so that their figures compare."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def pictures(folder: Path) -> list[Path]:
    """The pictures in a folder by name; ends the script where there is none."""
    known = Image.registered_extensions()
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in known) if folder.is_dir() else []
    if not found:
        raise SystemExit(f"{folder} holds no pictures")
    return found


def opened(path: Path, scale: int = 4) -> Image.Image:
    """A picture as RGB, cut on the right and below to whole low-resolution pixels."""
    with Image.open(path) as file:
        image = file.convert("RGB")
    return image.crop((0, 0, image.width // scale * scale, image.height // scale * scale))


def middle(size: tuple[int, int], side: int, scale: int = 4) -> tuple[int, int, int, int]:
    """The box in a picture's middle of at most side x side pixels, of whole low-resolution pixels."""
    width, height = (min(length, side) // scale * scale for length in size)
    left, top = (size[0] - width) // 2 // scale * scale, (size[1] - height) // 2 // scale * scale
    return left, top, left + width, top + height


def reduced(original: Image.Image, scale: int = 4) -> Image.Image:
    return original.resize((original.width // scale, original.height // scale), Image.Resampling.BICUBIC)


def tensor(image: Image.Image) -> Tensor:
    """(1, H, W, 3) in 0..1."""
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)[None]
