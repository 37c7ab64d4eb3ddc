"""Where the numbers of a run go: CSV, TensorBoard, and Weights & Biases where asked for."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter


class Log:
    """log.csv and validation.csv, TensorBoard's events, pictures in samples/."""

    def __init__(self, out: Path, step: int, wandb: str, settings: Mapping[str, Any]) -> None:
        """step: where the run goes on; rows after it, written by a run killed since, are taken back."""
        self.out = out
        for name in ("log.csv", "validation.csv"):
            _cut(out / name, step)
        self.tensorboard = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)
        self.wandb: Any = None
        if wandb:
            try:
                import wandb as library
            except ImportError as error:
                raise ValueError(f"wandb={wandb}, but wandb is not installed: pip install wandb") from error
            self.wandb = library.init(project=wandb, name=out.name, id=out.name, resume="allow", config=dict(settings))

    def write(self, name: str, step: int, figures: Mapping[str, float]) -> None:
        """One row of NAME.csv, whose columns the first row decides, and the same elsewhere."""
        path = self.out / f"{name}.csv"
        new = not path.exists() or not path.stat().st_size
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, ["step", *figures])
            if new:
                writer.writeheader()
            writer.writerow({"step": step} | {key: f"{value:.6g}" for key, value in figures.items()})
        for key, value in figures.items():
            self.tensorboard.add_scalar(f"{name}/{key}", value, step)
        self.tensorboard.flush()
        if self.wandb is not None:
            self.wandb.log({f"{name}/{key}": value for key, value in figures.items()}, step=step)

    def table(self, name: str, rows: Mapping[str, Mapping[str, float]]) -> None:
        """NAME.csv at once, a row a picture."""
        with (self.out / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["picture", *next(iter(rows.values()))])
            writer.writerows([picture, *(f"{value:.6g}" for value in row.values())] for picture, row in rows.items())

    def picture(self, step: int, picture: Image.Image) -> None:
        folder = self.out / "samples"
        folder.mkdir(exist_ok=True)
        picture.save(folder / f"step-{step:08d}.png")
        self.tensorboard.add_image("samples", np.asarray(picture), step, dataformats="HWC")

    def close(self) -> None:
        self.tensorboard.close()
        if self.wandb is not None:
            self.wandb.finish()


def _cut(path: Path, step: int) -> None:
    if not path.exists():
        return
    with path.open(newline="") as file:
        header, *rows = csv.reader(file)
    kept = [row for row in rows if int(row[0]) <= step]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *kept])
