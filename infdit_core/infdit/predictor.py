"""A first picture for the diffusion to refine: predict and refine (Whang et al., arXiv 2112.02475).

A convolutional network learns much faster than a transformer which picture is nearest to all those that the low
resolution allows. Residual blocks without normalisation (EDSR, arXiv 1707.02921) at the low resolution, then sub-pixel
convolution (arXiv 1609.05158); the answer is added to the bicubically upsampled picture.
"""

from collections.abc import Callable
from itertools import product
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

    def add_to(
        self,
        upsampled: Tensor,
        low_res: Tensor,
        device: torch.device,
        dtype: torch.dtype,
        turns: int = 1,
        on_tile: Callable[[int, int], None] | None = None,
    ) -> None:
        """Add the answer to (B, 3, h * scale, w * scale), computed on `device` tile by tile.

        turns: of so many quarter turns of the picture the mean answer, turned back, is added (EDSR's self-ensemble).
        on_tile(done, total) is called after every tile.
        """
        corners = list(product(range(0, low_res.shape[2], TILE), range(0, low_res.shape[3], TILE)))
        for done, (top, left) in enumerate(corners, 1):
            start_y, start_x = max(0, top - self.radius), max(0, left - self.radius)
            stop_y, stop_x = top + TILE + self.radius, left + TILE + self.radius
            seen = low_res[:, :, start_y:stop_y, start_x:stop_x].to(device=device, dtype=dtype)
            answers = [self(torch.rot90(seen, turn, (2, 3))) for turn in range(turns)]
            answer = torch.stack([torch.rot90(x.float(), -turn, (2, 3)) for turn, x in enumerate(answers)]).mean(0)
            y, x, side = ((top - start_y) * self.scale, (left - start_x) * self.scale, TILE * self.scale)
            answer = answer[:, :, y : y + side, x : x + side]
            y, x = top * self.scale, left * self.scale
            upsampled[:, :, y : y + side, x : x + side] += answer.to(upsampled)
            if on_tile is not None:
                on_tile(done, len(corners))
