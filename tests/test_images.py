"""Picture files: what people drop in comes out whole, in the same colours, the right way up."""

from pathlib import Path

import numpy as np
import png
import pytest
import torch
from PIL import Image

from infdit_core.images import (
    Picture,
    PictureError,
    colours_and_alpha,
    match_low_frequencies,
    match_mean_deviation,
    pad_by_reflection,
    read_picture,
    resize,
    write_picture,
)


def rgb(height: int = 12, width: int = 17) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp", ".jpg"])
def test_round_trip_keeps_pixels_and_profile(tmp_path: Path, suffix: str) -> None:
    pixels = np.kron(rgb(3, 4), np.ones((8, 8, 1), dtype=np.uint8))
    profile = b"not a real profile, but bytes are bytes"
    Image.fromarray(pixels).save(tmp_path / "in.png", icc_profile=profile)
    picture = read_picture(tmp_path / "in.png")
    write_picture(tmp_path / f"out{suffix}", picture)
    back = read_picture(tmp_path / f"out{suffix}")
    assert back.icc_profile == profile
    error = (back.pixels - picture.pixels).abs().mean()
    assert error <= {".png": 0, ".tif": 0, ".jpg": 0.02, ".webp": 0.06}[suffix]  # WebP halves the colour resolution


def test_tiff_to_tiff_keeps_what_speaks_of_the_picture(tmp_path: Path) -> None:
    """A TIFF's tags tell how it is stored, too: those must not go into another file."""
    exif = Image.Exif()
    exif[0x010E] = "a description"
    Image.fromarray(rgb()).save(tmp_path / "a.tif", exif=exif, compression="tiff_lzw")
    for suffix in (".tif", ".png", ".jpg"):
        write_picture(tmp_path / f"b{suffix}", read_picture(tmp_path / "a.tif"))
        with Image.open(tmp_path / f"b{suffix}") as image:
            assert image.getexif()[0x010E] == "a description" and image.size == (17, 12)


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("LA", 2), ("RGB", 3), ("RGBA", 4), ("1", 1), ("CMYK", 3)])
def test_modes(tmp_path: Path, mode: str, channels: int) -> None:
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.fromarray(rgb()).convert(mode).save(path)
    picture = read_picture(path)
    assert picture.pixels.shape == (12, 17, channels)
    assert picture.pixels.min() >= 0 and picture.pixels.max() <= 1


def test_palette_with_transparency_becomes_rgba(tmp_path: Path) -> None:
    image = Image.fromarray(rgb()).quantize(8)
    image.save(tmp_path / "a.png", transparency=0)
    assert read_picture(tmp_path / "a.png").pixels.shape == (12, 17, 4)
    image.save(tmp_path / "b.png")
    assert read_picture(tmp_path / "b.png").pixels.shape == (12, 17, 3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_and_removed(tmp_path: Path, orientation: int) -> None:
    image = Image.fromarray(rgb())
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010E] = "a description"
    image.save(tmp_path / "a.png", exif=exif)
    sixteen = tmp_path / "b.png"
    write_picture(sixteen, Picture(torch.from_numpy(np.asarray(image) / 255), 16, None, exif.tobytes()))
    upright = {1: 0, 2: 0, 3: 0, 4: 0}.get(orientation, 1)
    first, second = read_picture(tmp_path / "a.png"), read_picture(sixteen)
    assert first.pixels.shape[:2] == ((12, 17), (17, 12))[upright]
    assert torch.allclose(first.pixels, second.pixels, atol=1e-4), "8 and 16 bit turn the same way"
    write_picture(tmp_path / "c.png", first)
    with Image.open(tmp_path / "c.png") as out:
        assert out.getexif().get(0x0112, 1) == 1
        assert out.getexif()[0x010E] == "a description"


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_sixteen_bit_png_keeps_its_depth(tmp_path: Path, channels: int) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (5, 7, channels), dtype=np.uint16)
    writer = png.Writer(7, 5, greyscale=channels < 3, alpha=channels in (2, 4), bitdepth=16)
    with (tmp_path / "a.png").open("wb") as file:
        writer.write(file, values.reshape(5, -1))
    picture = read_picture(tmp_path / "a.png")
    assert picture.bits == 16
    write_picture(tmp_path / "b.png", picture._replace(icc_profile=b"profile"))
    _, _, rows, info = png.Reader(filename=str(tmp_path / "b.png")).asDirect()
    assert info["bitdepth"] == 16
    assert np.array_equal(np.vstack(list(rows)).reshape(5, 7, channels), values)
    assert read_picture(tmp_path / "b.png").icc_profile == b"profile"


def test_sixteen_bit_grey_keeps_the_level_that_is_transparent(tmp_path: Path) -> None:
    with (tmp_path / "a.png").open("wb") as file:
        png.Writer(2, 1, greyscale=True, bitdepth=16, transparent=300).write(file, [[300, 40000]])
    picture = read_picture(tmp_path / "a.png")
    assert picture.bits == 16
    assert (picture.pixels * 65535).round().tolist() == [[[300, 0], [40000, 65535]]]


def test_bad_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("hello")
    Image.fromarray(rgb(64, 64)).save(tmp_path / "whole.png")
    (tmp_path / "short.png").write_bytes((tmp_path / "whole.png").read_bytes()[:3000])
    Image.fromarray(np.full((3, 3), 70000, dtype=np.int32)).save(tmp_path / "deep.tif")
    for name, said in [
        ("empty.png", "is empty"),
        ("text.png", "is not a picture"),
        ("short.png", "can't be read"),
        ("deep.tif", "no known range"),
        ("no.png", "exist"),
    ]:
        with pytest.raises(PictureError, match=said):
            read_picture(tmp_path / name)


def test_nothing_is_overwritten_or_half_written(tmp_path: Path) -> None:
    Image.fromarray(rgb()).save(tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()
    picture = read_picture(tmp_path / "a.png")
    with pytest.raises(PictureError, match="--overwrite"):
        write_picture(tmp_path / "a.png", picture)
    with pytest.raises(PictureError, match="transparency"):
        write_picture(tmp_path / "b.jpg", picture._replace(pixels=torch.rand(3, 3, 4)))
    with pytest.raises(PictureError, match=r"can't write \.xyz"):
        write_picture(tmp_path / "b.xyz", picture)
    with pytest.raises(PictureError, match="16383"):
        write_picture(tmp_path / "b.webp", picture._replace(pixels=torch.rand(1, 17000, 3)))
    assert (tmp_path / "a.png").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_the_longest_name_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / f"{'x' * 251}.png"
    write_picture(path, Picture(torch.rand(2, 2, 3), 8, None, None))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_resize_is_pillows_bicubic() -> None:
    pixels = rgb(24, 32)
    expected = np.asarray(Image.fromarray(pixels).resize((8, 6), Image.Resampling.BICUBIC), dtype=np.float32)
    got = resize(torch.from_numpy(pixels).permute(2, 0, 1)[None].float(), (6, 8))[0].permute(1, 2, 0).numpy()
    assert np.abs(got.round().clip(0, 255) - expected).max() <= 1


def test_what_is_transparent_goes_on_with_the_colour_that_shows() -> None:
    planes = torch.zeros(3, 4, 9, 13)
    planes[1:, 0, 2:5, 3:6] = planes[1:, 3, 2:5, 3:6] = 1  # a red square, twice; the first picture is empty
    planes[2, 2:4, :, 8:] = 1  # and something blue
    colours, alpha = colours_and_alpha(planes)
    assert torch.equal(colours[0], planes[0, :3]) and alpha is not None and torch.equal(alpha, planes[:, 3:])
    assert torch.allclose(colours[1], torch.tensor([1.0, 0, 0])[:, None, None].expand(3, 9, 13))
    assert colours[2, 2, 4, 0] < 0.1 and colours[2, 0, 3, 3:6].min() == 1 and colours[2, 2, 4, 8:].min() == 1


@pytest.mark.parametrize("length", [1, 2, 3, 5, 8])
def test_padding_reflects_as_often_as_it_takes(length: int) -> None:
    x = torch.arange(length).float().expand(1, 1, 2, -1)
    for before in (0, 1, 4, 11):
        expected = np.pad(np.arange(length), (before, 19 - length), "symmetric")
        found = pad_by_reflection(x, 3, 19 + before, before)[0, 0, 2]
        assert torch.equal(found, torch.from_numpy(expected).float())


def test_colour_transfer_undoes_a_cast() -> None:
    reference = torch.rand(1, 3, 40, 50, generator=torch.Generator().manual_seed(0))
    cast = reference * 0.7 + torch.tensor([0.1, -0.2, 0.05])[:, None, None]
    assert torch.allclose(match_mean_deviation(cast, reference), reference, atol=1e-5)
    shifted = reference + 0.2
    assert torch.allclose(match_low_frequencies(shifted, reference), reference, atol=1e-5)
