"""A first picture for the diffusion to refine: predict and refine (Whang et al., arXiv 2112.02475).

A convolutional network learns much faster than a transformer which picture is nearest to all those that the low
resolution allows. Residual blocks without normalisation (EDSR, arXiv 1707.02921) at the low resolution, then sub-pixel
convolution (arXiv 1609.05158); the answer is added to the bicubically upsampled picture.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import CHANNELS, InfDiTConfig

TILE = 128  # low-resolution pixels along a side, without what is looked at around


class Block(nn.Module):
    """x + conv(relu(conv(x)))."""

    def __init__(self, width: int, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.conv_in = operations.Conv2d(width, width, 3, padding=1, **factory)
        self.conv_out = operations.Conv2d(width, width, 3, padding=1, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_out(F.relu(self.conv_in(x)))


class Predictor(nn.Module):
    """What bicubic interpolation of a low resolution lacks to the picture."""

    def __init__(self, config: InfDiTConfig, operations: Any, **factory: Any) -> None:
        super().__init__()
        width = config.predictor_width
        self.scale = config.scale
        self.head = operations.Conv2d(CHANNELS, width, 3, padding=1, **factory)
        self.blocks = nn.ModuleList(Block(width, operations, **factory) for _ in range(config.predictor_depth))
        self.tail = operations.Conv2d(width, CHANNELS * config.scale**2, 3, padding=1, **factory)

    @property
    def radius(self) -> int:
        """How many low-resolution pixels around one count for it."""
        return 2 * len(self.blocks) + 2

    @property
    def tile_bytes(self) -> int:
        """What a tile takes beside the pictures: about three tensors of features."""
        weight = self.head.weight
        return 3 * weight.shape[0] * weight.dtype.itemsize * (TILE + 2 * self.radius) ** 2

    def forward(self, low_res: Tensor) -> Tensor:
        """(B, 3, h, w) in [-1, 1] -> (B, 3, h * scale, w * scale)."""
        x = self.head(low_res.contiguous(memory_format=torch.channels_last))  # the faster layout
        for block in self.blocks:
            x = block(x)
        return F.pixel_shuffle(self.tail(x), self.scale)

    def mean_of_turns(self, low_res: Tensor) -> Tensor:
        """The mean answer to all eight mirrorings and turnings of a picture, turned back (EDSR's self-ensemble)."""
        answer = torch.zeros((), device=low_res.device)
        for quarters in range(4):
            turned = torch.rot90(low_res, quarters, (2, 3))
            for mirrored in ((), (3,)):
                answer = answer + torch.rot90(self(turned.flip(mirrored)).flip(mirrored), -quarters, (2, 3)).float()
        return answer / 8

    def add_to(
        self, upsampled: Tensor, low_res: Tensor, device: torch.device, dtype: torch.dtype, turns: bool = False
    ) -> None:
        """Add the answer to (B, 3, h * scale, w * scale), computed on `device` tile by tile; `turns`: the mean one."""
        for top in range(0, low_res.shape[2], TILE):
            for left in range(0, low_res.shape[3], TILE):
                start_y, start_x = max(0, top - self.radius), max(0, left - self.radius)
                stop_y, stop_x = top + TILE + self.radius, left + TILE + self.radius
                seen = low_res[:, :, start_y:stop_y, start_x:stop_x].to(device=device, dtype=dtype)
                y, x, side = ((top - start_y) * self.scale, (left - start_x) * self.scale, TILE * self.scale)
                answer = (self.mean_of_turns if turns else self)(seen)[:, :, y : y + side, x : x + side]
                y, x = top * self.scale, left * self.scale
                upsampled[:, :, y : y + side, x : x + side] += answer.to(upsampled)
