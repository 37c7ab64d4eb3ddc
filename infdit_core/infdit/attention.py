"""Unidirectional block attention (Inf-DiT, arXiv 2405.04312, section 3.2) and rotary positions.

Tokens stand in a grid of square blocks: (B, rows, cols, N, ...) with N tokens of a block in raster order.
A block's queries see its own keys and those of three neighbours on one side, so blocks can be computed one after
another while only the K/V of the last line of blocks is kept.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Border(NamedTuple):
    """K/V of the blocks around a tile that were computed before it; None where the picture ends."""

    above: Tensor | None  # (2, B, cols, N, heads, d)
    left: Tensor | None  # (2, B, rows, N, heads, d)
    corner: Tensor | None  # (2, B, 1, N, heads, d)


def rotary_table(rows: Tensor, cols: Tensor, block: int, head_size: int) -> Tensor:
    """Rotations for a tile of tokens: (rows, cols, block^2, 1, head_size / 2), complex64.

    rows, cols: integer patch positions, a multiple of `block` long. The first half of a head's channels turns by
    the row, the second by the column, in interleaved pairs.
    """
    # In fp32 and just this form: weights were trained with it, others differ by up to 6e-5 at position 1024.
    half = head_size // 2
    frequencies = 1.0 / (10000 ** (torch.arange(0, half, 2, device=rows.device).float() / half))

    def turns(positions: Tensor) -> Tensor:  # (blocks, block, head_size / 4)
        angle = (positions.float()[:, None] * frequencies).view(-1, block, half // 2)
        return torch.polar(torch.ones_like(angle), angle)

    by_row, by_col = turns(rows), turns(cols)
    shape = (by_row.shape[0], by_col.shape[0], block, block, half // 2)
    by_row = by_row[:, None, :, None].expand(shape)
    by_col = by_col[None, :, None, :].expand(shape)
    return torch.cat([by_row, by_col], dim=-1).flatten(2, 3).unsqueeze(-2)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Apply `rotary_table` to queries or keys (..., N, heads, d), computed in fp32, returned in x's dtype."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * table).flatten(-2).to(x.dtype)


def block_attention(q: Tensor, kv: Tensor, neighbour_positions: Tensor, border: Border, top_first: bool) -> Tensor:
    """Attention of every block of a tile to [itself, left-top, left, top].

    q: (B, rows, cols, N, heads, d); kv: (2, B, rows, cols, N, heads, d); neighbour_positions: (4, heads, d), one
    embedding a slot, added to keys after the rotation. A neighbour beyond the picture is the nearest block inside
    it (index clamp), so block (0, 0) sees itself four times. top_first: slots are [itself, left-top, top, left].
    Returns (B, rows, cols, N, heads * d).
    """
    out = torch.empty_like(q)
    above, above_left = border.above, border.corner
    for i in range(q.shape[1]):  # one row of blocks at a time bounds the memory for gathered keys
        own = kv[:, :, i]  # (2, B, cols, N, heads, d)
        left = None if border.left is None else border.left[:, :, i : i + 1]
        if above is None:
            above, above_left = own, left
        slots = [own, _shift(above, above_left), _shift(own, left), above]
        if top_first:
            slots[2], slots[3] = slots[3], slots[2]
        keys, values = torch.stack(slots, dim=3).unbind(0)  # (B, cols, 4, N, heads, d)
        keys = keys + neighbour_positions[:, None]
        attended = F.scaled_dot_product_attention(
            q[:, i].flatten(0, 1).transpose(1, 2),
            keys.flatten(2, 3).flatten(0, 1).transpose(1, 2),
            values.flatten(2, 3).flatten(0, 1).transpose(1, 2),
        )  # (B * cols, heads, N, d)
        out[:, i] = attended.transpose(1, 2).unflatten(0, q.shape[0:3:2])
        above, above_left = own, left
    return out.flatten(-2)


def _shift(line: Tensor, before: Tensor | None) -> Tensor:
    """Each block's left neighbour in a row of blocks (2, B, cols, ...); `before` stands left of the first."""
    return torch.cat([line[:, :, :1] if before is None else before, line[:, :, :-1]], dim=2)
