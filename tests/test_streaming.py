"""A picture that streams through block by block is the picture computed in one piece, in flat memory."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from infdit_core.images import resize
from infdit_core.infdit import InfDiT
from infdit_core.infdit import model as model_module
from infdit_core.infdit.model import Progress
from infdit_core.infdit.streaming import KVCache, LowResolutionLines, Scan, Tile

EXACT = 1e-5
BLOCK, LR_BLOCK, SIDE = 16, 4, 4  # pixels, low-resolution pixels and tokens along a block of the tiny network

MakeModel = Callable[..., InfDiT]
CloseTo = Callable[..., None]


class Pictures(NamedTuple):
    noisy: Tensor
    low_res: Tensor
    upsampled: Tensor
    semantic: Tensor | None

    def denoise(self, model: InfDiT, sigma: Tensor | float = 0.5, **options: Any) -> Tensor:
        return model.denoise(
            self.noisy, sigma, self.low_res, upsampled=self.upsampled, semantic=self.semantic, **options
        )


def pictures(rows: int, cols: int, batch: int = 1, *, margin: bool = False, semantic: bool = True) -> Pictures:
    generator = torch.Generator().manual_seed(rows * 100 + cols * 10 + batch)
    around = 2 * margin
    low_res = torch.rand((batch, 3, (rows + around) * LR_BLOCK, (cols + around) * LR_BLOCK), generator=generator)
    noisy, upsampled = torch.randn((2, batch, 3, rows * BLOCK, cols * BLOCK), generator=generator)
    vector = torch.randn((batch, 8), generator=generator)
    return Pictures(noisy, low_res * 2 - 1, upsampled.clamp(-1, 1), vector if semantic else None)


def count_calls(model: InfDiT, counter: Counter[str]) -> list[Any]:
    """Count what every named module of a network does; returns handles to remove again."""

    def counting(name: str) -> Callable[..., None]:
        return lambda *_: counter.update([name])

    return [module.register_forward_hook(counting(name)) for name, module in model.named_modules() if name]


@pytest.fixture
def calls(tiny_model: MakeModel) -> Any:
    """(the tiny network, how often each of its modules was called)."""
    model, counter = tiny_model(), Counter[str]()
    handles = count_calls(model, counter)
    yield model, counter
    for handle in handles:
        handle.remove()


# --- the same result


@settings(derandomize=True, deadline=None, max_examples=120)
@given(
    size=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    tile=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    direction=st.sampled_from(["lt", "rb"]),
    batch=st.integers(1, 3),
    positions=st.sampled_from(["reference", "continuous"]),
    offset=st.tuples(st.integers(0, 40), st.integers(0, 40)),
    parametrisation=st.sampled_from(["picture", "residual"]),
    margin=st.booleans(),
    semantic=st.booleans(),
)
def test_streamed_equals_whole(
    tiny_model: MakeModel,
    assert_close: CloseTo,
    size: tuple[int, int],
    tile: tuple[int, int],
    direction: str,
    batch: int,
    positions: str,
    offset: tuple[int, int],
    parametrisation: str,
    margin: bool,
    semantic: bool,
) -> None:
    """Seams between tiles, or a result that depends on how much memory was free."""
    model = tiny_model(parametrisation=parametrisation, rope_side=10)  # wraps inside of a block, and in most sizes
    data = pictures(*size, batch, margin=margin, semantic=semantic)
    sigma = torch.linspace(0.1, 3.0, batch)
    options = {"direction": direction, "positions": positions, "offset": offset}
    whole = data.denoise(model, sigma, **options)
    assert_close(data.denoise(model, sigma, tile=tile, **options), whole, EXACT)


@pytest.mark.parametrize("direction", ["lt", "rb"])
@pytest.mark.parametrize("size", [(3, 5), (5, 3), (4, 4)])
def test_every_tile(tiny_model: MakeModel, assert_close: CloseTo, size: tuple[int, int], direction: str) -> None:
    """As above, with no shape of tile left out that fits into the picture, or that is left over at its end."""
    data = pictures(*size, 2)
    whole = data.denoise(tiny_model(), direction=direction)
    for rows in range(1, size[0] + 1):
        for cols in range(1, size[1] + 1):
            assert_close(data.denoise(tiny_model(), tile=(rows, cols), direction=direction), whole, EXACT)


@pytest.mark.parametrize(("direction", "seen"), [("lt", [(0, 0), (0, 1), (1, 0), (1, 1)]), ("rb", [(1, 1), (1, 2)])])
@pytest.mark.parametrize("tile", [None, (1, 1)])
def test_every_earlier_block_counts(
    tiny_model: MakeModel, direction: str, seen: list[tuple[int, int]], tile: tuple[int, int] | None
) -> None:
    """A network that didn't look at its neighbours would stream exactly too; and its blocks wouldn't fit together."""
    data, target = pictures(2, 3), (slice(BLOCK, 2 * BLOCK), slice(BLOCK, 2 * BLOCK))  # block (1, 1)
    before = data.denoise(tiny_model(), tile=tile, direction=direction)
    for row in range(2):
        for col in range(3):
            noisy = data.noisy.clone()
            noisy[:, :, row * BLOCK : (row + 1) * BLOCK, col * BLOCK : (col + 1) * BLOCK] += 0.5
            after = data._replace(noisy=noisy).denoise(tiny_model(), tile=tile, direction=direction)
            change = (after - before)[(..., *target)].abs().max().item()
            assert change > 1e-3 if (row, col) in seen else change == 0


def test_a_batch_is_its_pictures(tiny_model: MakeModel, assert_close: CloseTo) -> None:
    """A picture would look different for what else was in the batch."""
    data, sigma = pictures(2, 3, 3), torch.tensor([0.1, 0.5, 2.0])
    together = data.denoise(tiny_model(), sigma, tile=(1, 2))
    for i in range(3):
        alone = Pictures(*(t[i : i + 1] for t in data if t is not None))
        assert_close(alone.denoise(tiny_model(), sigma[i], tile=(1, 2)), together[i : i + 1], EXACT)


# --- positions


def with_rope_side(model: InfDiT, side: int) -> InfDiT:
    other = InfDiT(replace(model.config, rope_side=side))
    other.load_state_dict(model.state_dict())
    return other.eval().requires_grad_(False)


def purely_relative(model: InfDiT) -> InfDiT:
    """The network without the embeddings of neighbours: they aren't rotated, so queries meet them turned."""
    other = with_rope_side(model, model.config.rope_side)
    other.neighbour_position.zero_()
    return other


@pytest.mark.parametrize("tile", [None, (2, 1)])
def test_continuous_positions_never_wrap(
    tiny_model: MakeModel, assert_close: CloseTo, tile: tuple[int, int] | None
) -> None:
    """A seam every 4096 pixels: blocks there would take their neighbours for far away."""
    data, small = pictures(5, 6), tiny_model(rope_side=2 * SIDE)
    large = with_rope_side(small, 1024)
    continuous = data.denoise(small, tile=tile, positions="continuous")
    assert torch.equal(continuous, data.denoise(large, tile=tile, positions="continuous"))
    assert torch.equal(continuous, data.denoise(large, tile=tile, positions="reference"))


def test_only_relative_positions_count(tiny_model: MakeModel, assert_close: CloseTo) -> None:
    """The same block would look different at another place of a large picture."""
    data, model = pictures(3, 4), purely_relative(tiny_model(rope_side=2 * SIDE))
    still = data.denoise(model, positions="continuous")
    for offset in ((0, 7), (5, 0), (123, 321)):
        assert_close(data.denoise(model, positions="continuous", offset=offset), still, 1e-4)


def test_reference_positions_wrap(tiny_model: MakeModel) -> None:
    """Comparisons with the published code at more than 4096 pixels would not be with the published code."""
    data, model = pictures(2, 5), tiny_model(rope_side=3 * SIDE)
    reference, continuous = (
        data.denoise(model, positions=p).unflatten(3, (5, BLOCK)) for p in ("reference", "continuous")
    )
    # Columns 0 to 2 are in the table; column 3 starts it again beside column 2, and column 4 sees column 3.
    assert torch.equal(reference[:, :, :, :3], continuous[:, :, :, :3])
    assert (reference - continuous)[:, :, :, 3].abs().max() > 1e-3
    again = data.denoise(model, positions="reference", offset=(3 * SIDE, 6 * SIDE)).unflatten(3, (5, BLOCK))
    assert torch.equal(again, reference)


def test_offsets_are_of_rows_and_columns(tiny_model: MakeModel) -> None:
    """Training would draw positions for one axis and use them for the other."""
    model = purely_relative(tiny_model(rope_side=3 * SIDE))
    wide, tall = pictures(1, 3), pictures(3, 1)
    for data, crossing, harmless in ((wide, (0, SIDE), (SIDE, 0)), (tall, (SIDE, 0), (0, SIDE))):
        still = data.denoise(model)
        assert (data.denoise(model, offset=harmless) - still).abs().max() < 1e-4
        assert (data.denoise(model, offset=crossing) - still).abs().max() > 1e-3


# --- low resolution beyond the crop


@pytest.mark.parametrize("tile", [(1, 1), (2, 3), (3, 2)])
@pytest.mark.parametrize("size", [(3, 4), (4, 2)])
def test_margin_takes_the_place_of_zero_padding(
    tiny_model: MakeModel, assert_close: CloseTo, size: tuple[int, int], tile: tuple[int, int]
) -> None:
    """Training crops would teach the network that pictures end everywhere."""
    model = tiny_model()
    inside, beyond = (pictures(*size, 2, margin=margin).low_res for margin in (False, True))
    padded = nn.functional.pad(model.lr_embed(inside), (2, 2, 2, 2))  # after the embedding, not before
    for low_res, features in ((inside, padded), (beyond, model.lr_embed(beyond))):
        expected = features.permute(0, 2, 3, 1)
        scan = Scan(*size, tile, "lt")
        lines = LowResolutionLines(scan, low_res, model.config, model.lr_embed, lambda f: f.expand(2, *f.shape))
        for step in scan.tiles:
            rows, cols = scan.blocks(step)
            window = expected[:, rows.start * 2 : rows.stop * 2 + 4, cols.start * 2 : cols.stop * 2 + 4]
            assert_close(lines.around(step)[1], window, EXACT)


def test_guide_picture_leaves_the_margin_out(tiny_model: MakeModel, assert_close: CloseTo) -> None:
    """Without `upsampled`, a crop's guide would be the crop and its margin, shrunk."""
    data = pictures(2, 3, margin=True)
    guide = resize(data.low_res, (4 * BLOCK, 5 * BLOCK))[:, :, BLOCK:-BLOCK, BLOCK:-BLOCK].clamp(-1, 1)
    made = tiny_model().denoise(data.noisy, 0.5, data.low_res, semantic=data.semantic)
    assert_close(made, data._replace(upsampled=guide).denoise(tiny_model()), EXACT)


def test_margin_is_seen(tiny_model: MakeModel) -> None:
    """As above, through the whole network: what lies beyond the crop changes what lies at its edge."""
    data = pictures(3, 3, margin=True)
    edge = data.low_res.clone()
    edge[:, :, -LR_BLOCK:] *= -1
    change = (data.denoise(tiny_model()) - data._replace(low_res=edge).denoise(tiny_model())).unflatten(2, (3, BLOCK))
    assert change[:, :, :2].abs().max() == 0
    assert change[:, :, 2].abs().max() > 1e-3


# --- memory


class WatchedCache(KVCache):
    """A cache that remembers the most bytes it ever held."""

    peak = 0

    def keep(self, layer: int, tile: Tile, kv: Tensor) -> None:
        super().keep(layer, tile, kv)
        held = [t for kept in (self.line, self.side, self.corner) for t in kept if t is not None]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
        WatchedCache.peak = max(WatchedCache.peak, sum(storages.values()))


def cache_peak(monkeypatch: pytest.MonkeyPatch, model: InfDiT, data: Pictures, **options: Any) -> float:
    """Most blocks whose K/V the cache holds during one evaluation, per layer."""
    monkeypatch.setattr(model_module, "KVCache", WatchedCache)
    monkeypatch.setattr(WatchedCache, "peak", 0)
    data.denoise(model, **options)
    block = 2 * len(data.noisy) * SIDE**2 * model.config.hidden_size * torch.float32.itemsize
    return WatchedCache.peak / block / model.config.num_layers


@pytest.mark.parametrize("direction", ["lt", "rb"])
@pytest.mark.parametrize("size", [(2, 6), (6, 2), (2, 12), (12, 2), (4, 4), (1, 5), (5, 1)])
def test_cache_holds_one_line_and_one_block(
    tiny_model: MakeModel, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], direction: str
) -> None:
    """Out of memory on a panorama: what is kept may grow with the shorter side only."""
    peak = cache_peak(monkeypatch, tiny_model(), pictures(*size, 2), tile=(1, 1), direction=direction)
    assert peak == (min(size) + 1 if min(size) > 1 else 1)


@pytest.mark.parametrize("tile", [(2, 2), (3, 1), (1, 3)])
@pytest.mark.parametrize("size", [(4, 9), (9, 4)])
def test_larger_tiles_add_their_own_side_only(
    tiny_model: MakeModel, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], tile: tuple[int, int]
) -> None:
    """As above for larger tiles, whose side along the line has to wait too."""
    peak = cache_peak(monkeypatch, tiny_model(), pictures(*size), tile=tile)
    assert peak <= min(size) + max(tile) + 1


def test_nothing_is_kept_of_a_whole_picture(tiny_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training in one piece would pay for a cache that nobody reads."""
    assert cache_peak(monkeypatch, tiny_model(), pictures(3, 3)) == 0


def test_low_resolution_features_are_dropped_behind_the_scan(tiny_model: MakeModel) -> None:
    """Features of a whole 8K picture would take gigabytes."""
    model = tiny_model()
    for rows, cols in ((9, 3), (3, 9)):
        scan = Scan(rows, cols, (1, 1), "lt")
        lines = LowResolutionLines(
            scan, pictures(rows, cols).low_res, model.config, model.lr_embed, model.layers[0].cross.keys_values
        )
        for step in scan.tiles:
            lines.around(step)
            assert len(lines.kept) == 3
            assert all(kept.shape[2:4].numel() == (3 + 2) * 2 * 2 for kept in lines.kept.values())


@pytest.mark.parametrize("tile", [(1, 1), (2, 3)])
def test_cache_elsewhere(tiny_model: MakeModel, tile: tuple[int, int]) -> None:
    """K/V that waits in host memory, on cards where it doesn't fit."""
    data = pictures(4, 5)
    here, there = (data.denoise(tiny_model(), tile=tile, cache_device=device) for device in (None, "cpu"))
    assert torch.equal(here, there)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("cache_device", [None, "cpu"])
def test_on_a_gpu(tiny_model: MakeModel, assert_close: CloseTo, cache_device: str | None) -> None:
    """Pictures in host memory, the network on the card, K/V on either: one result, and it comes back to the host."""
    data, model = pictures(4, 5, 2), tiny_model()
    expected = data.denoise(model)
    on_card = InfDiT(model.config, device="cuda").requires_grad_(False)
    on_card.load_state_dict(model.state_dict())
    found = data.denoise(on_card, tile=(2, 2), cache_device=cache_device)
    assert found.device.type == "cpu"
    assert_close(found, expected, 1e-3)  # a GPU's own rounding, TF32 included


# --- work


@pytest.mark.parametrize("size", [(3, 5), (5, 3)])
@pytest.mark.parametrize("tile", [(1, 1), (2, 2), (2, 1), (1, 3), (5, 5)])
def test_nothing_is_computed_twice(calls: Any, size: tuple[int, int], tile: tuple[int, int]) -> None:
    """Small tiles, which small cards need, would cost more than the time for the blocks themselves."""
    model, counter = calls
    pictures(*size).denoise(model, tile=tile)
    lines = max(size)  # the scan's lines are as short as can be
    assert counter["lr_embed"] == counter["layers.0.cross.key_value"] == lines + 2
    layers = [f"layers.{i}.modulation" for i in range(3)]
    for once in ["time_in", "time_out", "semantic_in", "semantic_out", "final_modulation", *layers]:
        assert counter[once] == 1, once
    tiles = -(-size[0] // tile[0]) * -(-size[1] // tile[1])
    for per_tile in ("patch_embed", "layers.0.qkv", "layers.2.mlp_in", "layers.0.cross.query", "final"):
        assert counter[per_tile] == tiles, per_tile


def test_progress_after_every_tile(tiny_model: MakeModel) -> None:
    """The bar and the preview: each tile once, and what is shown of it is what comes out."""
    data, seen = pictures(3, 5), []

    def on_tile(progress: Progress) -> None:
        seen.append((progress.done, progress.total, progress.estimate.clone()))

    result = data.denoise(tiny_model(), tile=(2, 2), on_tile=on_tile)
    assert [(done, total) for done, total, _ in seen] == [(i, 6) for i in range(1, 7)]
    assert torch.equal(seen[0][2][..., : 2 * BLOCK, : 2 * BLOCK], result[..., : 2 * BLOCK, : 2 * BLOCK])
    assert torch.equal(seen[-1][2], result)


class Stopped(Exception):
    pass


def test_stops_within_a_tile(calls: Any) -> None:
    """Cancel would do nothing for minutes."""
    model, counter = calls

    def on_tile(progress: Progress) -> None:
        if progress.done == 2:
            raise Stopped

    with pytest.raises(Stopped):
        pictures(3, 4).denoise(model, tile=(1, 1), on_tile=on_tile)
    assert counter["patch_embed"] == 2


# --- what can't be done


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"noisy": torch.zeros(1, 3, 33, 48)}, "multiples of 16"),
        ({"noisy": torch.zeros(1, 3, 32, 47)}, "multiples of 16"),
        ({"noisy": torch.zeros(1, 4, 32, 48)}, r"\(1, 4, 32, 48\)"),
        ({"noisy": torch.zeros(3, 32, 48)}, r"\(3, 32, 48\)"),
        ({"low_res": torch.zeros(1, 3, 8, 11)}, r"low_res .*\(1, 3, 8, 11\).* \(1, 3, 8, 12\)"),
        ({"low_res": torch.zeros(1, 1, 8, 12)}, r"low_res .*\(1, 1, 8, 12\)"),
        ({"low_res": torch.zeros(2, 3, 8, 12)}, r"low_res .*\(2, 3, 8, 12\)"),
        ({"low_res": torch.zeros(1, 3, 32, 48)}, r"low_res .*\(1, 3, 32, 48\)"),
        ({"upsampled": torch.zeros(1, 3, 32, 32)}, r"upsampled .*\(1, 3, 32, 32\)"),
        ({"upsampled": torch.zeros(1, 3, 8, 12)}, r"upsampled .*\(1, 3, 8, 12\)"),
        ({"semantic": torch.zeros(1, 7)}, r"semantic .*\(1, 7\)"),
        ({"semantic": torch.zeros(2, 8)}, r"semantic .*\(2, 8\)"),
    ],
)
def test_wrong_shapes_are_named(tiny_model: MakeModel, changes: dict[str, Tensor], said: str) -> None:
    """A traceback from inside the network says nobody what to change."""
    with pytest.raises(ValueError, match=said):
        pictures(2, 3)._replace(**changes).denoise(tiny_model())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tile": (0, 1)}, r"tile is \(0, 1\)"),
        ({"tile": (1, 0)}, r"tile is \(1, 0\)"),
        ({"tile": (2, -1)}, r"tile is \(2, -1\)"),
        ({"direction": "tl"}, "direction is 'tl'"),
        ({"positions": "wrapped"}, "positions is 'wrapped'"),
        ({"sigma": torch.ones(2)}, r"sigma .*\(2,\)"),
    ],
)
def test_wrong_options_are_named(tiny_model: MakeModel, options: dict[str, Any], said: str) -> None:
    """As above; a tile without blocks would otherwise never end."""
    with pytest.raises(ValueError, match=said):
        pictures(2, 3).denoise(tiny_model(), **options)
