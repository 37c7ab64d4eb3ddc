"""Measure seam energy with our blocks moved by every low-resolution pixel, so that what the picture shows evens out.

seams.py ORIGINALS [--middle 512] [--presets NAME ...] [--others FOLDER]

Few borders cross a picture, and a contour on one weighs as much as a seam. So every picture is also enlarged without
its first 1, 2, ... low-resolution rows and columns, over a whole block of them, and the steps at borders, and those
elsewhere, are summed before one is divided by the other. The originals, bicubic and --others are measured at the same
places. Prints a table in Markdown: means over the pictures with their standard errors, and beside them what the place
of the whole picture alone would say (both grids' steps summed there too; quality.py has the mean of two ratios).
"""

import argparse
from pathlib import Path

import numpy as np
from originals import middle, opened, pictures, reduced, tensor
from PIL import Image

from infdit_core import load_infdit, upscale
from infdit_core.evaluation import grids
from infdit_core.metrics import border_steps

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("originals", type=Path)
parser.add_argument("--model", type=Path, help="weights file (the shipped default)")
parser.add_argument("--presets", nargs="*", default=["faithful", "balanced", "detailed"])
parser.add_argument("--middle", type=int, default=512, help="pixels in the middle of every original (512)")
parser.add_argument("--others", type=Path, help="results at x4 of other upscalers: NAME/PICTURE.png, as of rivals.py")
options = parser.parse_args()

if options.others and not options.others.is_dir():
    parser.error(f"--others {options.others}: no such folder")
model = load_infdit(options.model)
if unknown := [preset for preset in options.presets if preset not in model.config.presets]:
    parser.error(f"--presets {unknown[0]}: the weights have {', '.join(model.config.presets)}")
scale, block = model.config.scale, model.config.block_size
energies: dict[str, list[tuple[float, float]]] = {}  # of every picture: over all places, at the first
for path in pictures(options.originals):
    original = opened(path, scale)
    whole, box = original.size, middle(original.size, options.middle, scale)
    original = original.crop(box)
    small = reduced(original, scale)
    fixed = {"original": original, "bicubic": small.resize(original.size, Image.Resampling.BICUBIC)}
    for folder in sorted(options.others.iterdir()) if options.others else []:
        file = folder / f"{path.stem}.png"
        result = opened(file, scale) if file.exists() else None
        if result is None or result.size != whole:
            raise SystemExit(f"{file} is {result.size if result else 'missing'}, its original {whole}")
        fixed[folder.name] = result.crop(box)
    steps: dict[str, list[list[tuple[float, float]]]] = {}  # by place and grid
    for place in range(block // scale):
        rest = (place * scale, place * scale, *original.size)
        results = {name: tensor(image.crop(rest)) for name, image in fixed.items()}
        low_res = tensor(small.crop((place, place, *small.size)))
        for preset in options.presets:
            results[preset] = upscale(low_res, model=model, scale=scale, preset=preset)
        for name, x in results.items():
            levels = (x * 255).round().permute(0, 3, 1, 2) / 255
            here = [border_steps(levels, block, before, scale) for before in grids(model.config)]
            steps.setdefault(name, []).append(here)
    for name, of_name in steps.items():
        (at_borders, elsewhere), first = np.sum(of_name, axis=(0, 1)), np.sum(of_name[0], axis=0)
        energies.setdefault(name, []).append((at_borders / elsewhere, first[0] / first[1]))
        print(f"{path.stem:28} {name:16} {energies[name][-1][0]:8.4f}", flush=True)

print("\n| | seam energy over all places | at one place |\n|---|---|---|")
for name, of_name in energies.items():
    means, errors = np.mean(of_name, axis=0), np.std(of_name, axis=0, ddof=1) / len(of_name) ** 0.5
    cells = (f"{mean:.3f} ± {error:.3f}" for mean, error in zip(means, errors, strict=True))
    print(f"| {name} | {' | '.join(cells)} |")
