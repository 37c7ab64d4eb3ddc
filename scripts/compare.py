"""Show a detail enlarged by bicubic interpolation beside the same detail of a result.

compare.py SMALL LARGE OUT
"""

import sys
from pathlib import Path

from PIL import Image

small, large = (Image.open(path).convert("RGB") for path in sys.argv[1:3])
bicubic = small.resize(large.size, Image.Resampling.BICUBIC)
width, height = large.size
box = (int(width * 0.3), int(height * 0.1), int(width * 0.3) + 480, int(height * 0.1) + 480)
sheet = Image.new("RGB", (970, 480), "white")
sheet.paste(bicubic.crop(box), (0, 0))
sheet.paste(large.crop(box), (490, 0))
sheet.save(Path(sys.argv[3]), quality=92)
