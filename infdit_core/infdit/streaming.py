"""The way of a picture through Inf-DiT block by block: in which order, and what is kept between the steps.

Blocks depend on blocks to one side only, so a scan in dependency order needs the K/V of the last line of blocks and
nothing else. A scan runs along lines: rows, or columns where those are shorter, forwards or, for direction "rb",
backwards. Scan coordinates (line, place) hide which of the four it is.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import Border
from .config import InfDiTConfig

Direction = Literal["lt", "rb"]


class Tile(NamedTuple):
    """The blocks of one step, in scan coordinates."""

    lines: range
    places: range


@dataclass(frozen=True)
class Scan:
    """Order of the tiles of a picture of rows x cols blocks."""

    rows: int
    cols: int
    tile: tuple[int, int]  # rows, cols
    direction: Direction

    def __post_init__(self) -> None:
        if min(self.tile) < 1:
            raise ValueError(f"tile is {self.tile}: it needs at least one row and one column of blocks")
        if self.direction not in ("lt", "rb"):
            raise ValueError(f"direction is {self.direction!r}: it must be 'lt' or 'rb'")

    @property
    def by_columns(self) -> bool:
        """Lines are columns where the picture is wide: the kept line is then shorter."""
        return self.cols > self.rows

    @property
    def size(self) -> tuple[int, int]:
        """(lines, places)."""
        return (self.cols, self.rows) if self.by_columns else (self.rows, self.cols)

    @property
    def top_first(self) -> bool:
        """Whether a block's keys are [.., the line before, the place before] or the other way round.

        Weights know the order [self, left-top, left, top] or [self, right-bottom, bottom, right].
        """
        return (self.direction == "rb") != self.by_columns

    @cached_property
    def tiles(self) -> list[Tile]:
        steps = self.tile[::-1] if self.by_columns else self.tile
        lines, places = (
            [range(start, min(start + step, size)) for start in range(0, size, step)]
            for size, step in zip(self.size, steps, strict=True)
        )
        return [Tile(a, b) for a in lines for b in places]

    def blocks(self, tile: Tile) -> tuple[range, range]:
        """Rows and columns of the picture's blocks that a tile covers."""
        spans: list[range] = list(tile)
        if self.direction == "rb":
            spans = [range(n - s.stop, n - s.start) for s, n in zip(spans, self.size, strict=True)]
        return (spans[1], spans[0]) if self.by_columns else (spans[0], spans[1])

    def arrange(self, x: Tensor, dim: int = 1) -> Tensor:
        """Blocks in picture order, rows at `dim`, columns after -> scan order."""
        if self.direction == "rb":
            x = x.flip(dim, dim + 1)
        return x.transpose(dim, dim + 1) if self.by_columns else x

    restore = arrange  # flipping both axes and swapping them are inverse to themselves, and commute


def pixels(blocks: range, side: int) -> slice:
    """Blocks along an axis -> their pixels (or tokens), `side` a block."""
    return slice(blocks.start * side, blocks.stop * side)


class KVCache:
    """K/V of finished blocks that a later tile will look at: one line, and the place before the next tile."""

    def __init__(self, scan: Scan, layers: int, device: torch.device | str | None) -> None:
        self.scan = scan
        self.device = device
        self.line: list[Tensor | None] = [None] * layers  # (2, B, places, N, heads, d)
        self.side: list[Tensor | None] = [None] * layers  # (2, B, lines of a tile, N, heads, d)
        self.corner: list[Tensor | None] = [None] * layers  # (2, B, 1, N, heads, d)

    def border(self, layer: int, tile: Tile, device: torch.device) -> Border:
        """What surrounds a tile, on `device`."""
        line = self.line[layer] if tile.lines.start else None
        side = self.side[layer] if tile.places.start else None
        corner = self.corner[layer] if line is not None and side is not None else None
        if line is not None:
            line = line[:, :, tile.places.start : tile.places.stop]
        return Border(*(None if kept is None else kept.to(device) for kept in (line, side, corner)))

    def keep(self, layer: int, tile: Tile, kv: Tensor) -> None:
        """Take over from a finished tile (2, B, lines, places, N, heads, d) what later tiles need."""
        lines, places = self.scan.size
        more_lines, more_places = tile.lines.stop < lines, tile.places.stop < places
        device = self.device or kv.device
        line = self.line[layer]
        last = slice(tile.places.stop - 1, tile.places.stop)
        if more_places:
            corner = None if line is None else line[:, :, last]
            # The next tile's corner is about to be written over, unless this is the last line.
            self.corner[layer] = corner.clone() if corner is not None and more_lines else corner
            self.side[layer] = kv[:, :, :, -1].to(device, copy=True)
        if more_lines:
            if line is None:
                shape = (*kv.shape[:2], places, *kv.shape[4:])
                line = self.line[layer] = torch.empty(shape, dtype=kv.dtype, device=device)
            line[:, :, tile.places.start : tile.places.stop] = kv[:, :, -1]
            if more_places and len(tile.lines) == 1:
                self.side[layer] = line[:, :, last]  # the same block: no second copy


class LowResolutionLines:
    """K/V of the low-resolution features, line by line as the scan arrives there: each computed once a scan."""

    def __init__(
        self,
        scan: Scan,
        low_res: Tensor,
        config: InfDiTConfig,
        embed: Callable[[Tensor], Tensor],
        keys_values: Callable[[Tensor], Tensor],
    ) -> None:
        """embed: pixels (B, 3, h, w) -> features (B, C, h', w').

        keys_values: features (B, h', w', C) -> (2, B, h', w', heads, d).
        """
        self.scan = scan
        self.low_res = low_res
        self.embed = embed
        self.keys_values = keys_values
        self.lr_block = config.block_size // config.scale  # pixels
        self.side = config.lr_block_tokens
        self.margin = low_res.shape[2] > scan.rows * self.lr_block
        self.kept: dict[int, Tensor] = {}  # by line of the picture; -1 and the one past the end are its border

    def around(self, tile: Tile) -> Tensor:
        """K/V of a tile's blocks and one block on every side, in picture order.

        (2, B, (rows + 2) m, (cols + 2) m, heads, d) with m feature tokens along a block.
        """
        rows, cols = self.scan.blocks(tile)
        lines, places = (cols, rows) if self.scan.by_columns else (rows, cols)
        wanted = range(lines.start - 1, lines.stop + 1)
        self.kept = {line: self.kept[line] if line in self.kept else self._line(line) for line in wanted}
        across, along = (3, 2) if self.scan.by_columns else (2, 3)
        start, stop = places.start * self.side, (places.stop + 2) * self.side
        return torch.cat([kv.narrow(along, start, stop - start) for kv in self.kept.values()], dim=across)

    def _line(self, line: int) -> Tensor:
        across, along = (3, 2) if self.scan.by_columns else (2, 3)
        start = (line + self.margin) * self.lr_block
        inside = 0 <= start < self.low_res.shape[across]
        features = self.embed(self.low_res.narrow(across, start if inside else 0, self.lr_block))
        if not inside:
            features = torch.zeros_like(features)
        if not self.margin:
            features = F.pad(features, (0, 0, self.side, self.side) if along == 2 else (self.side, self.side))
        return self.keys_values(features.permute(0, 2, 3, 1))
