"""Show what degradation makes of a photograph: contact_sheet.py PHOTOGRAPH OUT [--crop 512] [--enlarge 2]

The low-resolution pictures of its centre at x4: the bicubic reduction first, then seeds 0 to 39 in rows of eight.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from infdit_core.degradation import degrade

SCALE, COLUMNS, SEEDS = 4, 8, 40
GAP = 4  # pixels between pictures

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("photograph", type=Path)
parser.add_argument("out", type=Path)
parser.add_argument("--crop", type=int, default=512, help="side of the crop, a multiple of 4")
parser.add_argument("--enlarge", type=int, default=1, choices=(1, 2), help="nearest neighbour")
options = parser.parse_args()

photograph = Image.open(options.photograph).convert("RGB")
left, top = ((side - options.crop) // 2 for side in photograph.size)
if min(left, top) < 0:
    parser.error(f"a picture of {photograph.width} x {photograph.height} is too small for --crop {options.crop}")
crop = photograph.crop((left, top, left + options.crop, top + options.crop))
x = torch.from_numpy(np.array(crop)).permute(2, 0, 1)[None] / 255

side = options.crop // SCALE
pictures = [crop.resize((side, side), Image.Resampling.BICUBIC)]
for seed in range(SEEDS):
    low_res = degrade(x, SCALE, torch.Generator().manual_seed(seed))[0]
    pictures.append(Image.fromarray((low_res * 255).round().byte().permute(1, 2, 0).numpy()))

side *= options.enlarge
sheet = Image.new("RGB", tuple(n * (side + GAP) - GAP for n in (COLUMNS, 1 + SEEDS // COLUMNS)))
for place, picture in enumerate(pictures):
    # The reduction has the first row to itself.
    row, column = divmod(place + COLUMNS - 1 if place else 0, COLUMNS)
    enlarged = picture.resize((side, side), Image.Resampling.NEAREST)
    sheet.paste(enlarged, (column * (side + GAP), row * (side + GAP)))
sheet.save(options.out, quality=95)
