"""Reduce photographs and cut them into tiles, to train on beside them: reduced_pictures.py PHOTOGRAPHS OUT

Few photographs are sharp to the pixel, but much of what is enlarged is: it has been reduced before. Small photographs
are reduced once, large ones by four factors; cut into tiles, a larger result counts more. The same at each call.
"""

import argparse
import random
from pathlib import Path

from originals import opened, pictures
from PIL import Image

SMALL = 1.1e6  # pixels
ONE = [(1.3, 2.2)]  # of these a factor is drawn
FOUR = [(1.4, 1.9), (1.9, 2.5), (2.5, 3.4), (3.4, 4.5)]
SIDE, LEAST = 420, 240  # of a tile, about; a photograph isn't reduced below the least

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("photographs", type=Path)
parser.add_argument("out", type=Path)
options = parser.parse_args()

options.out.mkdir(parents=True, exist_ok=True)
for path in pictures(options.photographs):
    photograph, seeded = opened(path, 1), random.Random(path.stem)
    for number, factors in enumerate(ONE if photograph.width * photograph.height < SMALL else FOUR):
        factor = seeded.uniform(*factors)
        width, height = round(photograph.width / factor), round(photograph.height / factor)
        if min(width, height) < LEAST:
            continue
        reduced = photograph.resize((width, height), Image.Resampling.LANCZOS)
        columns, rows = max(1, round(width / SIDE)), max(1, round(height / SIDE))
        for row in range(rows):
            for column in range(columns):
                left, right = column * width // columns, (column + 1) * width // columns
                top, bottom = row * height // rows, (row + 1) * height // rows
                tile = reduced.crop((left, top, right, bottom))
                tile.save(options.out / f"{path.name}_{number}_{row}_{column}.png")
