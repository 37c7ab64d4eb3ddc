"""CLIP image vectors for Inf-DiT, and steering them by text."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .images import resize

# OpenAI's CLIP statistics, per channel, of pixels in 0..1.
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_DEVIATION = (0.26862954, 0.26130258, 0.27577711)


def preprocess(x: Tensor, side: int = 224) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] -> CLIP's input (B, 3, side, side).

    The short side is resized to `side`, bicubic with antialiasing and not clamped; then the centre is cropped.
    """
    height, width = x.shape[2:]
    short = min(height, width)
    size = (side * height // short, side * width // short)
    x = resize((x + 1) / 2, size)
    top, left = (round((length - side) / 2) for length in size)
    x = x[:, :, top : top + side, left : left + side]
    mean, deviation = (torch.tensor(v, dtype=x.dtype, device=x.device)[:, None, None] for v in (_MEAN, _DEVIATION))
    return (x - mean) / deviation


def steer(image_vector: Tensor, positive: Tensor, negative: Tensor, strength: float = 2.0) -> Tensor:
    """normalise(n(image) + strength * n(positive) - strength * n(negative)), n = division by the L2 norm.

    image_vector: (B, D); positive, negative: (1 or B, D), CLIP text vectors. Returns unit vectors (B, D).
    """
    image, good, bad = (F.normalize(v, dim=-1) for v in (image_vector, positive, negative))
    return F.normalize(image + strength * good - strength * bad, dim=-1)
