"""Training crops from folders of pictures and WebDataset shards.

Crop number n is the same whatever process draws it and whenever: it has a random generator of its own, seeded with
(seed, n). So a run needs no state of its data to go on, and two devices see what one would.
"""

import io
import tarfile
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..degradation import degrade, degrade_mildly
from ..images import READABLE, resize
from ..semantics import Clip
from .config import DataConfig

Pixels = NDArray[np.uint8]  # (H, W, 3)


class DataError(ValueError):
    """Training data that can't be used; the message says what was found and what to do."""


# --- pictures


class PictureFile(NamedTuple):
    """A picture in a file of its own, or in a shard."""

    name: str  # for people
    path: Path
    start: int = 0  # in bytes
    length: int = -1  # -1: to the end

    def read(self, most: int | None = None) -> bytes:
        """Its bytes, or the first so many of them."""
        with self.path.open("rb") as file:
            file.seek(self.start)
            return file.read(self.length if most is None or 0 <= self.length < most else most)


class Skipped(NamedTuple):
    name: str
    reason: str


def find_pictures(locations: Sequence[str], least: int) -> tuple[list[PictureFile], list[Skipped]]:
    """Every picture in folders (with those below them), .tar shards and patterns of either, in order of name.

    Only headers are read. Pictures with a side under `least` pixels, what can't be opened and what a cut shard has
    lost are skipped and named. Raises DataError where nothing is left.
    """
    found: list[PictureFile] = []
    skipped: list[Skipped] = []
    for location in locations:
        paths = [Path(location)] if Path(location).exists() else _matching(location)
        if not paths:
            raise DataError(f"{location} doesn't exist; give a folder, a .tar shard, or a pattern like shards/*.tar")
        for path in paths:
            files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
            for file in files:
                if file.suffix.lower() == ".tar":
                    inside, lost = _shard(file)
                    found += inside
                    skipped += lost
                elif file.suffix.lower() in READABLE:
                    found.append(PictureFile(str(file), file))
    with ThreadPoolExecutor(16) as pool:
        faults = list(pool.map(lambda picture: _fault(picture, least), found))
    skipped += [Skipped(p.name, fault) for p, fault in zip(found, faults, strict=True) if fault]
    usable = [picture for picture, fault in zip(found, faults, strict=True) if not fault]
    if not usable:
        why = f"; {len(skipped)} were skipped, {skipped[0].name} because {skipped[0].reason}" if skipped else ""
        kinds = ", ".join(READABLE)
        raise DataError(f"{', '.join(locations)}: no picture of at least {least} x {least} px ({kinds}){why}")
    return usable, skipped


def _matching(pattern: str) -> list[Path]:
    path = Path(pattern)
    return sorted(path.parent.glob(path.name))


def _shard(path: Path) -> tuple[list[PictureFile], list[Skipped]]:
    """The pictures of a WebDataset shard, by their place in the file."""
    size = path.stat().st_size
    pictures: list[PictureFile] = []
    try:
        with tarfile.open(path, "r:") as shard:
            for member in shard:
                if member.offset_data + member.size > size:
                    return pictures, [Skipped(f"{path}: {member.name} and what follows", "the shard is cut short")]
                if member.isfile() and Path(member.name).suffix.lower() in READABLE:
                    pictures.append(PictureFile(f"{path}: {member.name}", path, member.offset_data, member.size))
            end = shard.offset
    except tarfile.TarError as error:
        return pictures, [Skipped(f"{path}, after {len(pictures)} pictures", f"the shard is damaged ({error})")]
    with path.open("rb") as file:
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # what follows the last member
            return pictures, [Skipped(f"{path}, after {len(pictures)} pictures", "the shard is cut short or damaged")]
    return pictures, []


def _fault(picture: PictureFile, least: int) -> str:
    """Why a picture can't be used, as far as its header tells; empty if it can."""
    if picture.length < 0:
        return _fault_of(picture.path, least)
    # In most formats a header stands at the start: a shard isn't read as a whole for the sake of its headers.
    return _fault_of(io.BytesIO(picture.read(2**16)), least) and _fault_of(io.BytesIO(picture.read()), least)


def _fault_of(file: Path | io.BytesIO, least: int) -> str:
    try:
        with Image.open(file) as image:
            if image.mode.startswith(("I", "F")):
                return f"its pixels are of mode {image.mode}, not 8 bits a channel"
            if min(image.size) < least:
                return f"it has {image.width} x {image.height} px, the shorter side under {least}"
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return f"it can't be opened ({error})"
    return ""


def read_pixels(picture: PictureFile) -> Pixels:
    """Decode as RGB. Raises OSError for a damaged file."""
    try:
        with Image.open(io.BytesIO(picture.read())) as image:
            return np.asarray(image.convert("RGB"))
    except (SyntaxError, ValueError, EOFError) as error:  # what Pillow's decoders raise besides
        raise OSError(str(error)) from error


def decodable(pictures: Sequence[PictureFile]) -> tuple[list[PictureFile], list[Skipped]]:
    """Pictures that decode to their end; the others are named. Raises DataError where none does."""
    whole: list[PictureFile] = []
    damaged: list[Skipped] = []
    for picture in pictures:
        try:
            read_pixels(picture)
            whole.append(picture)
        except OSError as error:
            damaged.append(Skipped(picture.name, f"it is damaged ({error})"))
    if damaged and not whole:
        raise DataError(f"all {len(damaged)} pictures can't be decoded: {damaged[0].name}: {damaged[0].reason}")
    return whole, damaged


# --- crops


class Crop(NamedTuple):
    pixels: Pixels
    broken: list[Skipped]  # pictures that were drawn for it and turned out damaged


class Crops(Dataset[Crop]):
    """Random square crops of `side` pixels, by number."""

    def __init__(self, pictures: Sequence[PictureFile], side: int, config: DataConfig, seed: int) -> None:
        self.pictures = pictures
        self.side = side
        self.config = config
        self.seed = seed
        self.folders: dict[Path, list[int]] = {}
        for index, picture in enumerate(pictures):
            self.folders.setdefault(picture.path.parent, []).append(index)
        self.decoded: OrderedDict[PictureFile, Pixels] = OrderedDict()  # the longest unused first
        self.decoded_bytes = 0

    def __getitem__(self, number: int) -> Crop:
        random = np.random.default_rng([self.seed, number])
        broken: list[Skipped] = []
        index, pixels = self._some_picture(random, range(len(self.pictures)), broken)
        candidates = [self._crop(random, pixels)]
        folder = self.folders[self.pictures[index].path.parent]  # else line art, all detail, crowds out photographs
        for _ in range(1, self.config.candidates):
            _, pixels = self._some_picture(random, folder, broken)
            candidates.append(self._crop(random, pixels))
        return Crop(np.array(max(candidates, key=detail), order="C"), broken)

    def _crop(self, random: np.random.Generator, pixels: Pixels) -> Pixels:
        config, side = self.config, self.side
        direct = random.random() < config.direct
        if not direct:
            height, width = pixels.shape[:2]
            size = (max(side, round(side * width / height)), max(side, round(side * height / width)))
            pixels = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))
        top, left = (int(random.integers(n - side + 1)) for n in pixels.shape[:2])
        crop = pixels[top : top + side, left : left + side]
        if direct and random.random() < config.mirror:
            crop = crop[:, ::-1]
        if direct and config.turn:
            upside_down, on_its_side = random.integers(0, 2, 2).astype(bool)
            crop = crop[::-1] if upside_down else crop
            crop = crop.swapaxes(0, 1) if on_its_side else crop
        return crop

    def _some_picture(
        self, random: np.random.Generator, among: Sequence[int], broken: list[Skipped]
    ) -> tuple[int, Pixels]:
        """One of `among` that decodes: its index and pixels."""
        for _ in range(100):
            index = among[int(random.integers(len(among)))]
            picture = self.pictures[index]
            if picture in self.decoded:
                self.decoded.move_to_end(picture)
                return index, self.decoded[picture]
            try:
                pixels = read_pixels(picture)
            except OSError as error:
                broken.append(Skipped(picture.name, f"it is damaged ({error})"))
                continue
            self.decoded[picture] = pixels
            self.decoded_bytes += pixels.nbytes
            while self.decoded_bytes > self.config.cache * 2**30:
                self.decoded_bytes -= self.decoded.popitem(last=False)[1].nbytes
            return index, pixels
        names = "; ".join(f"{name}: {reason}" for name, reason in broken[:3])
        raise DataError(f"100 pictures in a row couldn't be decoded: {names}")


def detail(pixels: Pixels) -> float:
    """Mean absolute gradient of the green channel reduced to a quarter, in levels of 255: noise hardly counts."""
    side = len(pixels) // 4
    green = pixels[: 4 * side, : 4 * side, 1].reshape(side, 4, side, 4).mean((1, 3))
    return float(np.abs(np.diff(green, axis=0)).mean() + np.abs(np.diff(green, axis=1)).mean())


class Loaded(NamedTuple):
    crops: Tensor  # (B, 3, side, side) uint8
    broken: list[Skipped]


def _collate(crops: list[Crop]) -> Loaded:
    pixels = torch.from_numpy(np.stack([crop.pixels for crop in crops])).permute(0, 3, 1, 2)
    return Loaded(pixels.contiguous(), [skipped for crop in crops for skipped in crop.broken])


def loader(crops: Crops, batch: int, batches: range) -> Iterator[Loaded]:
    """The batches of those numbers, in order; batch m holds the crops m * batch and following."""
    numbers = [list(range(m * batch, (m + 1) * batch)) for m in batches]
    workers = crops.config.workers
    loading: DataLoader[Loaded] = DataLoader(
        crops,  # type: ignore[arg-type]
        batch_sampler=numbers,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # of the workers' seeds, which nothing uses: the global one stays untouched
    )
    return iter(loading)


# --- what the network is given


class Batch(NamedTuple):
    """Pictures in [-1, 1]. low_res may go on around the original by a block on every side."""

    original: Tensor  # (B, 3, S, S)
    low_res: Tensor  # (B, 3, S / scale, S / scale), or with the margin
    upsampled: Tensor  # (B, 3, S, S)
    semantic: Tensor | None = None  # (B, semantic_size): what CLIP sees in low_res, without the margin

    def margin(self, scale: int) -> int:
        """Pixels of low_res on every side of the original."""
        return (self.low_res.shape[3] - self.original.shape[3] // scale) // 2


def reduce(
    crops: Tensor, scale: int, margin: int, degraded: Tensor, mild: Tensor, softness: float, generator: torch.Generator
) -> Batch:
    """Make the low resolution of (B, 3, side, side) uint8 crops and enlarge it bicubically.

    margin: pixels around the original that only the low resolution shows. degraded: (B,) bool, by Real-ESRGAN's
    second-order degradation of that softness, or, where also mild, (B,) bool, by Pillow's bicubic, noise and JPEG; the
    others by Pillow's bicubic alone. Low resolutions are rounded to 8 bits, as files are.
    """
    x = crops.float() / 255
    side = x.shape[2]
    low_res = (resize(x, (side // scale, side // scale)).clamp(0, 1) * 255).round() / 255
    strong, mild = degraded & ~mild, degraded & mild
    if strong.any():
        low_res[strong] = degrade(x[strong], scale, generator, softness)
    if mild.any():
        low_res[mild] = degrade_mildly(low_res[mild], generator)
    upsampled = resize(low_res * 2 - 1, (side, side)).clamp(-1, 1)
    inner = slice(margin, side - margin)
    return Batch(x[:, :, inner, inner] * 2 - 1, low_res * 2 - 1, upsampled[:, :, inner, inner])


def looked_at(batch: Batch, scale: int, clip: Clip | None) -> Batch:
    """The batch with what CLIP sees of its low resolution, without the margin."""
    if clip is None:
        return batch
    margin = batch.margin(scale)
    within = slice(margin, -margin or None)
    return batch._replace(semantic=clip.encode_image(batch.low_res[:, :, within, within]))
