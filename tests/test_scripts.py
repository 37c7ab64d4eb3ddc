"""The scripts that measure and show: run on small pictures, their figures against the library's."""

import csv
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from infdit_core import InfDiT, upscale
from infdit_core.infdit import save_infdit
from infdit_core.metrics import psnr_y

SCRIPTS = Path(__file__).parents[1] / "scripts"
Run = Callable[..., None]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """run("script.py", argument, ..., option=value or list of values), in this process."""
    monkeypatch.syspath_prepend(str(SCRIPTS))

    def run(script: str, *arguments: object, **options: Any) -> None:
        for name, value in options.items():
            arguments += (f"--{name}", *(value if isinstance(value, list) else [value]))
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        runpy.run_path(str(SCRIPTS / script))

    return run


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def tensor(image: Image.Image) -> Tensor:
    """(1, 3, H, W) in 0..1."""
    return torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32) / 255).permute(2, 0, 1)[None]


def test_quality_measures_what_the_library_makes(
    run: Run, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("quality.py", photographs, presets="faithful", results=tmp_path / "results", csv=tmp_path / "quality.csv")
    found = rows(tmp_path / "quality.csv")
    assert [(row["picture"], row["name"]) for row in found] == [
        (str(n), name) for n in range(4) for name in ("bicubic", "Lanczos", "faithful")
    ]
    original = Image.open(photographs / "0.png")
    small = original.resize((28, 24), Image.Resampling.BICUBIC)
    bicubic = small.resize(original.size, Image.Resampling.BICUBIC)
    assert float(found[0]["psnr_y"]) == pytest.approx(psnr_y(tensor(bicubic), tensor(original)), abs=1e-3)
    result = tensor(Image.open(tmp_path / "results" / "faithful" / "0.png"))
    ours = upscale(tensor(small).permute(0, 2, 3, 1), scale=4, preset="faithful").permute(0, 3, 1, 2)
    assert (result - ours).abs().max() < 0.51 / 255
    assert float(found[2]["psnr_y"]) == pytest.approx(psnr_y(result, tensor(original)), abs=1e-3)
    mean = np.mean([float(row["psnr_y"]) for row in found if row["name"] == "faithful"])
    assert f"| faithful | {mean:.2f} |" in capsys.readouterr().out


def test_degraded_low_resolutions_are_harder(run: Run, photographs: Path, tmp_path: Path) -> None:
    for name, options in {"clean": {}, "degraded": {"degraded": []}}.items():
        run("quality.py", photographs, presets=[], middle=64, csv=tmp_path / name, **options)
    clean, degraded = (rows(tmp_path / name) for name in ("clean", "degraded"))
    assert len(clean) == len(degraded) == 8
    assert all(float(d["psnr_y"]) < float(c["psnr_y"]) for c, d in zip(clean, degraded, strict=True))


def test_seams_are_told_from_contours(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A contour where one of our borders is weighs at that place alone, what begins anew in every block always does."""

    def blocks(low_res: Tensor, *, scale: int, **_: object) -> Tensor:
        large = low_res.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
        row, column = (torch.arange(length) // 32 for length in large.shape[1:3])
        return large + 0.05 * ((row[:, None] + column) % 2)[..., None]

    monkeypatch.setattr("infdit_core.upscale", blocks)
    pixels = np.random.default_rng(0).integers(100, 140, size=(160, 160, 3), dtype=np.uint8)
    pixels[:, 64:] += 100
    (tmp_path / "originals").mkdir()
    for number in range(2):
        Image.fromarray(np.rot90(pixels, number)).save(tmp_path / "originals" / f"{number}.png")
    run("seams.py", tmp_path / "originals", presets="faithful")
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[-3:]]
    everywhere, at_one_place = ({line[0]: float(line[n].split()[0]) for line in lines} for n in (1, 2))
    assert at_one_place["original"] > 5 and 0.9 < everywhere["original"] < 1.1
    assert everywhere["faithful"] > 1.4
    (tmp_path / "others" / "rival").mkdir(parents=True)
    with pytest.raises(SystemExit, match=r"rival/0\.png is missing"):
        run("seams.py", tmp_path / "originals", presets=[], others=tmp_path / "others")


def test_strip_shows_details_side_by_side(run: Run, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    pictures = {name: random.integers(256, size=(200, 240, 3), dtype=np.uint8) for name in ("original", "a", "b")}
    for name, pixels in pictures.items():
        (tmp_path / "made" / name).mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / "made" / name / "one.png")
    out = tmp_path / "strip.png"
    run("strip.py", tmp_path / "made" / "original", out, of="one:30:20", results=tmp_path / "made", names=["a", "b"])
    details = [np.asarray(Image.open(out))[22:, 164 * column :][:160, :160] for column in range(4)]
    for column, name in ((0, "original"), (2, "a"), (3, "b")):
        assert np.array_equal(details[column], pictures[name][20:180, 30:190])
    with pytest.raises(SystemExit, match="a/two"):
        Image.fromarray(pictures["a"]).save(tmp_path / "made" / "original" / "two.png")
        run("strip.py", tmp_path / "made" / "original", out, of="two:0:0", results=tmp_path / "made", names="a")


def test_sweep_counts_evaluations(
    run: Run,
    photographs: Path,
    tmp_path: Path,
    alexnet: dict[str, Tensor],
    tiny_model: Callable[..., InfDiT],
    capsys: pytest.CaptureFixture[str],
) -> None:
    save_file(alexnet, tmp_path / "alex.safetensors")
    sizes = {"num_layers": 1, "predictor_width": 4, "predictor_depth": 1}
    save_infdit(tmp_path / "tiny.safetensors", tiny_model(**sizes, parametrisation="residual", grids=2))
    weights = {"lpips": tmp_path / "alex.safetensors", "model": tmp_path / "tiny.safetensors"}
    tried = {"starts": 0.2, "ends": 0.05, "samplers": ["euler:2", "heun:2"]}
    run("sweep.py", photographs, **weights, **tried, csv=tmp_path / "sweep.csv")
    table = [line.split(" | ")[:4] for line in capsys.readouterr().out.splitlines()[2:]]
    assert table == [
        ["| 0", "", "the first picture", "0"],
        ["| 0", "", "the estimate", "2"],
        ["| 0.2", "0.05", "euler, 2", "4"],
        ["| 0.2", "0.05", "heun, 2", "6"],
    ]
    assert [(row["name"], row["picture"]) for row in rows(tmp_path / "sweep.csv")] == [
        (name, str(n))
        for name in ("the first picture", "the estimate", "euler, 2, end 0.05", "heun, 2, end 0.05")
        for n in range(4)
    ]


def test_made_pictures_are_always_the_same(run: Run, photographs: Path, tmp_path: Path) -> None:
    for folder in ("once", "again"):
        run("made_pictures.py", photographs, tmp_path / folder, each=2)
    once = sorted(path.name for path in (tmp_path / "once").iterdir())
    assert len(once) == 18  # two of eight kinds, and of the photographs out of focus
    for name in once:
        assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_reduced_pictures_are_tiles_of_all_of_a_photograph(run: Run, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(256, size=(700, 1000, 3), dtype=np.uint8)
    (tmp_path / "photographs").mkdir()
    Image.fromarray(pixels).save(tmp_path / "photographs" / "small.png")
    Image.fromarray(np.tile(pixels, (2, 2, 1))).save(tmp_path / "photographs" / "large.png")
    Image.fromarray(255 - pixels).save(tmp_path / "photographs" / "small.webp", lossless=True)  # takes nothing's place
    for folder in ("once", "again"):
        run("reduced_pictures.py", tmp_path / "photographs", tmp_path / folder)
    once = sorted(path.name for path in (tmp_path / "once").iterdir())
    cut = {"_".join(name.split("_")[:2]) for name in once}
    assert cut == {"small.png_0", "small.webp_0", *(f"large.png_{n}" for n in range(4))}
    for name in once:
        assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    small = [name for name in once if name.startswith("small.png")]
    top = [Image.open(tmp_path / "once" / name) for name in small if name.startswith("small.png_0_0")]
    left = [Image.open(tmp_path / "once" / name) for name in small if name.endswith("_0.png")]
    width, height = sum(tile.width for tile in top), sum(tile.height for tile in left)
    assert 1.3 <= 1000 / width <= 2.2 and height / width == pytest.approx(0.7, abs=0.01)
    whole = Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS)
    assert np.array_equal(np.asarray(top[0]), np.asarray(whole.crop((0, 0, *top[0].size))))


def test_a_folder_without_pictures_is_named(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="empty holds no pictures"):
        run("quality.py", tmp_path / "empty")
