"""Draw the curves of a training run: curves.py RUN OUT.png. Needs matplotlib."""

import argparse
import csv
from pathlib import Path

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
from matplotlib import pyplot as plt

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("run", type=Path)
parser.add_argument("out", type=Path)
options = parser.parse_args()


def columns(name: str) -> dict[str, np.ndarray]:
    with (options.run / name).open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {key: np.array([float(row[key] or "nan") for row in rows]) for key in rows[0]}


log, validation = columns("log.csv"), columns("validation.csv")
figure, ((levels, held), (distortion, perception)) = plt.subplots(2, 2, figsize=(10, 6.5), layout="constrained")

for key, values in log.items():
    if key.startswith("loss_") and not np.isnan(values).all():
        levels.plot(log["step"], values, label=key.removeprefix("loss_").replace("_", " "), linewidth=1)
levels.set(title="training loss by sigma")

kinds = dict.fromkeys(key.split("_")[0] for key in validation if "_loss_" in key)
for kind in kinds:
    values = np.nanmean([x for key, x in validation.items() if key.startswith(kind) and "_loss_" in key], axis=0)
    held.plot(validation["step"], values, ".-", label=kind)
held.set(title="loss on held pictures, mean over sigma")
for axes in (levels, held):
    if axes.dataLim.ymin > 0:  # a predictor's is a logarithm already
        axes.set_yscale("log")

for axes, measure, title in (
    (distortion, "psnr_y", "PSNR-Y above bicubic, dB"),
    (perception, "lpips", "LPIPS below bicubic"),
):
    for key, values in validation.items():
        kind, _, preset = key.removesuffix(f"_{measure}").partition("_")
        if key.endswith(measure) and preset != "bicubic":
            gain = values - validation[f"{kind}_bicubic_{measure}"]
            axes.plot(validation["step"], gain if measure == "psnr_y" else -gain, ".-", label=f"{kind}, {preset}")
    axes.axhline(0, color="grey", linewidth=0.5)
    axes.set(title=title, visible=len(axes.lines) > 1)  # there may be no LPIPS

for axes in figure.axes:
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
figure.savefig(options.out, dpi=100)
