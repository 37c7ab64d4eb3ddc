"""Show details of originals beside what upscalers made of them, reduced to a quarter.

strip.py ORIGINALS OUT.jpg --of PICTURE:LEFT:TOP ... --results FOLDER ... [--names NAME ...]

Rows: details of 160 px; columns: the original, bicubic, and each NAME's PICTURE.png in a folder of the same name in one
of FOLDER, as rivals.py and quality.py write them.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path

from originals import opened, reduced
from PIL import Image, ImageDraw, ImageFont

SIDE, GAP, HEADER = 160, 4, 22

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("originals", type=Path)
parser.add_argument("out", type=Path)
parser.add_argument("--of", nargs="+", required=True, metavar="PICTURE:LEFT:TOP")
parser.add_argument("--results", nargs="+", type=Path, required=True)
parser.add_argument("--names", nargs="+", default=["span", "realesrgan", "faithful", "balanced", "detailed"])
options = parser.parse_args()


def only(paths: Iterable[Path], what: str) -> Image.Image:
    """The picture at the one path that exists; ends the script otherwise."""
    found = [path for path in paths if path.exists()]
    if len(found) != 1:
        raise SystemExit(f"{what}: {len(found)} pictures, where one is needed")
    return opened(found[0])


def results(picture: str) -> list[Image.Image]:
    """The original, bicubic, and those of the names."""
    original = only(options.originals.glob(f"{picture}.*"), f"{picture} in {options.originals}")
    pictures = [original, reduced(original).resize(original.size, Image.Resampling.BICUBIC)]
    for name in options.names:
        pictures.append(only((f / name / f"{picture}.png" for f in options.results), f"{name}/{picture}.png"))
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
