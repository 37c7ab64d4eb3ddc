"""Measure the default weights on originals that are reduced first, beside bicubic, Lanczos and other upscalers.

quality.py ORIGINALS [--lpips FILE] [--presets NAME ...] [--others FOLDER] [--results FOLDER] [--csv FILE]

Prints a table in Markdown, means over the pictures: PSNR (dB) and SSIM of Y, LPIPS, seam energy (1: block borders don't
show), colour shift (largest difference of a channel's mean to the original's, in levels of 255). `plane.py` and
`strip.py` draw what --csv and --results write.
"""

import argparse
import csv
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from originals import middle, opened, pictures, reduced, tensor
from PIL import Image
from torch import Tensor

from infdit_core import load_infdit, upscale
from infdit_core.evaluation import grids
from infdit_core.metrics import load_lpips, psnr_y, seam_energy, ssim_y

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("originals", type=Path)
parser.add_argument("--lpips", type=Path, help="LPIPS weights, of AlexNet or VGG16")
parser.add_argument("--model", type=Path, help="weights file (the shipped default)")
parser.add_argument("--presets", nargs="*", default=["faithful", "balanced", "detailed"])
parser.add_argument("--scale", type=int, default=4)
parser.add_argument("--middle", type=int, help="only so many pixels in the middle of every original")
parser.add_argument("--degraded", action="store_true", help="low resolutions with noise (5 levels) and JPEG (60)")
parser.add_argument("--others", type=Path, help="results at x4 of other upscalers: NAME/PICTURE.png, as of rivals.py")
parser.add_argument("--results", type=Path, help="write our results there in the same way")
parser.add_argument("--csv", type=Path, help="write the figures of every picture")
options = parser.parse_args()
if options.others and (options.scale != 4 or options.middle or options.degraded):
    parser.error("--others are results of whole pictures, x4 from clean low resolutions")

if options.others and not options.others.is_dir():
    parser.error(f"--others {options.others}: no such folder")
model = load_infdit(options.model)
if unknown := [preset for preset in options.presets if preset not in model.config.presets]:
    parser.error(f"--presets {unknown[0]}: the weights have {', '.join(model.config.presets)}")
lpips = load_lpips(options.lpips) if options.lpips else None
columns = {
    "psnr_y": "PSNR-Y",
    "ssim_y": "SSIM-Y",
    "lpips": "LPIPS",
    "seam_energy": "seam energy",
    "shift": "colour shift",
}
if lpips is None:
    del columns["lpips"]
if options.scale != model.config.scale:  # the borders lie elsewhere after resizing
    del columns["seam_energy"]


def degraded(image: Image.Image, seed: int) -> Image.Image:
    """Noise of deviation 5 levels, then JPEG of quality 60."""
    levels = np.asarray(image, dtype=np.float64)
    noisy = levels + np.random.default_rng(seed).normal(0, 5, levels.shape)
    file = io.BytesIO()
    Image.fromarray(noisy.round().clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=60)
    return Image.open(file).convert("RGB")


def enlarged(path: Path, small: Image.Image, size: tuple[int, int]) -> Iterator[tuple[str, Tensor]]:
    """Every upscaler's name and result, (1, H, W, 3) in 0..1."""
    yield "bicubic", tensor(small.resize(size, Image.Resampling.BICUBIC))
    yield "Lanczos", tensor(small.resize(size, Image.Resampling.LANCZOS))
    for folder in sorted(options.others.iterdir()) if options.others else []:
        if (folder / f"{path.stem}.png").exists():
            result = opened(folder / f"{path.stem}.png")
            if result.size != size:
                raise SystemExit(f"{folder / path.stem}.png is {result.size}, its original {size}")
            yield folder.name, tensor(result)
    for preset in options.presets:
        result = upscale(tensor(small), model=model, scale=options.scale, preset=preset)
        if options.results:
            (options.results / preset).mkdir(parents=True, exist_ok=True)
            levels = (result[0] * 255).round().byte().numpy()
            Image.fromarray(levels).save(options.results / preset / f"{path.stem}.png")
        yield preset, result


def figures(result: Tensor, original: Tensor) -> dict[str, float]:
    """Of each of `columns`."""
    x, truth = ((((t * 255).round() / 255).permute(0, 3, 1, 2)) for t in (result, original))
    found = {
        "psnr_y": psnr_y(x, truth),
        "ssim_y": ssim_y(x, truth),
        "shift": float((x.mean((0, 2, 3)) - truth.mean((0, 2, 3))).abs().max() * 255),
    }
    if lpips is not None:
        found["lpips"] = float(lpips(x, truth))
    if "seam_energy" in columns:
        found["seam_energy"] = seam_energy(x, model.config.block_size, grids(model.config), model.config.scale)
    return found


rows: list[dict[str, str | float]] = []
paths = pictures(options.originals)
table = (
    csv.DictWriter(options.csv.open("w", newline="", buffering=1), ["picture", "name", *columns])
    if options.csv
    else None
)
if table:
    table.writeheader()
for number, path in enumerate(paths):
    original = opened(path, options.scale)
    if options.middle:
        original = original.crop(middle(original.size, options.middle, options.scale))
    small = reduced(original, options.scale)
    if options.degraded:
        small = degraded(small, number)
    for name, result in enlarged(path, small, original.size):
        rows.append({"picture": path.stem, "name": name} | figures(result, tensor(original)))
        if table:
            table.writerow(rows[-1])
        print(f"{path.stem:28} {name:16}", *(f"{rows[-1][key]:8.4f}" for key in columns), flush=True)

print(f"\n| x{options.scale}, mean of {len(paths)} | {' | '.join(columns.values())} |")
print("|---" * (len(columns) + 1) + "|")
for name in dict.fromkeys(str(row["name"]) for row in rows):
    of_name = [row for row in rows if row["name"] == name]
    means = {key: np.mean([float(row[key]) for row in of_name]) for key in columns}
    digits = {"psnr_y": 2, "seam_energy": 2, "shift": 2}
    short = "" if len(of_name) == len(paths) else f", {len(of_name)} only"
    print(f"| {name}{short} | " + " | ".join(f"{means[key]:.{digits.get(key, 3)}f}" for key in columns) + " |")
