"""Measure the default weights on originals reduced to a quarter: quality.py DIR [--lpips FILE] [--presets NAME ...]

Prints a table in Markdown: PSNR and SSIM of Y, LPIPS, seam energy, means over the pictures, beside bicubic and Lanczos.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from infdit_core import load_infdit, upscale
from infdit_core.images import READABLE
from infdit_core.metrics import load_lpips, psnr_y, seam_energy, ssim_y

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("originals", type=Path)
parser.add_argument("--lpips", type=Path)
parser.add_argument("--model", type=Path)
parser.add_argument("--presets", nargs="*", default=["faithful", "balanced", "detailed"])
options = parser.parse_args()

model = load_infdit(options.model)
lpips = load_lpips(options.lpips) if options.lpips else None
scores: dict[str, list[list[float]]] = {}


def tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)[None]


for path in sorted(p for p in options.originals.iterdir() if p.suffix.lower() in READABLE):
    original = Image.open(path).convert("RGB")
    width, height = (side - side % 4 for side in original.size)
    original = original.crop((0, 0, width, height))
    small = original.resize((width // 4, height // 4), Image.Resampling.BICUBIC)
    results = {
        "bicubic": tensor(small.resize((width, height), Image.Resampling.BICUBIC)),
        "Lanczos": tensor(small.resize((width, height), Image.Resampling.LANCZOS)),
    }
    results |= {preset: upscale(tensor(small), model=model, scale=4, preset=preset) for preset in options.presets}
    truth = tensor(original).permute(0, 3, 1, 2)
    for name, pixels in results.items():
        x = ((pixels * 255).round() / 255).permute(0, 3, 1, 2)
        row = [psnr_y(x, truth), ssim_y(x, truth), seam_energy(x, model.config.block_size)]
        scores.setdefault(name, []).append([*row[:2], *([float(lpips(x, truth))] if lpips else []), row[2]])
        print(f"{path.stem:32} {name:10}", *(f"{value:8.4f}" for value in scores[name][-1]), flush=True)

print(
    f"\n| x4, mean of {len(next(iter(scores.values())))} | PSNR-Y | SSIM-Y |{' LPIPS |' if lpips else ''} seam energy |"
)
print("|---|---|---|---|" + ("---|" if lpips else ""))
for name, rows in scores.items():
    means = np.mean(rows, axis=0)
    print(f"| {name} | {means[0]:.2f} |" + "".join(f" {value:.3f} |" for value in means[1:]))
