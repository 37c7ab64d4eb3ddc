"""Cut the thumbnails of workflows/ out of what the workflows made of docs/osprey.png, put in for their example.png.

python scripts/thumbnails.py UPSCALED.png NATIVE.png: what "One-node upscale" (or, the same, "Full graph") and
"KSampler (native)" saved. "SDXL to 4K" shows before and after: the enlarging half of that workflow alone.
"""

import argparse
from pathlib import Path

from PIL import Image

SIDE = 512  # the front end shows them square
ROOT = Path(__file__).parents[1]


def main() -> None:
    """Read the command line, write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("upscaled", type=Path)
    parser.add_argument("native", type=Path)
    arguments = parser.parse_args()
    with Image.open(arguments.upscaled) as file, Image.open(ROOT / "docs" / "osprey.png") as osprey:
        upscaled = file.convert("RGB")
        before = osprey.convert("RGB").resize(upscaled.size, Image.Resampling.BICUBIC)
    with Image.open(arguments.native) as file:
        native = file.convert("RGB")
    half = (SIDE - 4) // 2
    strip = (375, 130, 375 + half, 130 + SIDE)
    pair = Image.new("RGB", (SIDE, SIDE), "white")
    pair.paste(before.crop(strip), (0, 0))
    pair.paste(upscaled.crop(strip), (SIDE - half, 0))
    thumbnails = {
        "One-node upscale": upscaled.crop((215, 120, 215 + SIDE, 120 + SIDE)),
        "Full graph": upscaled.crop((760, 100, 760 + SIDE, 100 + SIDE)),
        "SDXL to 4K": pair,
        "KSampler (native)": native.crop((180, 0, 900, 720)).resize((SIDE, SIDE), Image.Resampling.LANCZOS),
    }
    for name, picture in thumbnails.items():
        picture.save(ROOT / "workflows" / f"{name}.jpg", quality=78, optimize=True)


if __name__ == "__main__":
    main()
