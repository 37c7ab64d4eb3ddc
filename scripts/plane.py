"""Draw PSNR-Y against LPIPS: plane.py CSV OUT.png. Needs matplotlib.

CSV: as quality.py writes it, where the presets are joined by a line, or as sweep.py does, where each sampler's starts
are.
"""

import argparse
import csv
from pathlib import Path

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
from matplotlib import pyplot as plt

PRESETS = ["faithful", "balanced", "detailed"]

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("csv", type=Path)
parser.add_argument("out", type=Path)
options = parser.parse_args()

with options.csv.open(newline="") as file:
    rows = list(csv.DictReader(file))
if not rows or "lpips" not in rows[0]:
    parser.error(f"{options.csv} has no LPIPS: let quality.py write it with --lpips")
points: dict[tuple[str, str], tuple[float, float]] = {}  # by name and start: means over the pictures
for name, start in dict.fromkeys((row["name"], row.get("start", "")) for row in rows):
    of_point = [row for row in rows if (row["name"], row.get("start", "")) == (name, start)]
    points[name, start] = tuple(np.mean([float(row[key]) for row in of_point]) for key in ("lpips", "psnr_y"))

figure, axes = plt.subplots(figsize=(7.5, 5), layout="constrained")
lines = {name: [point for point in points if point[0] == name] for name, _ in points}
if set(PRESETS) <= set(lines):
    lines = {"Inf-DiT nano": [(preset, "") for preset in PRESETS]} | {
        name: line for name, line in lines.items() if name not in PRESETS
    }
for name, line in lines.items():
    x, y = zip(*(points[point] for point in line), strict=True)
    alone = len(line) == 1
    axes.plot(x, y, "o" if alone else "o-", color="grey" if alone else None, label=None if alone else name)
    for preset, start in line:
        text = preset if alone or not start else start
        axes.annotate(text, points[preset, start], textcoords="offset points", xytext=(6, 5), fontsize=9)
axes.set(xlabel="LPIPS (AlexNet), lower is better", ylabel="PSNR-Y in dB, higher is better")
axes.grid(alpha=0.3)
if any(len(line) > 1 for line in lines.values()):
    axes.legend()
figure.savefig(options.out, dpi=110)
