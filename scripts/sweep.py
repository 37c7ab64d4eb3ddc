"""Try shares of detail, and starts, ends, steps and samplers on originals that are reduced to a quarter first: what
presets are chosen by.

sweep.py ORIGINALS --lpips FILE [--details SHARE ...] [--starts SIGMA ...] [--ends SIGMA ...]
         [--samplers NAME:STEPS ...] [--csv FILE]

Prints a table in Markdown, means over the pictures; `plane.py` draws what --csv writes.
"""

import argparse
import csv
import sys
from pathlib import Path
from typing import Any

import numpy as np
from originals import opened, pictures, reduced, tensor
from torch import Tensor

from infdit_core import load_infdit, upscale
from infdit_core.diffusion import edm
from infdit_core.diffusion.samplers import SAMPLERS
from infdit_core.metrics import load_lpips, psnr_y


def sampler_steps(text: str) -> tuple[str, int]:
    name, _, steps = text.partition(":")
    if name not in SAMPLERS or not steps.isdigit() or int(steps) < 1:
        raise argparse.ArgumentTypeError(f"{text}: it must be {', '.join(SAMPLERS)} and a number of steps, as heun:4")
    return name, int(steps)


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("originals", type=Path)
parser.add_argument("--lpips", type=Path, required=True, help="LPIPS weights, of AlexNet or VGG16")
parser.add_argument("--model", type=Path, help="weights file (the shipped default)")
parser.add_argument(
    "--details",
    nargs="*",
    type=float,
    help="of the first picture and of the estimate (0 to 1 where there is a detailer)",
)
parser.add_argument("--starts", nargs="*", type=float, default=[0.4, 0.8, 1.2])
parser.add_argument("--ends", nargs="*", type=float, default=[0.08, 0.12, 0.2], help="where the last step begins")
parser.add_argument("--samplers", nargs="*", type=sampler_steps, default=[("euler", 2), ("euler", 3)])
parser.add_argument("--csv", type=Path, help="write the figures of every picture")
options = parser.parse_args()

model = load_infdit(options.model)
if unfit := [s for s in options.starts if not model.config.sigma_min < s <= model.config.sigma_max]:
    parser.error(f"--starts {unfit[0]}: above {model.config.sigma_min:g}, up to {model.config.sigma_max:g}")
if unfit := [end for end in options.ends if not 0 < end <= min(options.starts, default=end)]:
    parser.error(f"--ends {unfit[0]}: above 0, and no higher than any of --starts")
details = options.details or ([0.0, 0.4, 0.6, 0.8, 1.0] if model.config.detail_rank else [0.0])
for share in details:
    try:
        model.config.check_detail(share)
    except ValueError as error:
        parser.error(f"--details {share:g}: {error}")
lpips = load_lpips(options.lpips)
evaluations: list[Tensor] = []  # of the setting under work, by their sigmas
evaluate = model.denoise


def counted(*arguments: Any, **settings: Any) -> Tensor:
    evaluations.append(arguments[1])
    return evaluate(*arguments, **settings)


model.denoise = counted  # type: ignore[method-assign]
originals = [(path.stem, opened(path)) for path in pictures(options.originals)]
table = csv.writer(options.csv.open("w", newline="", buffering=1)) if options.csv else None
if table:
    table.writerow(["picture", "name", "start", "psnr_y", "lpips"])
print("| start, or detail | end | sampler, steps | evaluations | PSNR-Y | LPIPS |\n|---|---|---|---|---|---|")
alone = ["the first picture", "the estimate"]  # of so many steps
settings: dict[tuple[str, str, str], dict[str, Any]] = {
    (f"{share:g}", "", alone[steps]): {"steps": steps, "detail": share}
    for steps in ([0, 1] if model.config.predictor_depth else [1])
    for share in details
}
for sampler, steps in options.samplers:
    for end in options.ends:
        for start in options.starts:
            levels = edm.sigmas(steps, end, start)
            settings[f"{start:g}", f"{end:g}", f"{sampler}, {steps}"] = {"sampler": sampler, "sigmas": levels}
for (start, end, name), setting in settings.items():
    figures = []
    evaluations.clear()
    for picture, image in originals:
        large = upscale(tensor(reduced(image)), model=model, scale=4, **setting)
        x, original = (t.permute(0, 3, 1, 2) for t in ((large * 255).round() / 255, tensor(image)))
        figures.append((psnr_y(x, original), float(lpips(x, original))))
        if table:
            table.writerow([picture, f"{name}, end {end}" if end else name, start, *figures[-1]])
    psnr, distance = np.mean(figures, axis=0)
    print(f"| {start} | {end} | {name} | {len(evaluations) // len(originals)} | {psnr:.2f} | {distance:.3f} |")
    sys.stdout.flush()
