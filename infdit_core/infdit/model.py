"""Inf-DiT: a diffusion transformer over blocks (arXiv 2405.04312), as an EDM denoiser.

One picture is a grid of blocks, and every tensor of tokens is (B, rows, cols, N, C): blocks in the grid, N tokens
of a block in raster order, channels. `denoise` walks over the grid in tiles; the whole picture is one big tile.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..diffusion.preconditioning import PRECONDITIONINGS
from ..images import resize
from .attention import Border, block_attention, rotary_table, rotate
from .config import CHANNELS, LR_PATCH_SIZE, TURNS, InfDiTConfig
from .predictor import Predictor
from .streaming import Direction, KVCache, LowResolutionLines, Scan, Tile, pixels

Positions = Literal["reference", "continuous"]
Modulation = tuple[Tensor, ...]  # each (B, 1, 1, 1, C)


class Progress(NamedTuple):
    """What `denoise` reports after every tile."""

    done: int  # tiles
    total: int
    estimate: Tensor  # (B, 3, H, W) in [-1, 1], filled in so far


def _norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift, x, 1 + scale)


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.view(*x.shape[:-1], heads, x.shape[-1] // heads)


def _blocks(x: Tensor, side: int) -> Tensor:
    """(B, C, H, W) feature map -> (B, rows, cols, side^2, C)."""
    return rearrange(x, "b c (r p) (s q) -> b r s (p q) c", p=side, q=side)


class CrossAttention(nn.Module):
    """From the tokens of a block to the low-resolution features of the 3x3 blocks around it."""

    def __init__(self, config: InfDiTConfig, operations: Any, **factory: Any) -> None:
        super().__init__()
        size, head = config.hidden_size, config.head_size
        self.heads = config.num_heads
        self.query = operations.Linear(size, size, **factory)
        self.key_value = operations.Linear(size, 2 * size, **factory)
        self.out = operations.Linear(size, size, **factory)
        self.query_norm = operations.LayerNorm(head, eps=1e-6, **factory)
        self.key_norm = operations.LayerNorm(head, eps=1e-6, **factory)

    def keys_values(self, features: Tensor) -> Tensor:
        """LR features (..., C) -> (2, ..., heads, d)."""
        key, value = self.key_value(features).chunk(2, dim=-1)
        return torch.stack([self.key_norm(_heads(key, self.heads)), _heads(value, self.heads)])

    def forward(self, x: Tensor, keys_values: Tensor, query_position: Tensor, key_position: Tensor) -> Tensor:
        """x: (B, rows, cols, N, C); keys_values: (2, B, (rows + 2) m, (cols + 2) m, heads, d), m a block's side."""
        query = self.query_norm(_heads(self.query(x), self.heads)) + query_position
        batch, rows, cols = x.shape[:3]
        side = keys_values.shape[2] // (rows + 2)
        out = torch.empty_like(query)
        for i in range(rows):  # one row of blocks at a time bounds the memory for the windows
            band = keys_values[:, :, i * side : (i + 3) * side].unfold(3, 3 * side, side)
            key, value = rearrange(band, "t b p s h d q -> t (b s) (p q) h d").unbind(0)
            attended = F.scaled_dot_product_attention(
                query[:, i].flatten(0, 1).transpose(1, 2),
                (key + key_position).transpose(1, 2),
                value.transpose(1, 2),
            )
            out[:, i] = attended.transpose(1, 2).unflatten(0, (batch, cols))
        return self.out(out.flatten(-2))


class Layer(nn.Module):
    """Transformer layer with adaLN shift and scale, no gates."""

    def __init__(self, config: InfDiTConfig, operations: Any, *, cross: bool, **factory: Any) -> None:
        super().__init__()
        size = config.hidden_size
        self.heads = config.num_heads
        self.modulation = operations.Linear(size, 4 * size, **factory)
        self.qkv = operations.Linear(size, 3 * size, **factory)
        self.qk_norm = operations.LayerNorm(config.head_size, eps=1e-6, **factory)  # queries and keys share it
        self.attention_out = operations.Linear(size, size, **factory)
        self.cross = CrossAttention(config, operations, **factory) if cross else None
        self.post_cross_norm = operations.LayerNorm(size, eps=1e-6, **factory) if cross else None
        self.mlp_in = operations.Linear(size, 4 * size, **factory)
        self.mlp_out = operations.Linear(4 * size, size, **factory)

    def forward(
        self,
        x: Tensor,
        modulation: Modulation,
        rotation: Tensor,
        positions: Tensor,
        scan: Scan,
        border: Border,
        keep: Callable[[Tensor], None] | None,
        low_res: tuple[Tensor, Tensor, Tensor],
    ) -> Tensor:
        """Tokens in scan order, (B, rows, cols, N, C) -> the same.

        keep: takes over the K/V. low_res: for the cross-attention, K/V and the query and key positions.
        """
        q, kv = self.queries_keys_values(x, modulation, rotation)
        attended = block_attention(q, kv, positions, border, scan.top_first)
        if keep is not None:
            keep(kv)
        del q, kv
        x = x + self.attention_out(attended)
        if self.cross is not None:
            x = x + scan.arrange(self.cross(_norm(scan.restore(x)), *low_res))
        return x + self.mlp(x, modulation)

    def queries_keys_values(self, x: Tensor, modulation: Modulation, rotation: Tensor) -> tuple[Tensor, Tensor]:
        """x: (B, rows, cols, N, C) -> q (B, rows, cols, N, heads, d), kv (2, B, rows, cols, N, heads, d)."""
        shift, scale = modulation[:2]
        q, k, v = (_heads(part, self.heads) for part in self.qkv(_modulate(_norm(x), shift, scale)).chunk(3, dim=-1))
        q, k = rotate(self.qk_norm(q), rotation), rotate(self.qk_norm(k), rotation)
        return q, torch.stack([k, v])

    def mlp(self, x: Tensor, modulation: Modulation) -> Tensor:
        shift, scale = modulation[2:]
        normed = _norm(x) if self.post_cross_norm is None else self.post_cross_norm(x)
        return self.mlp_out(F.gelu(self.mlp_in(_modulate(normed, shift, scale)), approximate="tanh"))


def fresh_matrix(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Fill it as training begins, uniformly (Glorot and Bengio 2010), and return it."""
    fan_out, fan_in = weight.shape[0], weight[0].numel()
    bound = (6 / (fan_in + fan_out)) ** 0.5
    return weight.uniform_(-bound, bound, generator=generator)


class InfDiT(nn.Module):
    """The network and its EDM preconditioning.

    operations: where Linear, Conv2d and LayerNorm come from (torch.nn, or a host's own that casts at use).
    """

    layers: Sequence[Layer]
    checkpointing = False  # compute the layers once more in the backward pass instead of keeping what they made
    # Where and in what it computes, if not where and as the weights are: a host may keep weights elsewhere, or in a
    # smaller type, and have its operations cast them at use.
    compute_device: torch.device | None = None
    compute_dtype: torch.dtype | None = None

    def __init__(
        self,
        config: InfDiTConfig,
        *,
        operations: Any = nn,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        config.check()
        self.config = config
        size, heads, head = config.hidden_size, config.num_heads, config.head_size
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        patch = config.patch_size
        self.patch_embed = operations.Conv2d(2 * CHANNELS, size, patch, stride=patch, **factory)
        self.lr_embed = operations.Conv2d(CHANNELS, size, LR_PATCH_SIZE, stride=LR_PATCH_SIZE, **factory)
        self.time_in = operations.Linear(config.time_channels, size, **factory)
        self.time_out = operations.Linear(size, size, **factory)
        self.semantic_in = operations.Linear(config.semantic_size, size, **factory)
        self.semantic_out = operations.Linear(size, size, **factory)
        self.layers = nn.ModuleList(  # type: ignore[assignment]  # torch types its members as any module
            Layer(config, operations, cross=i == 0, **factory) for i in range(config.num_layers)
        )
        self.final_modulation = operations.Linear(size, 2 * size, **factory)
        self.final = operations.Linear(size, CHANNELS * patch**2, **factory)
        tokens, lr_tokens = config.block_tokens**2, (3 * config.lr_block_tokens) ** 2
        self.neighbour_position = nn.Parameter(torch.zeros(config.num_layers, 4, heads, head, **factory))
        self.lr_query_position = nn.Parameter(torch.zeros(1, tokens, heads, head, **factory))
        self.lr_key_position = nn.Parameter(torch.zeros(1, lr_tokens, heads, head, **factory))
        self.predictor = Predictor(config, operations, **factory) if config.predictor_depth else None
        self.detailer = Predictor(config, operations, **factory) if config.detail_rank else None

    def compute(self) -> tuple[torch.device, torch.dtype]:
        """Device and dtype of the computation."""
        weight = self.final.weight
        return self.compute_device or weight.device, self.compute_dtype or weight.dtype

    @property
    def uses_semantics(self) -> bool:
        """Whether a semantic vector changes anything; fresh weights and those trained without one ignore it."""
        return bool(self.semantic_out.weight.any() or self.semantic_out.bias.any())

    def initialise(self, generator: torch.Generator) -> None:
        """Fresh weights for training: the network starts as c_skip * input, every adaLN as the identity, the predictor
        as bicubic."""
        depth_scale = (2 * self.config.num_layers) ** -0.5
        zero = {"semantic_out", "final", "final_modulation", "modulation", "tail"}  # as in DiT (arXiv 2212.09748)
        residual = {"attention_out", "mlp_out", "out", "conv_out"}
        with torch.no_grad():
            for name, module in self.named_modules():
                leaf = name.rpartition(".")[2]
                if not isinstance(module, nn.Linear | nn.Conv2d):
                    continue
                if module.bias is not None:
                    module.bias.zero_()
                if leaf in zero:
                    module.weight.zero_()
                    continue
                fresh_matrix(module.weight, generator).mul_(depth_scale if leaf in residual else 1)
            for position in (self.neighbour_position, self.lr_query_position, self.lr_key_position):
                position.normal_(std=0.02, generator=generator)

    # --- the first picture, which every evaluation refines

    def predict(
        self,
        low_res: Tensor,
        margin: int = 0,
        turns: int = 1,
        on_tile: Callable[[Progress], None] | None = None,
        detail: float = 0.0,
    ) -> Tensor:
        """Bicubic plus what the predictor adds, not clamped: (B, 3, h, w) in [-1, 1] -> fp32 where low_res is.

        margin: low-resolution pixels on every side that are looked at only; the result is `scale` times the rest.
        turns: the predictor's mean answer to so many quarter turns. on_tile: as for `denoise`. detail: share of the
        detailer's answer in place of the predictor's, to the picture as it is: a mean of turns would blur it.
        """
        scale = self.config.scale
        upsampled = resize(low_res.float(), (low_res.shape[2] * scale, low_res.shape[3] * scale))
        inside = (..., slice(margin * scale, -margin * scale or None), slice(margin * scale, -margin * scale or None))
        parts = [(self.predictor, 1 - detail, turns), (self.detailer, detail, 1)]
        wanted = [(network, share, views) for network, share, views in parts if network is not None and share]
        done, total = 0, sum(views for *_, views in wanted)

        def report(tiles: int) -> None:
            nonlocal done
            done += 1
            if on_tile is not None:
                on_tile(Progress(done, total * tiles, upsampled[inside]))

        for network, share, views in wanted:
            network.add_to(upsampled, low_res, *self.compute(), views, report, share)
        return upsampled[inside]

    def upsample(
        self,
        low_res: Tensor,
        margin: int = 0,
        on_tile: Callable[[Progress], None] | None = None,
        detail: float = 0.0,
    ) -> Tensor:
        """The picture that is refined, in [-1, 1]: `predict` with all four turns."""
        return self.predict(low_res, margin, TURNS, on_tile, detail).clamp_(-1, 1)

    # --- conditioning: once per evaluation, shared by all blocks

    def conditioning(self, c_noise: Tensor, semantic: Tensor | None = None) -> Tensor:
        """silu(time + semantics), (B, C). c_noise: (B,); semantic: (B, semantic_size), None adds nothing."""
        dtype = self.compute()[1]
        half = self.config.time_channels // 2
        frequencies = torch.exp(-torch.arange(half, device=c_noise.device) / half * torch.log(torch.tensor(10000.0)))
        angle = c_noise.float()[:, None] * frequencies
        time = torch.cat([angle.cos(), angle.sin()], dim=-1).to(dtype)
        embedding = self.time_out(F.silu(self.time_in(time)))
        if semantic is not None:
            embedding = embedding + self.semantic_out(F.silu(self.semantic_in(semantic.to(dtype))))
        return F.silu(embedding)

    def modulations(self, embedding: Tensor) -> list[Modulation]:
        """Per layer (shift, scale, mlp_shift, mlp_scale), last the final (shift, scale). SiLU is applied again."""
        activated = F.silu(embedding)
        makers = [(layer.modulation, 4) for layer in self.layers] + [(self.final_modulation, 2)]
        return [tuple(make(activated)[:, None, None, None].chunk(n, dim=-1)) for make, n in makers]

    # --- one tile

    def run_tile(
        self,
        x: Tensor,
        modulations: list[Modulation],
        lr_keys_values: Tensor,
        rotation: Tensor,
        scan: Scan,
        cache: KVCache,
        tile: Tile,
    ) -> Tensor:
        """All layers over the tokens of one tile in scan order, (B, rows, cols, N, C) -> the same."""
        here: dict[str, Any] = {"device": x.device, "dtype": x.dtype}  # a host may leave raw parameters elsewhere
        low_res = (lr_keys_values, self.lr_query_position.to(**here), self.lr_key_position.to(**here))
        for index, (layer, modulation) in enumerate(zip(self.layers, modulations, strict=False)):
            positions = self.neighbour_position[index].to(**here)
            border = cache.border(index, tile, x.device)
            keep = partial(cache.keep, index, tile) if len(scan.tiles) > 1 else None
            arguments = (x, modulation, rotation, positions, scan, border, keep, low_res)
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, *arguments, use_reentrant=False)
            else:
                x = layer(*arguments)
        return x

    def denoise(
        self,
        noisy: Tensor,
        sigma: Tensor | float,
        low_res: Tensor,
        *,
        upsampled: Tensor | None = None,
        semantic: Tensor | None = None,
        tile: tuple[int, int] | None = None,
        direction: Direction = "lt",
        positions: Positions = "reference",
        offset: tuple[int, int] = (0, 0),
        cache_device: torch.device | str | None = None,
        on_tile: Callable[[Progress], None] | None = None,
    ) -> Tensor:
        """D(x; sigma), the estimate of the clean picture: one evaluation of the network (EDM eq. 7).

        noisy: (B, 3, H, W), picture plus noise of deviation sigma, H and W multiples of the block size.
        sigma: 0-d or (B,). low_res: (B, 3, H / scale, W / scale) in [-1, 1]; training crops may bring one more block
        of it on every side, then nothing is zero-padded. upsampled: (B, 3, H, W) in [-1, 1], None: made by `upsample`.
        semantic: (B, semantic_size) or None. tile: (rows, cols) blocks a step, None: all at once, the only way that
        carries gradients; the result is the same for every tile. direction: which neighbours a block sees,
        "lt" left and top or "rb" right and bottom. positions: "reference" wraps after `rope_side` patches like the
        published code, "continuous" doesn't. offset: added to row and column positions (training).
        cache_device: where K/V of finished blocks wait, None: where the network computes.
        on_tile is called after every tile; what it raises ends the evaluation.
        The pictures may stay on another device than the network: only tiles travel.

        Returns (B, 3, H, W) fp32 on noisy's device. Raises ValueError for shapes that don't fit.
        """
        config, (device, dtype) = self.config, self.compute()
        scan = self._scan(noisy, low_res, tile, direction)
        if positions not in get_args(Positions):
            raise ValueError(f"positions is {positions!r}: it must be 'reference' or 'continuous'")
        if upsampled is None:
            upsampled = self.upsample(low_res, (low_res.shape[2] - noisy.shape[2] // config.scale) // 2)
        if upsampled.shape != noisy.shape:
            raise ValueError(
                f"upsampled has shape {tuple(upsampled.shape)}, noisy {tuple(noisy.shape)}: they must match"
            )
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=device)
        if tuple(sigma.shape) not in ((), (1,), (len(noisy),)):
            raise ValueError(f"sigma has shape {tuple(sigma.shape)}: it must be one number, or one a picture")
        sigma = sigma.expand(len(noisy))
        if semantic is not None and tuple(semantic.shape) not in [(b, config.semantic_size) for b in (1, len(noisy))]:
            raise ValueError(
                f"semantic has shape {tuple(semantic.shape)}: it must be {(len(noisy), config.semantic_size)}, "
                f"from a CLIP that gives {config.semantic_size} numbers"
            )
        *scalings, c_noise = PRECONDITIONINGS[config.preconditioning](sigma, config.sigma_data)
        c_skip, c_out, c_in = (c[:, None, None, None] for c in scalings)
        modulations = self.modulations(self.conditioning(c_noise, None if semantic is None else semantic.to(device)))
        cache = KVCache(scan, config.num_layers, cache_device)
        cross = self.layers[0].cross
        assert cross is not None
        lr_lines = LowResolutionLines(scan, low_res, config, self._lr_embed, cross.keys_values)
        # What isn't done yet shows as the upsampled picture in previews.
        estimate = upsampled.to(device=noisy.device, dtype=torch.float32, copy=True)
        for done, step in enumerate(scan.tiles, start=1):
            rows, cols = scan.blocks(step)
            window = (..., pixels(rows, config.block_size), pixels(cols, config.block_size))
            noise_in, guide = (t[window].to(device=device, dtype=torch.float32) for t in (noisy, upsampled))
            base = guide if config.parametrisation == "residual" else 0.0
            # The published network was trained with its LR channels scaled by c_in too.
            guide_in = guide if config.parametrisation == "residual" else c_in * guide
            x = self.patch_embed(torch.cat([c_in * (noise_in - base), guide_in], dim=1).to(dtype))
            rotation = self._rotation(rows, cols, offset, positions).to(device)
            x = self.run_tile(
                scan.arrange(_blocks(x, config.block_tokens)),
                modulations,
                lr_lines.around(step),
                scan.arrange(rotation, dim=0),
                scan,
                cache,
                step,
            )
            output = self._picture(scan.restore(x), modulations[-1])
            estimate[window] = base + c_skip * (noise_in - base) + c_out * output
            if on_tile is not None:
                on_tile(Progress(done, len(scan.tiles), estimate))
        return estimate

    forward = denoise  # what wrappers hook into: DDP, FSDP, autocast

    def _scan(self, noisy: Tensor, low_res: Tensor, tile: tuple[int, int] | None, direction: Direction) -> Scan:
        block, lr_block = self.config.block_size, self.config.block_size // self.config.scale
        if noisy.ndim != 4 or noisy.shape[1] != CHANNELS or noisy.shape[2] % block or noisy.shape[3] % block:
            raise ValueError(
                f"noisy has shape {tuple(noisy.shape)}: it must be (B, 3, H, W) with H and W multiples of {block}"
            )
        rows, cols = noisy.shape[2] // block, noisy.shape[3] // block
        expected = (len(noisy), CHANNELS, rows * lr_block, cols * lr_block)
        with_margin = (*expected[:2], expected[2] + 2 * lr_block, expected[3] + 2 * lr_block)
        if tuple(low_res.shape) not in (expected, with_margin):
            raise ValueError(f"low_res has shape {tuple(low_res.shape)}: for this noisy picture it must be {expected}")
        return Scan(rows, cols, tile or (rows, cols), direction)

    def _rotation(self, rows: range, cols: range, offset: tuple[int, int], positions: Positions) -> Tensor:
        side = self.config.block_tokens
        axes = [
            torch.arange(blocks.start * side, blocks.stop * side) + start
            for blocks, start in zip((rows, cols), offset, strict=True)
        ]
        if positions == "reference":
            axes = [axis % self.config.rope_side for axis in axes]
        return rotary_table(axes[0], axes[1], side, self.config.head_size)

    def _lr_embed(self, low_res: Tensor) -> Tensor:
        device, dtype = self.compute()
        return self.lr_embed(low_res.to(device=device, dtype=dtype))

    def _picture(self, x: Tensor, modulation: Modulation) -> Tensor:
        """Tokens (B, rows, cols, N, C) -> (B, 3, H, W) fp32."""
        side, patch = self.config.block_tokens, self.config.patch_size
        patches = self.final(_modulate(_norm(x), *modulation))
        return rearrange(
            patches, "b r s (p q) (u v c) -> b c (r p u) (s q v)", p=side, q=side, u=patch, v=patch
        ).float()
