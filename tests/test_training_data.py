"""Training data: every picture that can be used is used, the others are named, and crop n is always the same crop."""

import io
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from towers import saved

from infdit_core.degradation import degrade_mildly
from infdit_core.images import resize
from infdit_core.semantics import load_clip
from infdit_core.training import data
from infdit_core.training.config import DataConfig
from infdit_core.training.data import (
    Crops,
    DataError,
    PictureFile,
    decodable,
    detail,
    find_pictures,
    loader,
    looked_at,
    reduce,
)

CloseTo = Callable[..., None]

PLAIN = DataConfig(direct=1.0, mirror=0.0, workers=0)
SIDE = 48


def names(pictures: list[PictureFile]) -> list[str]:
    return [Path(picture.name).name for picture in pictures]


def save_cut_jpeg(path: Path, source: Path) -> None:
    """Its header says a whole picture, and half of it is missing."""
    content = io.BytesIO()
    Image.open(source).save(content, "JPEG", quality=95)
    path.write_bytes(content.getvalue()[: len(content.getvalue()) // 2])


def save_shard(path: Path, files: list[Path]) -> None:
    with tarfile.open(path, "w") as shard:
        for file in files:
            shard.add(file, file.name)


@pytest.fixture
def pictures(photographs: Path) -> list[PictureFile]:
    return find_pictures([str(photographs)], SIDE)[0]


def drawn(pictures: list[PictureFile], numbers: range, config: DataConfig = PLAIN, seed: int = 0) -> Tensor:
    crops = Crops(pictures, SIDE, config, seed)
    return torch.stack([torch.from_numpy(crops[number].pixels) for number in numbers])


# --- what is found


def test_folders_are_searched_to_the_bottom_in_order_of_name(photographs: Path, tmp_path: Path) -> None:
    shutil.copy(photographs / "0.png", tmp_path / "b.png")
    (tmp_path / "a" / "deep").mkdir(parents=True)
    shutil.copy(photographs / "1.png", tmp_path / "a" / "deep" / "c.PNG")
    (tmp_path / "notes.txt").write_text("not a picture")
    found, skipped = find_pictures([str(tmp_path)], SIDE)
    assert names(found) == ["c.PNG", "b.png"]
    assert not skipped


def test_patterns_single_files_and_several_places_add_up(photographs: Path) -> None:
    assert names(find_pictures([f"{photographs}/[12].png"], SIDE)[0]) == ["1.png", "2.png"]
    found, _ = find_pictures([str(photographs / "3.png"), f"{photographs}/0*"], SIDE)
    assert names(found) == ["3.png", "0.png"]


def test_nothing_to_train_on_is_an_error_that_says_why(photographs: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere doesn't exist; give a folder"):
        find_pictures([str(tmp_path / "nowhere")], SIDE)
    with pytest.raises(DataError, match=r"no picture of at least 48 x 48 px \(\.png"):
        find_pictures([str(tmp_path)], SIDE)
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text("hello")
    with pytest.raises(DataError, match="no picture of at least"):
        find_pictures([str(tmp_path)], SIDE)
    with pytest.raises(DataError, match=r"4 were skipped, .*0\.png because it has 112 x 96 px"):
        find_pictures([str(photographs)], 100)


def test_small_and_unreadable_pictures_are_skipped_and_named(photographs: Path, tmp_path: Path) -> None:
    shutil.copy(photographs / "0.png", tmp_path / "good.png")
    Image.new("RGB", (200, SIDE - 1)).save(tmp_path / "low.png")
    Image.new("RGB", (SIDE, SIDE)).save(tmp_path / "exact.png")
    Image.new("I;16", (100, 100)).save(tmp_path / "sixteen.png")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("hello")
    found, skipped = find_pictures([str(tmp_path)], SIDE)
    assert names(found) == ["exact.png", "good.png"]
    reasons = {Path(name).name: reason for name, reason in skipped}
    assert reasons.keys() == {"low.png", "sixteen.png", "empty.jpg", "text.jpg"}
    assert reasons["low.png"] == "it has 200 x 47 px, the shorter side under 48"
    assert "8 bits" in reasons["sixteen.png"]
    assert "can't be opened" in reasons["empty.jpg"]


def test_damaged_pictures_are_told_from_whole_ones(photographs: Path, tmp_path: Path) -> None:
    save_cut_jpeg(tmp_path / "cut.jpg", photographs / "0.png")
    shutil.copy(photographs / "1.png", tmp_path)
    found, skipped = find_pictures([str(tmp_path)], SIDE)
    assert (len(found), skipped) == (2, [])  # the header of the damaged one is fine
    whole, damaged = decodable(found)
    assert names(whole) == ["1.png"]
    assert [Path(name).name for name, _ in damaged] == ["cut.jpg"]
    assert "truncated" in damaged[0].reason
    with pytest.raises(DataError, match=r"cut\.jpg: it is damaged"):
        decodable([picture for picture in found if picture not in whole])


# --- shards


def test_a_shard_gives_the_crops_of_its_files(photographs: Path, pictures: list[PictureFile], tmp_path: Path) -> None:
    (tmp_path / "caption.txt").write_text("waves")
    save_shard(tmp_path / "0.tar", [*sorted(photographs.glob("[01]*")), tmp_path / "caption.txt"])
    save_shard(tmp_path / "1.tar", sorted(photographs.glob("[23]*")))
    for location in (str(tmp_path), f"{tmp_path}/*.tar"):
        found, skipped = find_pictures([location], SIDE)
        assert not skipped
        assert [picture.name.rpartition(": ")[2] for picture in found] == ["0.png", "1.png", "2.png", "3.png"]
        assert torch.equal(drawn(found, range(12)), drawn(pictures, range(12)))


def test_headers_of_a_shard_are_read_without_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (400, 300, 3), dtype=np.uint8))
    files = [tmp_path / f"noise.{kind}" for kind in ("png", "jpg", "webp", "tiff")]
    for file in files:
        noise.save(file)
    save_shard(tmp_path / "formats.tar", files)
    read: list[tuple[str, int]] = []
    real = PictureFile.read

    def counting(picture: PictureFile, most: int | None = None) -> bytes:
        content = real(picture, most)
        read.append((Path(picture.name).suffix, len(content)))
        return content

    monkeypatch.setattr(PictureFile, "read", counting)
    found, skipped = find_pictures([str(tmp_path / "formats.tar")], SIDE)
    assert (len(found), skipped) == (4, [])  # WebP and TIFF are read whole where their start is not enough
    assert [size for suffix, size in read if suffix == ".png"] == [2**16]
    monkeypatch.undo()
    assert decodable(found) == (found, [])


def test_a_shard_cut_short_keeps_its_whole_pictures_and_names_the_loss(photographs: Path, tmp_path: Path) -> None:
    files = sorted(photographs.iterdir())
    save_shard(tmp_path / "whole.tar", files)
    whole = (tmp_path / "whole.tar").read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as shard:
        third = shard.getmembers()[2]
    path = tmp_path / "cut.tar"
    for place, loss in (
        (third.offset_data + third.size // 2, "cut.tar: 2.png and what follows"),
        (third.offset + 100, "cut.tar, after 2 pictures"),
        (third.offset, "cut.tar, after 2 pictures"),
    ):
        path.write_bytes(whole[:place])
        found, skipped = find_pictures([str(path)], SIDE)
        assert [picture.name.rpartition(": ")[2] for picture in found] == ["0.png", "1.png"]
        assert [picture.read() for picture in found] == [file.read_bytes() for file in files[:2]]
        assert [skip.name.rpartition("/")[2] for skip in skipped] == [loss]


def test_a_damaged_shard_among_good_ones_is_skipped(photographs: Path, tmp_path: Path) -> None:
    save_shard(tmp_path / "good.tar", sorted(photographs.iterdir()))
    damaged = bytearray((tmp_path / "good.tar").read_bytes())
    with tarfile.open(tmp_path / "good.tar") as shard:
        place = shard.getmembers()[1].offset
    damaged[place : place + 300] = b"\xff" * 300
    (tmp_path / "damaged.tar").write_bytes(damaged)
    (tmp_path / "empty.tar").touch()
    (tmp_path / "text.tar").write_text("hello" * 1000)
    found, skipped = find_pictures([str(tmp_path)], SIDE)
    assert len(found) == 1 + 4
    assert {Path(name.partition(",")[0]).name for name, _ in skipped} == {"damaged.tar", "empty.tar", "text.tar"}


# --- crops


def test_crops_differ_by_number_and_by_seed(pictures: list[PictureFile]) -> None:
    crops = drawn(pictures, range(6))
    assert crops.shape == (6, SIDE, SIDE, 3)
    assert len({crop.numpy().tobytes() for crop in crops}) == 6
    assert not torch.equal(crops, drawn(pictures, range(6), seed=1))


def test_a_crop_is_the_same_whatever_batch_draws_it(pictures: list[PictureFile]) -> None:
    config = replace(PLAIN, direct=0.5, mirror=0.5, turn=True, candidates=2)
    expected = drawn(pictures, range(12), config).permute(0, 3, 1, 2)

    def loaded(batch: int, batches: range, workers: int = 0) -> Tensor:
        crops = Crops(pictures, SIDE, replace(config, workers=workers), seed=0)
        return torch.cat([part.crops for part in loader(crops, batch, batches)])

    assert torch.equal(loaded(2, range(6)), expected)
    assert torch.equal(loaded(3, range(4)), expected)
    assert torch.equal(loaded(2, range(4, 6)), expected[8:])  # as a run that goes on
    assert torch.equal(loaded(2, range(1, 6, 2)), expected.unflatten(0, (6, 2))[1::2].flatten(0, 1))  # one of two
    assert torch.equal(loaded(2, range(6), workers=2), expected)


def test_a_small_cache_changes_no_crop(pictures: list[PictureFile]) -> None:
    crops = Crops(pictures, SIDE, replace(PLAIN, cache=2.5 * 112 * 96 * 3 / 2**30), seed=0)
    found = torch.stack([torch.from_numpy(crops[number].pixels) for number in range(12)])
    assert torch.equal(found, drawn(pictures, range(12)))
    assert len(crops.decoded) == 2
    assert crops.decoded_bytes == sum(pixels.nbytes for pixels in crops.decoded.values())


def test_a_cached_picture_is_decoded_once(pictures: list[PictureFile], monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    monkeypatch.setattr(data, "read_pixels", lambda picture: read.append(picture.name) or data_read(picture))
    drawn([*pictures, *pictures], range(20))  # some may be listed more than once
    assert sorted(read) == [picture.name for picture in pictures]


data_read = data.read_pixels


class Shares:
    """Counts what was done to crops of a picture whose pixels say where they stand."""

    def __init__(self, tmp_path: Path, config: DataConfig) -> None:
        y, x = np.mgrid[: 4 * SIDE, : 5 * SIDE]
        Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8)).save(tmp_path / "places.png")
        crops = Crops(find_pictures([str(tmp_path)], SIDE)[0], SIDE, config, seed=0)
        self.counts = {"direct": 0, "mirrored": 0, "upside down": 0, "turned": 0}
        self.corners: list[tuple[int, int]] = []
        self.count = 500
        for number in range(self.count):
            place = crops[number].pixels.astype(int)
            if place[..., 0].max() - place[..., 0].min() > SIDE:  # enlarged steps: it was resized
                continue
            turned = place[0, 0, 0] == place[0, -1, 0]
            place = place.swapaxes(0, 1) if turned else place
            self.counts["direct"] += 1
            self.counts["turned"] += turned
            self.counts["mirrored"] += place[0, 0, 0] > place[0, -1, 0]
            self.counts["upside down"] += place[0, 0, 1] > place[-1, 0, 1]
            self.corners.append((place[..., 0].min(), place[..., 1].min()))

    def share(self, what: str, of: str | None = None) -> float:
        return self.counts[what] / (self.counts[of] if of else self.count)


def test_shares_of_the_published_recipe(tmp_path: Path) -> None:
    shares = Shares(tmp_path, DataConfig())
    assert shares.share("direct") == pytest.approx(0.7, abs=0.05)
    assert shares.share("mirrored", "direct") == pytest.approx(0.3, abs=0.05)
    assert shares.counts["turned"] == shares.counts["upside down"] == 0


def test_turned_crops_are_halves(tmp_path: Path) -> None:
    shares = Shares(tmp_path, DataConfig(direct=1.0, mirror=0.5, turn=True))
    for what in ("mirrored", "upside down", "turned"):
        assert shares.share(what) == pytest.approx(0.5, abs=0.06)


def test_crops_come_from_everywhere_to_the_edges(tmp_path: Path) -> None:
    corners = Shares(tmp_path, DataConfig(direct=1.0)).corners
    for axis, last in ((0, 4 * SIDE), (1, 3 * SIDE)):
        values = [corner[axis] for corner in corners]
        assert min(values) <= 2
        assert last - 2 <= max(values) <= last


def test_other_crops_show_the_whole_short_side(tmp_path: Path) -> None:
    y, x = np.mgrid[: 3 * SIDE, : 5 * SIDE]
    Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8)).save(tmp_path / "wide.png")
    Image.fromarray(np.stack([x.T, y.T, 0 * x.T], -1).astype(np.uint8)).save(tmp_path / "tall.png")
    crops = drawn(find_pictures([str(tmp_path)], SIDE)[0], range(40), replace(PLAIN, direct=0.0)).int()
    short, long = crops[..., 1], crops[..., 0]
    assert (short.amin((1, 2)) <= 2).all()
    assert (short.amax((1, 2)) >= 3 * SIDE - 3).all()
    assert ((long.amax((1, 2)) - long.amin((1, 2)) - 3 * SIDE).abs() <= 5).all()
    assert len(set(long.amin((1, 2)).tolist())) > 10


def test_the_most_detailed_of_several_candidates_is_taken(tmp_path: Path) -> None:
    pixels = np.full((200, 200, 3), 128, dtype=np.uint8)
    pixels[:60, :60] = np.kron(np.random.default_rng(0).integers(0, 255, (15, 15, 1)), np.ones((4, 4, 3)))
    Image.fromarray(pixels).save(tmp_path / "corner.png")
    found = find_pictures([str(tmp_path)], SIDE)[0]
    one, many = (
        np.mean([detail(crop.numpy()) for crop in drawn(found, range(30), replace(PLAIN, candidates=candidates))])
        for candidates in (1, 8)
    )
    assert many > 2 * one


def test_a_folder_keeps_its_share_however_much_detail_another_has(tmp_path: Path) -> None:
    flat, busy = np.full((SIDE, SIDE, 3), 128, np.uint8), np.zeros((SIDE, SIDE, 3), np.uint8)
    busy[: SIDE // 2] = 255
    for name, pixels in ("flat", flat), ("busy", busy):
        (tmp_path / name).mkdir()
        Image.fromarray(pixels).save(tmp_path / name / "picture.png")
    found = find_pictures([str(tmp_path / "flat"), str(tmp_path / "busy")], SIDE)[0]
    crops = drawn(found, range(60), replace(PLAIN, candidates=8))
    assert 20 < sum(detail(crop.numpy()) > 0 for crop in crops) < 40


# --- damage that only decoding finds


def test_a_damaged_picture_is_named_and_another_one_drawn(photographs: Path, tmp_path: Path) -> None:
    save_cut_jpeg(tmp_path / "cut.jpg", photographs / "0.png")
    shutil.copy(photographs / "1.png", tmp_path)
    found = find_pictures([str(tmp_path)], SIDE)[0]
    loaded = list(loader(Crops(found, SIDE, PLAIN, seed=0), 4, range(4)))
    assert all(part.crops.shape == (4, 3, SIDE, SIDE) for part in loaded)
    broken = [skipped for part in loaded for skipped in part.broken]
    assert broken
    assert {Path(name).name for name, _ in broken} == {"cut.jpg"}
    assert all("truncated" in reason for _, reason in broken)


def test_nothing_but_damaged_pictures_is_an_error(photographs: Path, tmp_path: Path) -> None:
    save_cut_jpeg(tmp_path / "cut.jpg", photographs / "0.png")
    crops = Crops(find_pictures([str(tmp_path)], SIDE)[0], SIDE, PLAIN, seed=0)
    with pytest.raises(DataError, match=r"couldn't be decoded: .*cut\.jpg"):
        crops[0]


# --- what the network is given


def reduced(
    crops: Tensor, degraded: list[bool], margin: int = 0, seed: int = 0, mild: list[bool] | None = None
) -> data.Batch:
    generator = torch.Generator().manual_seed(seed)
    return reduce(crops, 4, margin, torch.tensor(degraded), torch.tensor(mild or [False] * len(crops)), 1.0, generator)


def test_clean_low_resolution_is_pillows(pictures: list[PictureFile]) -> None:
    crops = drawn(pictures, range(4)).permute(0, 3, 1, 2)
    batch = reduced(crops, [False] * 4)
    levels = (batch.low_res + 1) * 127.5
    assert (levels - levels.round()).abs().max() < 1e-3  # 8 bits, as in a file
    for crop, found in zip(crops, levels, strict=True):
        image = Image.fromarray(crop.permute(1, 2, 0).numpy())
        expected = np.asarray(image.resize((SIDE // 4, SIDE // 4), Image.Resampling.BICUBIC), dtype=np.float32)
        assert np.abs(found.permute(1, 2, 0).numpy() - expected).max() <= 1.01
    torch.testing.assert_close((batch.original + 1) * 127.5, crops.float())


def test_low_resolution_is_enlarged_as_the_network_does_it(pictures: list[PictureFile], assert_close: CloseTo) -> None:
    batch = reduced(drawn(pictures, range(2)).permute(0, 3, 1, 2), [False, True])
    assert_close(batch.upsampled, resize(batch.low_res, (SIDE, SIDE)).clamp(-1, 1), 1e-6)


def test_only_the_marked_samples_are_degraded(pictures: list[PictureFile]) -> None:
    crops = drawn(pictures, range(4)).permute(0, 3, 1, 2)
    clean, mixed = reduced(crops, [False] * 4), reduced(crops, [False, True, False, True])
    differs = [not torch.equal(a, b) for a, b in zip(clean.low_res, mixed.low_res, strict=True)]
    assert differs == [False, True, False, True]
    assert [not torch.equal(a, b) for a, b in zip(clean.upsampled, mixed.upsampled, strict=True)] == differs
    assert torch.equal(clean.original, mixed.original)
    assert mixed.low_res.abs().max() <= 1
    assert torch.equal(reduced(crops, differs).low_res, mixed.low_res)
    assert not torch.equal(reduced(crops, differs, seed=1).low_res, mixed.low_res)


def test_mild_degradation_is_noise_and_jpeg_on_the_clean_low_resolution(pictures: list[PictureFile]) -> None:
    crops = drawn(pictures, range(4)).permute(0, 3, 1, 2)
    clean = reduced(crops, [False] * 4)
    mixed = reduced(crops, [False, True, False, True], mild=[False, False, True, True])
    assert torch.equal(mixed.low_res[[0, 2]], clean.low_res[[0, 2]])  # mild says how, not whether
    once = degrade_mildly(clean.low_res[3:] / 2 + 0.5, torch.Generator().manual_seed(0))
    alone = reduced(crops[3:], [True], mild=[True])
    torch.testing.assert_close(alone.low_res, once * 2 - 1)
    assert not torch.equal(mixed.low_res[3], clean.low_res[3])


def test_margins_line_up_with_the_original(pictures: list[PictureFile], assert_close: CloseTo) -> None:
    margin = 16
    crops = torch.stack([torch.from_numpy(Crops(pictures, 80, PLAIN, seed=0)[n].pixels) for n in range(3)])
    crops = crops.permute(0, 3, 1, 2)
    batch = reduced(crops, [False] * 3, margin)
    assert batch.low_res.shape == (3, 3, 20, 20)
    assert batch.original.shape == batch.upsampled.shape == (3, 3, 48, 48)
    inside = crops[:, :, margin:-margin, margin:-margin]
    assert_close((batch.original + 1) * 127.5, inside.float(), 1e-3)
    # Its part of the low resolution is what the original alone gives, but for its own border.
    alone = reduced(inside, [False] * 3)
    inner = (..., slice(2, -2), slice(2, -2))
    assert_close(batch.low_res[:, :, 4:-4, 4:-4][inner], alone.low_res[inner], 1.01 / 127.5)
    wide = (..., slice(8, -8), slice(8, -8))
    assert (batch.upsampled[wide] - alone.upsampled[wide]).abs().max() < 3 / 127.5


def test_clip_sees_the_crop_without_its_surroundings(photographs: Path, tmp_path: Path) -> None:
    clip = load_clip(saved(tmp_path, "small ViT"))
    crops = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    batch = looked_at(reduced(crops, [False, False], margin=16), 4, clip)
    assert batch.semantic is not None
    assert torch.equal(batch.semantic, clip.encode_image(batch.low_res[:, :, 4:12, 4:12]))
