"""Picture files <-> tensors; resize, pad, colour."""

import io
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .weights import write_atomically

READABLE = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif")
WRITABLE = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".tif": "TIFF", ".tiff": "TIFF"}
_LONGEST_SIDE = {"JPEG": 65500, "WEBP": 16383}
_ORIENTATION = 0x0112  # EXIF
# EXIF entries that speak of the picture's origin, its resolution, and the EXIF, GPS and interoperability blocks. The
# others describe how the old file stored its pixels (in a TIFF), which no longer holds.
_KEPT_EXIF = {270, 271, 272, 282, 283, 296, 305, 306, 315, 316, 33432, 0x8769, 0x8825, 0xA005}


class PictureError(ValueError):
    """A picture file that can't be read or written; the message says what was found and what to do."""


class Picture(NamedTuple):
    """A picture and what has to be kept with it."""

    pixels: Tensor  # (H, W, C) fp32 in 0..1; C = 1 grey, 2 grey and alpha, 3 RGB, 4 RGBA
    bits: int  # 8 or 16 a channel
    icc_profile: bytes | None  # of the pixels as they stand
    exif: bytes | None  # upright: the orientation is applied to the pixels


# --- files


def read_picture(path: str | os.PathLike[str]) -> Picture:
    """Read a PNG, JPEG, WebP, TIFF, BMP or GIF (its first frame): upright, palettes resolved.

    16-bit grey and 16-bit PNG keep their depth; CMYK becomes RGB without its profile. Raises PictureError.
    """
    path = Path(path)
    try:
        with Image.open(path) as image:
            profile = image.info.get("icc_profile")
            mode, is_png = image.mode, image.format == "PNG"
            image.load()
            exif = image.getexif()
            orientation = exif.get(_ORIENTATION, 1)
            turned = ImageOps.exif_transpose(image)
            deep = mode in ("RGB", "RGBA", "LA") or "transparency" in image.info
            if is_png and _png_depth(path) == 16 and deep:
                pixels, bits = _read_png16(path), 16  # Pillow would give 8
                pixels = _turn(pixels, orientation)
            else:
                pixels, bits = _to_array(turned)
            if mode not in ("RGB", "RGBA", "P", "PA", "L", "LA", "1", "I;16", "I;16B", "I"):
                profile = None
            return Picture(torch.from_numpy(pixels), bits, profile, _kept_exif(exif))
    except FileNotFoundError:
        raise PictureError(f"{path} doesn't exist") from None
    except UnidentifiedImageError:
        size = path.stat().st_size
        what = "is empty" if size == 0 else f"is not a picture ({size} bytes of something else)"
        raise PictureError(f"{path} {what}; give a {', '.join(READABLE)} file") from None
    except Image.DecompressionBombError as error:
        raise PictureError(f"{path}: {error}; cut it into smaller pictures first") from None
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error) as error:
        raise PictureError(f"{path} can't be read: {error}; the file may be cut short or damaged") from error


def _kept_exif(exif: Image.Exif) -> bytes | None:
    for tag in [tag for tag in exif if tag not in _KEPT_EXIF]:
        del exif[tag]
    try:
        return exif.tobytes() if len(exif) else None
    except (ValueError, TypeError, struct.error, OverflowError):
        return None  # entries no standard allows: the picture is worth more than they are


def _to_array(image: Image.Image) -> tuple[np.ndarray[Any, Any], int]:
    """(H, W, C) fp32 in 0..1 and the bit depth."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range; save the picture with 8 or 16 bits a channel")
    if image.mode in ("I;16", "I;16B", "I;16L", "I"):
        levels = np.asarray(image, dtype=np.float32)
        if levels.min() < 0 or levels.max() > 65535:
            raise ValueError("32-bit levels have no known range; save the picture with 8 or 16 bits a channel")
        return levels[..., None] / 65535, 16
    if "transparency" in image.info or image.mode in ("PA", "La", "RGBa"):
        image = image.convert("RGBA")
    elif image.mode == "1":
        image = image.convert("L")
    elif image.mode not in ("L", "LA", "RGB", "RGBA"):
        image = image.convert("RGB")
    pixels = np.asarray(image, dtype=np.float32) / 255
    return pixels[..., None] if pixels.ndim == 2 else pixels, 8


def _png_depth(path: Path) -> int:
    with path.open("rb") as file:
        return file.read(25)[24]


def _read_png16(path: Path) -> np.ndarray[Any, Any]:
    import png

    try:
        width, height, rows, info = png.Reader(filename=str(path)).asDirect()
        values = np.vstack([np.asarray(row, dtype=np.uint16) for row in rows])
    except png.Error as error:
        raise ValueError(str(error)) from error
    return values.reshape(height, width, info["planes"]).astype(np.float32) / 65535


def _turn(pixels: np.ndarray[Any, Any], orientation: int) -> np.ndarray[Any, Any]:
    """Undo an EXIF orientation, as ImageOps.exif_transpose does."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    vertical, horizontal = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    return np.ascontiguousarray(pixels[:: -1 if vertical else 1, :: -1 if horizontal else 1])


def check_writable(
    path: str | os.PathLike[str], size: tuple[int, int] = (1, 1), channels: int = 3, *, overwrite: bool = False
) -> None:
    """Raise PictureError if a picture of such (height, width) and channels can't go to `path`: before work is done."""
    path = Path(path)
    if path.suffix.lower() not in WRITABLE:
        raise PictureError(f"{path}: can't write {path.suffix or 'a file without suffix'}; use {', '.join(WRITABLE)}")
    kind = WRITABLE[path.suffix.lower()]
    longest = _LONGEST_SIDE.get(kind, max(size))
    if max(size) > longest:
        raise PictureError(
            f"{path}: {kind} ends at {longest} pixels a side, this is {size[1]} x {size[0]}; write .png or .tif"
        )
    if channels in (2, 4) and kind == "JPEG":
        raise PictureError(f"{path}: JPEG has no transparency, and this picture has; write .png, .webp or .tif")
    if path.exists() and not overwrite:
        raise PictureError(f"{path} exists; nothing was written. Choose another name, or allow it with --overwrite")
    if not path.parent.is_dir():
        raise PictureError(f"folder {path.parent} doesn't exist")
    if not os.access(path.parent, os.W_OK):
        raise PictureError(f"folder {path.parent} can't be written to")


def write_picture(path: str | os.PathLike[str], picture: Picture, *, overwrite: bool = False) -> None:
    """Write a picture as its suffix says, atomically; 16 bit where the format and Pillow can. Raises PictureError."""
    path = Path(path)
    height, width, channels = picture.pixels.shape
    check_writable(path, (height, width), channels, overwrite=overwrite)
    kind = WRITABLE[path.suffix.lower()]
    deep = picture.bits == 16 and (kind == "PNG" or (kind == "TIFF" and channels == 1))
    levels = np.empty((height, width, channels), dtype=np.uint16 if deep else np.uint8)
    for top in range(0, height, 256):  # in bands: a whole copy in fp32 may not fit beside a large picture
        band = picture.pixels[top : top + 256].clamp(0, 1) * (65535 if deep else 255)
        levels[top : top + 256] = band.round().numpy()
    keep: dict[str, Any] = {"icc_profile": picture.icc_profile, "exif": picture.exif}
    keep = {name: value for name, value in keep.items() if value}
    options: dict[str, Any] = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"quality": 95}}.get(kind, {})
    save: Callable[[Any], None]
    if kind == "JPEG" and len(keep.get("exif", b"")) > 65000:
        del keep["exif"]  # more than JPEG can hold
    if deep and channels > 1:
        encoded = _png16(levels, picture.icc_profile, picture.exif)

        def save(file: Any) -> None:
            file.write(encoded)
    else:
        image = Image.fromarray(levels[..., 0] if channels == 1 else levels)

        def save(file: Any) -> None:
            image.save(file, format=kind, **options, **keep)

    try:
        write_atomically(path, save)
    except (OSError, ValueError) as error:
        raise PictureError(f"{path} can't be written: {error}") from error


def _png16(levels: np.ndarray[Any, Any], icc_profile: bytes | None, exif: bytes | None) -> bytes:
    import png

    height, width, channels = levels.shape
    writer = png.Writer(width, height, greyscale=channels <= 2, alpha=channels in (2, 4), bitdepth=16, compression=3)
    buffer = io.BytesIO()
    writer.write(buffer, levels.reshape(height, -1))

    def chunks() -> Iterator[tuple[bytes, bytes]]:
        for kind, data in png.Reader(bytes=buffer.getvalue()).chunks():
            yield kind, data
            if kind == b"IHDR" and icc_profile:
                yield b"iCCP", b"ICC\0\0" + zlib.compress(icc_profile)
            if kind == b"IHDR" and exif:
                yield b"eXIf", exif.removeprefix(b"Exif\0\0")

    result = io.BytesIO()
    png.write_chunks(result, chunks())
    return result.getvalue()


# --- tensors


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bicubic with antialiasing (a = -0.5, Pillow's kernel), (B, C, h, w) -> (B, C, *size), not clamped."""
    return F.interpolate(x, size=tuple(size), mode="bicubic", antialias=True, align_corners=False)


def pad_by_reflection(x: Tensor, height: int, width: int, before: int = 0) -> Tensor:
    """Continue (B, C, h, w) by reflection at its edges, as often as it takes, to (B, C, height, width).

    The outermost pixels come twice: so a picture and the same one enlarged go on alike. before: pixels that come on the
    left and on top; the rest comes on the other sides, or is cut off there.
    """

    def reflected(length: int, target: int) -> Tensor:
        index = torch.arange(-before, target - before, device=x.device) % (2 * length)
        return torch.where(index < length, index, 2 * length - 1 - index)

    if not before and tuple(x.shape[2:]) == (height, width):
        return x
    return x[:, :, reflected(x.shape[2], height)][..., reflected(x.shape[3], width)]


def colours_and_alpha(planes: Tensor) -> tuple[Tensor, Tensor | None]:
    """(B, 3, h, w) and (B, 1, h, w) of 1 to 4 planes: grey, grey and alpha, RGB or RGBA; None without alpha.

    What is wholly transparent gets the colour of what shows around it: hidden black would make a dark fringe where the
    edge of a cut-out is enlarged.
    """
    if planes.shape[1] not in (2, 4):
        return planes.expand(-1, 3, -1, -1), None
    colours, alpha = planes[:, :-1].expand(-1, 3, -1, -1), planes[:, -1:]
    shown = [_continue_colours(*one) for one in zip(colours.split(1), alpha.split(1), strict=True)]
    return torch.cat(shown), alpha


def _continue_colours(colours: Tensor, alpha: Tensor) -> Tensor:
    """Where alpha is 0 the mean of what shows around, from the nearest there is: that of areas of 2, 4, 8... pixels.

    Of one picture: where nothing of it shows, its colours stay.
    """
    hidden = alpha <= 0
    if not hidden.any() or hidden.all():
        return colours
    shown = F.avg_pool2d(alpha, 2, ceil_mode=True)
    mean = F.avg_pool2d(colours * alpha, 2, ceil_mode=True) / shown.clamp(min=torch.finfo(shown.dtype).tiny)
    around = F.interpolate(_continue_colours(mean, shown), size=colours.shape[2:], mode="bilinear")
    return torch.where(hidden, around, colours)


def match_mean_deviation(x: Tensor, reference: Tensor) -> Tensor:
    """Give every channel of (B, C, H, W) the mean and deviation of the reference's."""
    (mean, deviation), (wanted_mean, wanted_deviation) = (
        (t.mean((2, 3), keepdim=True), t.std((2, 3), keepdim=True, correction=0)) for t in (x, reference)
    )
    return (x - mean) * (wanted_deviation / deviation.clamp(min=1e-5)) + wanted_mean


def match_low_frequencies(x: Tensor, reference: Tensor, levels: int = 5) -> Tensor:
    """Replace what of (B, C, H, W) is coarser than 2^levels pixels by the reference's (a trous wavelet residue)."""

    def low(t: Tensor) -> Tensor:
        for step in (2**level for level in range(levels)):
            for axis, edges in ((3, (step, step, 0, 0)), (2, (0, 0, step, step))):
                padded, length = F.pad(t, edges, "replicate"), t.shape[axis]
                before, after = (padded.narrow(axis, start, length) for start in (0, 2 * step))
                t = (before + after).mul_(0.25).add_(t, alpha=0.5)  # kernel 1/4, 1/2, 1/4
        return t

    return x + low(reference - x)
