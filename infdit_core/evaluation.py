"""One evaluation of the network on pictures of any size: on which grid of blocks, and in how much memory.

What `upscale` is made of, and a host whose own samplers drive the network.
"""

import logging
import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .images import pad_by_reflection, resize
from .infdit.config import InfDiTConfig
from .infdit.model import InfDiT, Progress
from .memory import available_memory, out_of_main_memory, out_of_memory

log = logging.getLogger(__name__)

TileSize = Literal["auto"] | tuple[int, int] | int | None


def grids(config: InfDiTConfig) -> list[int]:
    """Pixels of a block that come before the picture, for each grid of blocks.

    A block looks to the left and up only, and in a small network that leaves a faint trace at its other borders; nor do
    its patches quite fit each other. Then there are two grids: one begins at the picture's corner, the other half a
    block and half a patch before, and where the one has its borders, the other counts.
    """
    return [0, (config.block_size + config.patch_size) // 2][: config.grids]


def block_grid(size: tuple[int, int], config: InfDiTConfig, before: int | None = None) -> tuple[int, int]:
    """Rows and columns of blocks for a low resolution of (height, width); of the largest grid if none is named."""
    before = max(grids(config)) if before is None else before
    height, width = (math.ceil((side * config.scale + before) / config.block_size) for side in size)
    return height, width


def share_of_second(size: tuple[int, int], config: InfDiTConfig) -> Tensor:
    """(H, W): how much the second grid counts, little near borders of its blocks and patches, much near the first's."""

    def ratio(length: int) -> Tensor:
        first, second = (
            torch.sin(at / config.block_size).abs() * torch.sin(at / config.patch_size).square()
            for at in ((torch.arange(length) + before + 0.5) * math.pi for before in grids(config))
        )
        return first / second

    return 1 / (1 + ratio(size[0])[:, None] * ratio(size[1]))


# Times what the low resolution has around beyond its rounding, and so much where that is smooth: of held photographs'
# values 1 in 4000 has more detail, of those stored as JPEG 1 in 140.
DETAIL, LEAST_DETAIL, ROUNDING = 6.0, 4 / 127.5, 0.5 / 127.5
# What all low-resolution pixels of an area repeat inside them is the network's, not the picture's. Values count up to
# ALIKE, or a line through a few pixels would leave its shadow in all; up to more in coarse texture, as many times as
# values below ALIKE are fewer there. Their mean is then divided by the share that counts whole, a step towards Huber's
# estimate of location, but no further than a value counts. Both shares are taken for FEW where they are less.
ALIKE, FEW = 4 / 127.5, 0.2
COLOUR_AREA = 16  # low-resolution pixels whose mean is known, from a JPEG too; and an area as said above
# Of smaller areas it is known but for this and what bends around. Of photographs stored as JPEG (quality 60, noise of
# 5 levels) 1 in 30 areas is further off, by 1.5 levels in the mean; of clean ones none.
STAIN_AREA, STAIN = 2, 1 / 127.5
# Photographs have at most twice the colour that their low resolution has around: 1 value in 10,000 more, in JPEG 1 in
# 150, by 3 levels in the mean.
COLOUR, LEAST_COLOUR = 2.0, 1 / 127.5


def keep_to(low_res: Tensor, estimate: Tensor, on_channel: Callable[[], None] | None = None) -> None:
    """Take out of an estimate, in place, what its low resolution rules out: colour casts and stains, what repeats in
    every one of its pixels, patterns on smooth areas, colour on grey ones.

    low_res: (B, 3, h, w) in [-1, 1]; estimate: (B, 3, H, W), the same enlarged. on_channel is called after every step
    of a channel; what it raises stops the work.
    """
    on_channel = on_channel or (lambda: None)
    low_res = low_res.to(estimate)
    (height, width), size = low_res.shape[2:], (estimate.shape[2], estimate.shape[3])
    scale = size[0] // height
    areas, small = ((math.ceil(height / side), math.ceil(width / side)) for side in (COLOUR_AREA, STAIN_AREA))
    detail = F.interpolate(LEAST_DETAIL + DETAIL * (_bends(low_res) - ROUNDING).relu(), size, mode="bilinear")
    # Of small areas the plain mean, which is what is seen: bicubic ones leave it a third too large.
    stain = STAIN + _bends(F.adaptive_avg_pool2d(low_res, small))
    certain = 1 - areas[0] * areas[1] / (height * width)  # in a single pixel nothing repeats
    for channel in range(estimate.shape[1]):  # one by one takes less memory
        known, estimated = low_res[:, channel : channel + 1], estimate[:, channel : channel + 1]
        off = resize(estimated, (height, width)).clamp_(-1, 1) - known
        cast = resize(off, areas)
        stains = F.adaptive_avg_pool2d(off, small) - resize(cast, small)
        stains -= stains.clamp(-stain, stain)
        enlarged = resize(known, size)
        estimated.sub_(resize(cast, size)).sub_(resize(stains, size)).sub_(enlarged)
        parts = F.pixel_unshuffle(estimated, scale)
        little = F.adaptive_avg_pool2d((parts.abs() < ALIKE).to(parts), areas).mean(1, keepdim=True)
        most = ALIKE / little.clamp(min=FEW)
        bound = F.interpolate(most, (height, width), mode="bilinear")
        whole = F.adaptive_avg_pool2d((parts.abs() < bound).to(parts), areas).clamp(min=FEW)
        alike = (F.adaptive_avg_pool2d(parts.clamp_(-bound, bound), areas) / whole).clamp(-most, most)
        alike = F.interpolate(alike - alike.mean(1, keepdim=True), (height, width), mode="bilinear")
        estimated.sub_(F.pixel_shuffle(certain * alike, scale)).clamp_(-detail, detail).add_(enlarged)
        on_channel()

    tints = low_res - low_res.mean(1, keepdim=True)
    tint = F.interpolate(LEAST_COLOUR + COLOUR * _nearby(tints.abs().amax(1, keepdim=True)), size, mode="bilinear")
    grey = estimate.mean(1, keepdim=True)
    for channel in range(estimate.shape[1]):
        estimated, enlarged = estimate[:, channel : channel + 1], resize(tints[:, channel : channel + 1], size)
        estimated.sub_(grey).sub_(enlarged).clamp_(-tint, tint).add_(enlarged).add_(grey)
        on_channel()


def _bends(x: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, 1, h, w): how far a value, of any channel and of a pixel around too, is from the mean of the
    nine around it: nothing on ramps."""
    height, width = x.shape[2:]
    x = pad_by_reflection(x, max(3, height), max(3, width))
    bends = (x[:, :, 1:-1, 1:-1] - F.avg_pool2d(x, 3, 1)).abs().amax(1, keepdim=True)
    return _nearby(F.pad(bends, (1,) * 4, mode="replicate"))[:, :, :height, :width]


def _nearby(x: Tensor) -> Tensor:
    """The highest of each pixel and those around it."""
    return F.max_pool2d(x, 3, 1, 1)


class MemoryPlan:
    """Blocks a step and where K/V waits: from free memory at first, less after each out-of-memory."""

    def __init__(self, model: InfDiT, size: tuple[int, int], tile: TileSize, free: int | None = None) -> None:
        """size: (height, width) of the low resolution. free: bytes it may take, None: what is free now."""
        config, (self.device, dtype) = model.config, model.compute()
        rows, cols = self.grid = block_grid(size, config)
        self.cache_device: str | None = None
        self.tile: tuple[int, int]
        # Measured on the CPU: about 24 values a channel and token at the MLP's and the attention's peak.
        token_bytes = config.hidden_size * dtype.itemsize
        self._block_bytes = 24 * token_bytes * config.block_tokens**2
        self._line_bytes = 2 * min(rows, cols) * config.num_layers * token_bytes * config.block_tokens**2
        self._prediction_bytes = 0 if model.predictor is None else model.predictor.tile_bytes
        self._lr_block_bytes = 2 * token_bytes * config.lr_block_tokens**2
        if tile == "auto":
            spare = (available_memory(self.device) if free is None else free) // 2 - self._line_bytes
            # Beyond some thousand tokens a larger tile is no faster, and on a CPU it falls out of the cache.
            most = max(1, (4096 if self.device.type == "cpu" else 65536) // config.block_tokens**2)
            blocks = min(most, max(1, int(spare // self._block_bytes)))
            across = min(rows, cols, max(1, math.isqrt(blocks)))
            along = min(max(rows, cols), max(1, blocks // across))
            self.tile = (across, along) if rows <= cols else (along, across)
        elif tile is None:
            self.tile = (rows, cols)
        else:
            self.tile = (tile, tile) if isinstance(tile, int) else tile
        if min(self.tile) < 1:
            raise ValueError(f"tile is {tile}: it needs at least 1 block")

    @property
    def bytes(self) -> int:
        """What one evaluation, or the prediction before, takes on the network's device beside weights and pictures."""
        rows, cols = (min(most, side) for most, side in zip(self.tile, self.grid, strict=True))
        line = self._line_bytes if self.cache_device is None and (rows, cols) != self.grid else 0
        lines = rows if self.grid[0] >= self.grid[1] else cols  # the scan runs along the shorter side
        low_res = (lines + 2) * (min(self.grid) + 2) * self._lr_block_bytes
        return max(rows * cols * self._block_bytes + line + low_res, self._prediction_bytes)

    def reduce(self) -> None:
        """After running out of memory: a quarter of the tile, then K/V to host memory, then give up."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if max(self.tile) > 1:
            self.tile = (math.ceil(self.tile[0] / 2), math.ceil(self.tile[1] / 2))
            log.warning("out of memory: going on with tiles of %d x %d blocks", *self.tile)
        elif self.cache_device is None:
            self.cache_device = "cpu"
            log.warning("out of memory with single blocks: keys and values of finished blocks move to host memory")
        else:
            raise MemoryError(
                "out of memory with single blocks and keys and values in host memory: that takes about "
                f"{self.bytes / 2**20:.0f} MiB beside the weights, and {available_memory(self.device) / 2**20:.0f} MiB "
                f"are free on {self.device}. Free memory there, use bfloat16, or choose a smaller result"
            )


def denoise(
    model: InfDiT,
    memory: MemoryPlan,
    noisy: Tensor,
    sigma: Tensor,
    low_res: Tensor,
    upsampled: Tensor,
    *,
    semantic: Tensor | None = None,
    on_tile: Callable[[Progress], None] | None = None,
) -> Tensor:
    """model.denoise of pictures of any size, blended from the network's grids of blocks, as the memory plan says.

    A residual network's estimate is kept to its low resolution.

    noisy: (B, 3, h * scale, w * scale); low_res: (B, 3, h, w); upsampled: model.upsample(low_res).
    Where memory runs out, the plan becomes smaller.
    on_tile counts the tiles of all grids, and is called while keeping to the low resolution too.
    Returns the estimate, shaped as noisy; raises MemoryError where no plan fits.
    """
    befores = grids(model.config)

    def report(number: int, progress: Progress) -> None:
        if on_tile is not None:
            done, total = number * progress.total + progress.done, len(befores) * progress.total
            on_tile(Progress(done, total, progress.estimate))

    first, *others = (
        _denoise_on_grid(model, memory, noisy, sigma, low_res, upsampled, before, semantic, partial(report, number))
        for number, before in enumerate(befores)
    )
    while others:  # popped, for a whole picture is what else would be in memory from here on
        first.lerp_(others.pop(), share_of_second((first.shape[2], first.shape[3]), model.config).to(first))
    if model.config.parametrisation == "residual":
        keep_to(low_res, first, lambda: report(len(befores) - 1, Progress(1, 1, first)))
    return first


def _denoise_on_grid(
    model: InfDiT,
    memory: MemoryPlan,
    noisy: Tensor,
    sigma: Tensor,
    low_res: Tensor,
    upsampled: Tensor,
    before: int,
    semantic: Tensor | None,
    on_tile: Callable[[Progress], None],
) -> Tensor:
    config = model.config
    height, width = noisy.shape[2:]
    rows, cols = block_grid((low_res.shape[2], low_res.shape[3]), config, before)

    def on_blocks(x: Tensor, scale: int = 1) -> Tensor:
        block = config.block_size // scale
        return pad_by_reflection(x, rows * block, cols * block, before // scale)  # rounded: half a patch off there

    noisy_is_upsampled = noisy is upsampled  # without noise; then they take memory once
    upsampled, low_res = on_blocks(upsampled), on_blocks(low_res, config.scale)
    noisy = upsampled if noisy_is_upsampled else on_blocks(noisy)
    inside = (..., slice(before, before + height), slice(before, before + width))
    while True:
        try:
            return model.denoise(
                noisy,
                sigma,
                low_res,
                upsampled=upsampled,
                semantic=semantic,
                tile=memory.tile,
                cache_device=memory.cache_device,
                positions="continuous",  # the published table's wrap makes a seam every 4096 pixels
                on_tile=lambda progress: on_tile(progress._replace(estimate=progress.estimate[inside])),
            )[inside]
        except RuntimeError as error:
            # Smaller tiles don't help main memory, where the pictures of a card's network wait.
            if not out_of_memory(error) or (memory.device.type != "cpu" and out_of_main_memory(error)):
                raise
        memory.reduce()  # out here nothing holds the tensors of the failed evaluation any more
