"""Where the numbers of a run go: CSV, TensorBoard, and Weights & Biases where asked for."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from ..weights import write_atomically


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
        """One row of NAME.csv, and the same elsewhere. Figures that earlier rows lack become columns."""
        path = self.out / f"{name}.csv"
        row = {"step": str(step)} | {key: f"{value:.6g}" for key, value in figures.items()}
        header, rows = _rows(path)
        if new := [key for key in row if key not in header]:
            header += new
            _write(path, header, rows)
        with path.open("a", newline="") as file:
            csv.DictWriter(file, header).writerow(row)
        for key, value in figures.items():
            self.tensorboard.add_scalar(f"{name}/{key}", value, step)
        self.tensorboard.flush()
        if self.wandb is not None:
            self.wandb.log({f"{name}/{key}": value for key, value in figures.items()}, step=step)

    def table(self, name: str, rows: Mapping[str, Mapping[str, float]]) -> None:
        """NAME.csv at once, a row a picture."""
        columns = ["picture", *next(iter(rows.values()))]
        cells = [[picture, *(f"{value:.6g}" for value in row.values())] for picture, row in rows.items()]
        _write(self.out / f"{name}.csv", columns, [dict(zip(columns, row, strict=True)) for row in cells])

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
    header, rows = _rows(path)
    if header:
        _write(path, header, [row for row in rows if int(row["step"]) <= step])


def _rows(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and whole rows: a run that was killed, or a full disk, may have left the last one half-written."""
    if not path.exists():
        return [], []
    with path.open(newline="") as file:
        header, *rows = [*csv.reader(file)] or [[]]
    return header, [dict(zip(header, row, strict=True)) for row in rows if len(row) == len(header)]


def _write(path: Path, header: Sequence[str], rows: Sequence[Mapping[str, str]]) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, header)
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))
