"""Training: it learns, it goes on to the same numbers, its data is what it says."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from infdit_core import load_infdit
from infdit_core.images import resize
from infdit_core.infdit import InfDiTConfig
from infdit_core.training import loop
from infdit_core.training.config import parse
from infdit_core.training.data import CropSampler, load_photographs
from infdit_core.weights import open_weights

SMALL = InfDiTConfig(
    hidden_size=32,
    num_layers=2,
    num_heads=2,
    block_size=16,
    parametrisation="residual",
    sigma_data=0.1,
    sigma_min=0.005,
    sigma_max=2.0,
)
SETTINGS = ["batch=4", "crop=32", "held=1", "validate_every=8", "save_every=4", "warmup=2", "learning_rate=0.01"]


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    folder = tmp_path / "photographs"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(3):
        waves = np.sin(np.linspace(0, 60 + 20 * i, 120))[:, None, None] * rng.normal(size=(1, 150, 3))
        Image.fromarray((127 + 60 * waves).clip(0, 255).astype(np.uint8)).save(folder / f"{i}.png")
    (folder / "notes.txt").write_text("not a picture")
    return folder


def train(photographs: Path, out: Path, steps: int) -> dict[str, torch.Tensor]:
    path = loop.train(parse([*SETTINGS, f"photographs={photographs}", f"out={out}", f"steps={steps}"]))
    file = open_weights(path)
    return {name: file.read(name) for name in file.shapes}


def test_training_learns_and_goes_on_to_the_same_numbers(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "NANO", SMALL)
    whole = train(photographs, tmp_path / "whole", 16)

    saves = 0
    save = loop.Run.save

    def die_after_the_second_save(self: loop.Run, path: Path) -> None:
        nonlocal saves
        save(self, path)
        saves += 1
        if saves == 2:
            raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "save", die_after_the_second_save)
        with pytest.raises(SystemExit):
            train(photographs, tmp_path / "killed", 16)
    resumed = train(photographs, tmp_path / "killed", 16)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)

    log = np.genfromtxt(tmp_path / "whole" / "log.csv", delimiter=",", names=True)
    assert log["loss"][-1] < log["loss"][0]
    assert log["psnr_sigma_03"][-1] > log["psnr_sigma_03"][0]
    assert load_infdit(tmp_path / "whole" / "weights.safetensors").config == SMALL


def test_going_on_from_weights(photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "NANO", SMALL)
    train(photographs, tmp_path / "first", 4)
    settings = [*SETTINGS, f"photographs={photographs}", f"out={tmp_path / 'second'}", "steps=4"]
    run = loop.Run(parse([*settings, f"start_from={tmp_path / 'first' / 'weights.safetensors'}"]))
    expected = load_infdit(tmp_path / "first" / "weights.safetensors").state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in run.model.state_dict().items())


def test_crops_fit_their_low_resolution(photographs: Path) -> None:
    sampler = CropSampler(load_photographs(photographs, 4, 64), crop=32, scale=4, margin=4, seed=0)
    batch = sampler.batch(6)
    assert batch.original.shape == batch.upsampled.shape == (6, 3, 32, 32)
    assert batch.low_res.shape == (6, 3, 16, 16)
    inner = batch.low_res[:, :, 4:-4, 4:-4]
    # Reducing the crop alone gives its part of the reduced photograph, borders and rounding to 8 bit apart.
    difference = (resize(batch.original, (8, 8)) - inner)[:, :, 2:-2, 2:-2].abs()
    assert difference.max() < 0.02
    again = CropSampler(load_photographs(photographs, 4, 64), crop=32, scale=4, margin=4, seed=0).batch(6)
    assert torch.equal(batch.original, again.original)


def test_settings_that_make_no_sense(tmp_path: Path) -> None:
    good = ["photographs=a", "out=b"]
    for bad, said in [
        ([*good, "step=3"], "no setting"),
        ([*good, "steps=three"], "int expected"),
        ([*good, "steps"], "key=value"),
        (["out=b"], "photographs=FOLDER"),
    ]:
        with pytest.raises(ValueError, match=said):
            parse(bad)
    (tmp_path / "text.txt").write_text("hello")
    with pytest.raises(ValueError, match="holds no picture"):
        load_photographs(tmp_path, 4, 16)
