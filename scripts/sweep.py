"""Try starts, steps and samplers on originals that are reduced to a quarter first: what presets are chosen by.

sweep.py ORIGINALS --lpips FILE [--starts SIGMA ...] [--samplers NAME:STEPS ...] [--csv FILE]

Prints a table in Markdown, means over the pictures; `plane.py` draws what --csv writes.
"""

import argparse
import csv
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from infdit_core import load_infdit, upscale
from infdit_core.images import READABLE
from infdit_core.metrics import load_lpips, psnr_y
from infdit_core.upscale import UpscaleProgress

SAMPLERS = ["euler:2", "euler:4", "dpmpp_2m:3", "dpmpp_2m:5", "heun:2", "heun:4"]
SCALE = 4

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("originals", type=Path)
parser.add_argument("--lpips", type=Path, required=True, help="AlexNet LPIPS weights")
parser.add_argument("--model", type=Path, help="weights file (the shipped default)")
parser.add_argument("--starts", nargs="*", type=float, default=[0.06, 0.1, 0.15, 0.25, 0.4])
parser.add_argument("--samplers", nargs="*", default=SAMPLERS)
parser.add_argument("--csv", type=Path, help="write the figures of every picture")
options = parser.parse_args()

model = load_infdit(options.model)
lpips = load_lpips(options.lpips)
settings = [{"steps": 1}]
for start in options.starts:
    for sampler, steps in (text.split(":") for text in options.samplers):
        settings.append({"start": start, "sampler": sampler, "steps": int(steps)})

pictures = []
for path in sorted(p for p in options.originals.iterdir() if p.suffix.lower() in READABLE):
    with Image.open(path) as file:
        image = file.convert("RGB")
    width, height = (side // SCALE * SCALE for side in image.size)
    image = image.crop((0, 0, width, height))
    small = image.resize((width // SCALE, height // SCALE), Image.Resampling.BICUBIC)
    original, low_res = (torch.from_numpy(np.asarray(i, dtype=np.float32) / 255)[None] for i in (image, small))
    pictures.append((path.stem, low_res, original.permute(0, 3, 1, 2)))

print("| start | sampler, steps | evaluations | PSNR-Y | LPIPS |\n|---|---|---|---|---|")
rows = []
for setting in settings:
    name = f"{setting['sampler']}, {setting['steps']}" if "sampler" in setting else "estimate"
    of_setting = []
    for picture, low_res, original in pictures:
        reports: list[UpscaleProgress] = []  # one an evaluation, where the whole picture is a tile
        x = upscale(low_res, model=model, scale=SCALE, tile=None, on_progress=reports.append, **setting)
        x = x.permute(0, 3, 1, 2)
        of_setting.append({"psnr_y": psnr_y(x, original), "lpips": float(lpips(x, original))})
        rows.append({"picture": picture, "name": name, "start": setting.get("start", "")} | of_setting[-1])
    psnr, distance = (np.mean([row[key] for row in of_setting]) for key in ("psnr_y", "lpips"))
    start = setting.get("start", "")
    print(f"| {start} | {name} | {len(reports)} | {psnr:.2f} | {distance:.3f} |", flush=True)
if options.csv:
    with options.csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
