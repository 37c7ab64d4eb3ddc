"""A first picture for the diffusion to refine: predict and refine (Whang et al., arXiv 2112.02475).

A convolutional network learns much faster than a transformer which picture is nearest to all those that the low
resolution allows. Residual blocks without normalisation (EDSR, arXiv 1707.02921) at the low resolution, then sub-pixel
convolution (arXiv 1609.05158); the answer is added to the bicubically upsampled picture. One network for clean and
degraded pictures smooths the former, so it is told how the picture was degraded, as in CMDSR (arXiv 2104.03926): a
vector of the whole picture, and from it a factor for every input channel of the blocks' convolutions.

The detailer is a second one, whose kernels differ from the predictor's by matrices of low rank: where several pictures
are as likely, the predictor gives their mean, which is soft; the detailer gives one that looks right.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise, product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import CHANNELS, InfDiTConfig
from .streaming import pixels

SHARPER = 16.0  # noise and JPEG show in what differs from the mean around, by some levels of 255
# Of a feature at one place: a few hard edges would outweigh all else, and say what was never learnt. The first, which
# tells what was lost as log(1 + levels), goes up to 19 levels.
MOST = 3.0
TILE = 128  # low-resolution pixels along a side, without what is looked at around


class Block(nn.Module):
    """x + conv(relu(conv(x))), the input channels of both convolutions multiplied by what the condition says."""

    def __init__(self, width: int, condition: int, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.conv_in = operations.Conv2d(width, width, 3, padding=1, **factory)
        self.conv_out = operations.Conv2d(width, width, 3, padding=1, **factory)
        self.modulation = operations.Linear(condition, 2 * width, **factory) if condition else None

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """(B, C, h, w) and (B, size) -> (B, C, h, w)."""
        if self.modulation is None:
            return x + self.conv_out(F.relu(self.conv_in(x)))
        first, second = (1 + self.modulation(condition))[..., None, None].chunk(2, dim=1)
        return x + self.conv_out(F.relu(self.conv_in(x * first)) * second)


class Predictor(nn.Module):
    """What bicubic interpolation of a low resolution lacks to the picture."""

    def __init__(self, config: InfDiTConfig, operations: Any, **factory: Any) -> None:
        super().__init__()
        width, size = config.predictor_width, config.predictor_condition
        self.scale = config.scale
        self.head = operations.Conv2d(CHANNELS, width, 3, padding=1, **factory)
        self.blocks = nn.ModuleList(Block(width, size, operations, **factory) for _ in range(config.predictor_depth))
        self.tail = operations.Conv2d(width, CHANNELS * config.scale**2, 3, padding=1, **factory)
        widths = (CHANNELS, size, size, size) if size else ()
        self.condition = nn.ModuleList(operations.Conv2d(a, b, 3, padding=1, **factory) for a, b in pairwise(widths))

    @property
    def radius(self) -> int:
        """How many low-resolution pixels around one count for it."""
        return 2 * len(self.blocks) + 2

    @property
    def tile_bytes(self) -> int:
        """What a tile takes beside the pictures: about three tensors of features."""
        weight = self.head.weight
        return 3 * weight.shape[0] * weight.dtype.itemsize * (TILE + 2 * self.radius) ** 2

    def forward(self, low_res: Tensor, condition: Tensor | None = None) -> Tensor:
        """(B, 3, h, w) in [-1, 1] and what `condition_of` says -> (B, 3, h * scale, w * scale)."""
        x = self.head(low_res.contiguous(memory_format=torch.channels_last))  # the faster layout
        for block in self.blocks:
            x = block(x, condition)
        return F.pixel_shuffle(self.tail(x), self.scale)

    def condition_of(self, low_res: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor | None:
        """How (B, 3, h, w) was degraded: features' mean over the picture, (B, size); None for weights without.

        Computed on `device` tile by tile.
        """
        if not self.condition:
            return None
        sums = []
        for _, seen, inside in _tiles(low_res, 1 + len(self.condition)):  # of the mean, and of each convolution
            x = low_res[_window(seen)].to(device=device, dtype=torch.float32)  # bfloat16 would round half levels off
            x = (SHARPER * (x - F.avg_pool2d(x, 3, 1, 1, count_include_pad=False))).to(dtype)
            for convolution in self.condition:
                x = F.relu(convolution(x))
            sums.append(x[_window(inside)].clamp(max=MOST).float().sum((2, 3)))
        return (torch.stack(sums).sum(0) / (low_res.shape[2] * low_res.shape[3])).to(dtype)

    def add_to(
        self,
        upsampled: Tensor,
        low_res: Tensor,
        device: torch.device,
        dtype: torch.dtype,
        turns: int = 1,
        on_tile: Callable[[int], None] | None = None,
        share: float = 1.0,
    ) -> None:
        """Add `share` of the answer to (B, 3, h * scale, w * scale), computed on `device` tile by tile.

        turns: of so many quarter turns of the picture the mean answer, turned back, is added (EDSR's self-ensemble).
        on_tile(tiles) is called after every turn of a tile, of which there are so many.
        """
        condition, tiles = self.condition_of(low_res, device, dtype), _tiles(low_res, self.radius)
        for (part, seen, inside), turn in product(tiles, range(turns)):
            picture = low_res[_window(seen)].to(device=device, dtype=dtype)
            answer = torch.rot90(self(torch.rot90(picture, turn, (2, 3)), condition).float(), -turn, (2, 3))
            upsampled[_window(part, self.scale)] += (answer[_window(inside, self.scale)] * share / turns).to(upsampled)
            if on_tile is not None:
                on_tile(len(tiles))


Area = tuple[range, range]  # rows and columns of low-resolution pixels


def _tiles(low_res: Tensor, radius: int) -> list[list[Area]]:
    """Parts of a picture: each, what is looked at for it, `radius` pixels around too, and where in that it lies."""

    def along(length: int) -> Iterator[tuple[range, range, range]]:
        for start in range(0, length, TILE):
            part = range(start, min(start + TILE, length))
            seen = range(max(0, part.start - radius), min(length, part.stop + radius))
            yield part, seen, range(part.start - seen.start, part.stop - seen.start)

    pairs = product(along(low_res.shape[2]), along(low_res.shape[3]))
    return [list(zip(rows, cols, strict=True)) for rows, cols in pairs]


def _window(area: Area, scale: int = 1) -> Any:
    """Indices of an area in a picture `scale` times as large."""
    return (..., *(pixels(part, scale) for part in area))
