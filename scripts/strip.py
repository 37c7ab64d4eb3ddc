"""Show details of originals beside what upscalers made of them, reduced to a quarter.

strip.py ORIGINALS OUT.jpg --of PICTURE:LEFT:TOP ... --results FOLDER ... [--names NAME ...]

Rows: details of 160 px; columns: the original, bicubic, and each NAME's PICTURE.png in a folder of the same name in one
of FOLDER, as rivals.py and quality.py write them.
"""

import argparse
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SIDE, GAP, HEADER = 160, 4, 22

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("originals", type=Path)
parser.add_argument("out", type=Path)
parser.add_argument("--of", nargs="+", required=True, metavar="PICTURE:LEFT:TOP")
parser.add_argument("--results", nargs="+", type=Path, required=True)
parser.add_argument("--names", nargs="+", default=["span", "realesrgan", "faithful", "balanced", "detailed"])
options = parser.parse_args()


def results(picture: str) -> list[Image.Image]:
    """The original, bicubic, and those of the names."""
    (path,) = options.originals.glob(f"{picture}.*")
    with Image.open(path) as file:
        original = file.convert("RGB")
    width, height = (side // 4 * 4 for side in original.size)
    original = original.crop((0, 0, width, height))
    small = original.resize((width // 4, height // 4), Image.Resampling.BICUBIC)
    pictures = [original, small.resize(original.size, Image.Resampling.BICUBIC)]
    for name in options.names:
        (found,) = (f / name / f"{picture}.png" for f in options.results if (f / name / f"{picture}.png").exists())
        with Image.open(found) as file:
            pictures.append(file.convert("RGB"))
    return pictures


titles = ["original", "bicubic", *options.names]
sheet = Image.new("RGB", (len(titles) * (SIDE + GAP) - GAP, HEADER + len(options.of) * (SIDE + GAP) - GAP), "white")
draw = ImageDraw.Draw(sheet)
for column, title in enumerate(titles):
    draw.text((column * (SIDE + GAP) + SIDE // 2, HEADER // 2), title, "black", ImageFont.load_default(14), "mm")
for row, (picture, left, top) in enumerate(text.split(":") for text in options.of):
    box = (int(left), int(top), int(left) + SIDE, int(top) + SIDE)
    for column, result in enumerate(results(picture)):
        sheet.paste(result.crop(box), (column * (SIDE + GAP), HEADER + row * (SIDE + GAP)))
sheet.save(options.out, quality=90)
