"""Measure seam energy with our blocks at every place in a picture, so that what the picture shows there evens out.

seams.py ORIGINALS [--middle 512] [--presets NAME ...] [--others FOLDER]

Few borders cross a picture, and a contour near one weighs as much as a seam. So every picture is also enlarged without
its first 1, 2, ... low-resolution rows and columns, and its seam energy is the mean over a whole block of them. The
originals, bicubic and --others, that have no blocks, are measured at the same places. Prints a table in Markdown, with
how far the pictures' means lie apart (standard error of the mean over pictures).
"""

import argparse
from pathlib import Path

import numpy as np
from originals import middle, opened, pictures, reduced, tensor
from PIL import Image

from infdit_core import load_infdit, upscale
from infdit_core.evaluation import grids
from infdit_core.metrics import seam_energy

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("originals", type=Path)
parser.add_argument("--model", type=Path, help="weights file (the shipped default)")
parser.add_argument("--presets", nargs="*", default=["faithful", "balanced", "detailed"])
parser.add_argument("--middle", type=int, default=512, help="pixels in the middle of every original (512)")
parser.add_argument("--others", type=Path, help="results at x4 of other upscalers: NAME/PICTURE.png, as of rivals.py")
options = parser.parse_args()
model = load_infdit(options.model)
scale, block = model.config.scale, model.config.block_size
energies: dict[str, list[list[float]]] = {}  # of every picture, at every place
for path in pictures(options.originals):
    original = opened(path, scale)
    box = middle(original.size, options.middle, scale)
    original = original.crop(box)
    small = reduced(original, scale)
    fixed = {"original": original, "bicubic": small.resize(original.size, Image.Resampling.BICUBIC)}
    for folder in sorted(options.others.iterdir()) if options.others else []:
        fixed[folder.name] = opened(folder / f"{path.stem}.png").crop(box)
    here: dict[str, list[float]] = {}
    for place in range(block // scale):
        rest = (place * scale, place * scale, *original.size)
        results = {name: tensor(image.crop(rest)) for name, image in fixed.items()}
        low_res = tensor(small.crop((place, place, small.width, small.height)))
        for preset in options.presets:
            results[preset] = upscale(low_res, model=model, scale=scale, preset=preset)
        for name, x in results.items():
            levels = (x * 255).round().permute(0, 3, 1, 2) / 255
            here.setdefault(name, []).append(seam_energy(levels, block, grids(model.config), scale))
    for name, of_name in here.items():
        energies.setdefault(name, []).append(of_name)
        print(f"{path.stem:28} {name:16} {np.mean(of_name):8.4f}", flush=True)

print("\n| | seam energy over all places | at one place |\n|---|---|---|")
for name, of_name in energies.items():
    means = np.mean(of_name, axis=1)
    error = np.std(means, ddof=1) / len(means) ** 0.5
    print(f"| {name} | {np.mean(means):.3f} ± {error:.3f} | {np.mean(of_name, axis=0)[0]:.3f} |")
