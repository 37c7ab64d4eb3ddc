"""Training runs: they learn, go on to the same numbers wherever they were stopped, and keep and show what they did."""

import contextlib
import csv
import functools
import math
import os
import pdb
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from lightning_fabric import Fabric
from PIL import Image
from torch import Tensor, nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from towers import saved

from infdit_core import cli, load_infdit, upscale
from infdit_core import train as entry
from infdit_core.infdit import Preset
from infdit_core.infdit.keys import key_table
from infdit_core.infdit.lora import apply_lora, open_lora
from infdit_core.semantics import load_clip
from infdit_core.training import checkpoints, loop, losses, validation
from infdit_core.training.config import OptimizerConfig, TrainConfig, parse
from infdit_core.training.data import Batch
from infdit_core.training.losses import training_loss
from infdit_core.training.optimizers import Centring, flatten_kernels, learning_rate, optimizers
from infdit_core.training.validation import Held, validate
from infdit_core.weights import open_weights

CloseTo = Callable[..., None]

ROOT = Path(__file__).parents[1]
STEPS = 20
# Everything that draws random numbers is in it.
TINY = """
network:
  {hidden_size: 32, num_layers: 2, num_heads: 2, block_size: 16, semantic_size: 8, time_channels: 16,
   parametrisation: residual, sigma_data: 0.1, sigma_min: 0.005, sigma_max: 2.0}
data:
  {crop: 48, held: 1, workers: 0, direct: 0.7, mirror: 0.3, turn: true, candidates: 2, surrounded: 0.5, degraded: 0.5,
   mild: 0.5}
loss: {sigma_log_mean: -2.4, sigma_log_deviation: 1.2, regression: 0.25, lr_dropout: 0.1}
optimizer: {kind: muon, learning_rate: 5.0e-3, clip: 1.0, warmup: 5, decay: 0.3, ema: 0.9}
presets: [faithful]
batch: 2
steps: 20
precision: float32
log_every: 4
validate_every: 8
save_every: 10
"""
PLAIN = ["data.crop=32", "data.surrounded=0", "data.degraded=0", "data.candidates=1", "validate_every=1000"]  # fast


@pytest.fixture(scope="module", autouse=True)
def _no_time_for_the_matmul_rate() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "matmul_rate", lambda *_: 1e12)
        yield


@pytest.fixture(scope="module")
def tiny(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments of a run, but for its folder."""
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(TINY)
    return [str(path), f"data.train=[{photographs}]"]


@pytest.fixture(scope="module")
def whole(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing stopped."""
    out = tmp_path_factory.mktemp("whole")
    assert entry.main([*tiny, f"out={out}"]) == 0
    return out


def train(*arguments: Any) -> Path | None:
    return loop.train(parse([str(argument) for argument in arguments]))


def state(out: Path, step: int) -> dict[str, Tensor]:
    """Everything in a checkpoint but times, by dotted name."""
    file = out / f"state-{step}.pt"
    dcp_to_torch_save(out / "checkpoints" / f"step-{step:08d}" / "state", file)
    flat: dict[str, Tensor] = {}

    def walk(value: Any, name: str) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(inner, f"{name}.{key}")
        elif not name.endswith((".seconds", ".saving")):
            flat[name] = torch.as_tensor(value) if isinstance(value, int | float | Tensor) else value

    walk(torch.load(file, weights_only=False), "")
    return flat


def assert_same_state(found: Path, expected: Path, step: int = STEPS) -> None:
    a, b = state(found, step), state(expected, step)
    assert a.keys() == b.keys()
    for name, value in a.items():
        same = torch.equal(value, b[name]) if isinstance(value, Tensor) else value == b[name]
        assert same, f"{name} differs"


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def assert_same_log(found: Path, expected: Path) -> None:
    """But for what measures time."""
    for name, kept in (("log.csv", ("step", "loss", "learning_rate", "gradient_norm")), ("validation.csv", None)):
        a, b = (
            [{k: v for k, v in row.items() if not kept or k.startswith(kept)} for row in rows(out / name)]
            for out in (found, expected)
        )
        assert a == b


def weights(path: Path) -> dict[str, Tensor]:
    file = open_weights(path)
    return {name: file.read(name) for name in file.shapes}


def steps_in(out: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (out / "checkpoints").iterdir())


def after_step(patch: pytest.MonkeyPatch, number: int, act: Callable[[], object]) -> None:
    step = loop._step

    @functools.wraps(step)
    def wrapped(model: Any, state: loop.State, *rest: Any) -> float:
        norm = step(model, state, *rest)
        if state.step == number:
            act()
        return norm

    patch.setattr(loop, "_step", wrapped)


def _stop() -> None:
    raise InterruptedError("stopped")


# --- going on


def test_a_run_goes_on_after_kill_9_to_the_same_numbers(whole: Path, tiny: list[str], tmp_path: Path) -> None:
    script = """
import os, signal, sys
from infdit_core import train
from infdit_core.training import loop
loop.matmul_rate = lambda *_: 1e12
step = loop._step
def wrapped(model, state, *rest):
    if state.step == 13:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(model, state, *rest)
loop._step = wrapped
train.main(sys.argv[1:])
"""
    arguments = [*tiny, f"out={tmp_path}"]
    # One thread, as in this process: sums in another order differ in their last bits.
    alone = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, *arguments]
    killed = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert steps_in(tmp_path) == [8, 10]
    assert [row["step"] for row in rows(tmp_path / "log.csv")] == ["4", "8", "12"]  # the last one comes again
    assert entry.main(arguments) == 0
    assert_same_state(tmp_path, whole)
    assert_same_log(tmp_path, whole)
    assert [row["step"] for row in rows(tmp_path / "log.csv")] == ["4", "8", "12", "16", "20"]
    assert (tmp_path / "weights.safetensors").exists()


def test_a_run_goes_on_from_whatever_moment_of_a_save_it_died_in(
    whole: Path, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(name: str, before: bool) -> Callable[..., Any]:
        real = getattr(checkpoints, name)

        def wrapped(*arguments: Any) -> Any:
            if before:
                _stop()
            real(*arguments)
            return _stop()

        return wrapped

    for name, before in (("best", True), ("prune", True), ("prune", False)):
        shutil.rmtree(tmp_path / "checkpoints" / "step-00000010", ignore_errors=True)
        with monkeypatch.context() as patch, pytest.raises(InterruptedError):
            after_step(patch, 10, functools.partial(patch.setattr, checkpoints, name, dies(name, before)))
            train(*tiny, f"out={tmp_path}")
    assert train(*tiny, f"out={tmp_path}") == tmp_path / "weights.safetensors"
    assert_same_state(tmp_path, whole)
    assert_same_log(tmp_path, whole)


def test_a_finished_run_is_left_as_it_is(tiny: list[str], tmp_path: Path) -> None:
    first = train(*tiny, *PLAIN, f"out={tmp_path}", "steps=3")
    assert first is not None
    before, log = state(tmp_path, 3), (tmp_path / "log.csv").read_bytes()
    assert train(*tiny, *PLAIN, f"out={tmp_path}", "steps=3") == first
    assert all(torch.equal(value, before[name]) for name, value in state(tmp_path, 3).items() if name[:4] == ".net")
    assert (tmp_path / "log.csv").read_bytes() == log


def test_seeds_give_different_runs(tiny: list[str], tmp_path: Path) -> None:
    for seed in (0, 1):
        train(*tiny, *PLAIN, f"out={tmp_path / str(seed)}", "steps=2", f"seed={seed}")
    first, other = (weights(tmp_path / str(seed) / "weights.safetensors") for seed in (0, 1))
    assert not all(torch.equal(value, other[name]) for name, value in first.items())


def test_workers_change_no_number(tiny: list[str], tmp_path: Path) -> None:
    for workers in (0, 2):
        train(*tiny, *PLAIN, f"out={tmp_path / str(workers)}", "steps=4", f"data.workers={workers}")
    assert_same_state(tmp_path / "0", tmp_path / "2", 4)


def test_global_random_states_stay_untouched(tiny: list[str], tmp_path: Path) -> None:
    def states() -> list[Any]:
        return [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]  # noqa: NPY002

    before = states()
    train(*tiny, f"out={tmp_path}", "steps=2", "data.workers=1")
    assert states() == before


# --- signals


def test_sigterm_saves_and_stops_and_the_run_goes_on(
    whole: Path, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*tiny, f"out={tmp_path}"]
    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        after_step(patch, 7, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert entry.main(arguments) == 143
    assert signal.getsignal(signal.SIGTERM) is handler
    assert steps_in(tmp_path) == [7]
    assert "stopped and saved at step 7; the same command goes on" in capsys.readouterr().err
    assert entry.main(arguments) == 0
    assert_same_state(tmp_path, whole)
    assert_same_log(tmp_path, whole)


def test_sigusr1_saves_once_and_goes_on(tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[int] = []
    save = checkpoints.save
    monkeypatch.setattr(
        checkpoints, "save", lambda folder, step, *rest: (saved.append(step), save(folder, step, *rest))[1]
    )
    after_step(monkeypatch, 3, lambda: os.kill(os.getpid(), signal.SIGUSR1))
    assert entry.main([*tiny, *PLAIN, f"out={tmp_path}", "steps=6"]) == 0
    assert saved == [3, 6]


def test_a_signal_while_others_are_waited_for_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    with loop._signals() as asked:
        fabric = Fabric(accelerator="cpu", devices=1)

        def slowly(flags: Tensor, _: Fabric) -> Tensor:
            os.kill(os.getpid(), signal.SIGUSR1)
            return flags

        with monkeypatch.context() as patch:
            patch.setattr(loop, "_summed", slowly)
            assert asked.agreed(fabric) == (False, False)
        assert asked.agreed(fabric) == (False, True)
        assert asked.agreed(fabric) == (False, False)


# --- several processes


# Every run breaks off after step 3 and goes on from there.
TWO_PROCESSES = """
import sys
from infdit_core import train
from infdit_core.training import loop

loop.matmul_rate = lambda *_: 1e12
step = loop._step

def breaks(model, state, *rest):
    if state.step == 3:
        raise InterruptedError
    return step(model, state, *rest)

out, *arguments = sys.argv[1:]
for strategy in ("auto", "fsdp"):
    run = [*arguments, f"out={out}/{strategy}", f"strategy={strategy}"]
    loop._step = breaks
    try:
        train.main(run)
    except InterruptedError:
        loop._step = step
    assert train.main(run) == 0
"""


def test_two_processes_equal_one_with_twice_the_accumulation(
    tiny: list[str], tmp_path: Path, assert_close: CloseTo
) -> None:
    arguments = [*tiny, "optimizer.kind=adamw", "data.held=2", "steps=4", "log_every=2"]
    # A save after an odd number of steps has losses of both processes that no row of the log shows yet.
    arguments += ["save_every=3", "keep=9"]
    one = tmp_path / "one"
    train(*arguments, f"out={one}", "accumulate=2")
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    done = subprocess.run(
        [sys.executable, *torchrun, str(script), str(tmp_path), *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("going on from step 3\n") == 2
    for strategy in ("auto", "fsdp"):
        two = tmp_path / strategy
        found, expected = state(two, 4), state(one, 4)
        assert found.keys() == expected.keys()
        for name, value in found.items():
            if name.startswith((".network", ".average")):
                assert_close(value, expected[name], 2e-5)
        pending, alone = state(two, 3)[".losses"] * 2, state(one, 3)[".losses"]  # each of the two has a half
        torch.testing.assert_close(pending, alone, rtol=1e-3, atol=1e-4)
        for name in ("log.csv", "validation.csv"):
            for row, row_of_one in zip(rows(two / name), rows(one / name), strict=True):
                for column in row:
                    if any(part in column for part in ("step", "loss", "gradient_norm", "learning_rate", "psnr")):
                        a, b = float(row[column]), float(row_of_one[column])
                        assert a == pytest.approx(b, rel=2e-3, nan_ok=True), (strategy, name, column)
        assert weights(two / "weights.safetensors").keys() == weights(one / "weights.safetensors").keys()


# --- checkpoints


def test_the_last_and_the_best_are_kept(tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([math.nan, 1.0, 2.0, 4.0])
    monkeypatch.setattr(loop, "_validate", lambda *_: next(scores))
    half_written = tmp_path / "checkpoints" / ".step-00000001.part"
    half_written.mkdir(parents=True)
    (half_written / "weights.safetensors").write_text("half")
    train(*tiny, *PLAIN, f"out={tmp_path}", "steps=8", "validate_every=2", "save_every=1", "keep=2")
    assert steps_in(tmp_path) == [4, 7, 8]
    assert not list((tmp_path / "checkpoints").glob(".*"))
    best = tmp_path / "checkpoints" / "step-00000004" / "weights.safetensors"
    last = tmp_path / "checkpoints" / "step-00000008" / "weights.safetensors"
    assert (tmp_path / "weights.safetensors").read_bytes() == best.read_bytes() != last.read_bytes()


def test_weights_of_a_run_are_averaged_ones_with_their_history(whole: Path) -> None:
    step = int(min(rows(whole / "validation.csv"), key=lambda row: float(row["loss"]))["step"])
    assert step == STEPS
    file = open_weights(whole / "weights.safetensors")
    assert (file.metadata["steps"], file.metadata["crops"]) == ("20", "40 of 48 px")
    saved = state(whole, STEPS)
    for disk, code in key_table(2).items():
        if f".average.{code}" in saved:
            assert torch.equal(file.read(disk), saved[f".average.{code}"].bfloat16())
    assert not torch.equal(saved[".average.final.weight"], saved[".network.final.weight"])
    model = load_infdit(whole / "weights.safetensors")
    assert model.config == parse([str(whole / "config.yaml")]).network


def full_disk(*_: Any) -> None:
    raise OSError(28, "No space left on device")


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(("when", "said"), [("state", "File too large"), ("weights", "No space left on device")])
def test_a_full_disk_leaves_earlier_checkpoints_whole(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str, said: str
) -> None:
    arguments = [*tiny, *PLAIN, f"out={tmp_path}", "steps=4", "save_every=2", "log_every=1"]
    save = checkpoints.save

    def save_on_full_disk(folder: Path, step: int, *rest: Any) -> Path:
        if step != 4:
            return save(folder, step, *rest)
        with monkeypatch.context() as patch, contextlib.ExitStack() as full:
            if when == "weights":
                patch.setattr(loop, "save_infdit", lambda *_, **__: full_disk())
            else:
                full.enter_context(files_of_at_most(20_000))
            return save(folder, step, *rest)

    with monkeypatch.context() as patch, pytest.raises(OSError, match=rf"step-00000004 can't be written: .*{said}"):
        patch.setattr(checkpoints, "save", save_on_full_disk)
        train(*arguments)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]
    assert train(*arguments)
    assert steps_in(tmp_path) == [2, 4]
    assert [row["step"] for row in rows(tmp_path / "log.csv")] == ["1", "2", "3", "4"]


@pytest.mark.parametrize("damage", ["cut", "garbage", "no metadata", "garbage metadata", "no state"])
def test_a_damaged_checkpoint_is_refused_by_name(whole: Path, tiny: list[str], tmp_path: Path, damage: str) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    checkpoint = out / "checkpoints" / "step-00000020"
    data, metadata = checkpoint / "state" / "__0_0.distcp", checkpoint / "state" / ".metadata"
    match damage:
        case "cut":
            data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
        case "garbage":
            data.write_bytes(b"\xff" * data.stat().st_size)
        case "no metadata":
            metadata.unlink()
        case "garbage metadata":
            metadata.write_bytes(b"hello")
        case "no state":
            shutil.rmtree(checkpoint / "state")
    with pytest.raises(OSError, match=r"step-00000020 can't be gone on from: \S.*Delete it to go on from the one"):
        train(*tiny, f"out={out}")
    if damage == "cut":  # what it advises
        shutil.rmtree(checkpoint)
        train(*tiny, f"out={out}")
        assert_same_state(out, whole)


# --- one folder, one run, one network


def test_two_runs_in_one_folder_are_refused(tiny: list[str], tmp_path: Path) -> None:
    arguments = [*tiny, *PLAIN, f"out={tmp_path}", "steps=1"]
    with FileLock(tmp_path / "run.lock"), pytest.raises(ValueError, match="another run is at work"):
        train(*arguments)
    assert not (tmp_path / "config.yaml").exists()
    assert train(*arguments)


def test_a_failed_run_gives_its_folder_free(tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [*tiny, *PLAIN, f"out={tmp_path}", "steps=2"]
    with monkeypatch.context() as patch, pytest.raises(InterruptedError) as failure:
        after_step(patch, 1, _stop)
        train(*arguments)
    assert train(*arguments)
    assert failure.value  # alive until here, with all its frames


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ("network.hidden_size=64", r"network\.hidden_size was 32, is 64"),
        ("network.sigma_data=0.2", r"network\.sigma_data was 0\.1, is 0\.2"),
        ("optimizer.kind=adamw", r"optimizer\.kind was muon, is adamw"),
    ],
)
def test_a_folder_keeps_its_network(whole: Path, tiny: list[str], tmp_path: Path, changed: str, said: str) -> None:
    shutil.copytree(whole, tmp_path / "run")
    settings = (whole / "config.yaml").read_text()
    with pytest.raises(ValueError, match=said):
        train(*tiny, f"out={tmp_path / 'run'}", changed)
    assert (tmp_path / "run" / "config.yaml").read_text() == settings


def test_other_settings_may_change_on_the_way(
    whole: Path, tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    preset = "network.presets.balanced={steps: 2, start: 0.1}"
    changed = ["steps=21", "presets=[balanced]", "loss.sigma_log_mean=-2", preset]
    before = rows(out / "validation.csv")
    train(*tiny, f"out={out}", *changed)
    checkpoint = out / "checkpoints" / "step-00000021"
    assert load_infdit(checkpoint / "weights.safetensors").config.presets["balanced"] == Preset(2, 0.1)
    said = capsys.readouterr().err
    assert "steps was 20, is 21 from here on" in said
    assert "going on from step 20" in said
    after = rows(out / "validation.csv")
    assert [row["step"] for row in after] == ["8", "16", "20", "21"]
    # Figures that are new stand in columns of their own, under their names.
    assert [{key: row[key] for key in before[0]} for row in after[:3]] == before
    assert after[3]["clean_faithful_psnr_y"] == after[2]["clean_balanced_psnr_y"] == ""
    assert float(after[3]["clean_balanced_psnr_y"]) > 5
    assert float(after[3]["clean_bicubic_psnr_y"]) == float(before[0]["clean_bicubic_psnr_y"])


def test_scores_of_another_loss_are_forgotten(tiny: list[str], tmp_path: Path) -> None:
    arguments = [*tiny, *PLAIN, f"out={tmp_path}"]
    train(*arguments, "steps=2")
    first = tmp_path / "checkpoints" / "step-00000002" / "score.json"
    first.write_text('{"loss": 0.0}')  # better than any
    train(*arguments, "steps=3")
    assert first.exists() and checkpoints.best(tmp_path / "checkpoints") == first.parent
    train(*arguments, "steps=4", "loss.overshoot=3")
    assert checkpoints.best(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "step-00000004"


def test_a_log_that_was_cut_in_a_row_is_taken_up(whole: Path, tiny: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "checkpoints" / "step-00000020")
    log = (out / "log.csv").read_bytes()
    (out / "log.csv").write_bytes(log[: log.rindex(b"\n20,") + 2])  # "2", of a step that is before the checkpoint's
    (out / "validation.csv").write_bytes(b"")
    train(*tiny, f"out={out}")
    assert_same_state(out, whole)
    assert [row["step"] for row in rows(out / "log.csv")] == ["4", "8", "12", "16", "20"]
    assert [row["step"] for row in rows(out / "validation.csv")] == ["20"]


def test_the_merged_settings_stand_with_the_run(whole: Path, tiny: list[str]) -> None:
    assert parse([str(whole / "config.yaml")]) == parse([*tiny, f"out={whole}"])


# --- fine-tuning


def test_fine_tuning_starts_from_the_file(whole: Path, tiny: list[str], tmp_path: Path) -> None:
    path = whole / "weights.safetensors"
    for network in ([], ["network=null"]):
        config = parse([*tiny, *network, f"out={tmp_path}", f"start_from={path}"])
        network_found = loop._network(config)
        expected = load_infdit(path)
        assert replace(network_found.config, presets={}) == replace(expected.config, presets={})
        for name, value in expected.state_dict().items():
            assert torch.equal(network_found.state_dict()[name], value)
        trained = {name for name, p in network_found.named_parameters() if p.requires_grad}
        frozen = {name for name, _ in network_found.named_parameters()} - trained
        assert {name.partition(".")[0] for name in frozen} == {"semantic_in", "semantic_out"}
    out = train(*tiny, *PLAIN, "network=null", f"out={tmp_path}", f"start_from={path}", "steps=1")
    assert out is not None
    assert load_infdit(out).config == expected.config
    assert train(*tiny, *PLAIN, "network=null", f"out={tmp_path}", f"start_from={path}", "steps=2")  # it goes on


def test_what_clip_sees_is_learnt(whole: Path, tiny: list[str], tmp_path: Path) -> None:
    clip = saved(tmp_path, "small ViT")
    arguments = [*tiny, "network.semantic_size=48", f"clip={clip}", "steps=4", "validate_every=2"]
    out = train(*arguments, f"out={tmp_path / 'run'}")
    assert out is not None
    network = load_infdit(out)
    assert network.uses_semantics
    assert not load_infdit(whole / "weights.safetensors").uses_semantics
    picture = torch.linspace(0, 1, 768).view(1, 3, 16, 16)
    vector = load_clip(clip).encode_image(picture * 2 - 1)
    given = {"model": network, "scale": 4, "preset": "faithful"}
    with_it, without = (upscale(picture.movedim(1, -1), semantic=v, **given) for v in (vector, None))
    assert not torch.equal(with_it, without)
    with pytest.raises(ValueError, match=r"clip was .* is "):
        train(*tiny, "network.semantic_size=48", f"out={tmp_path / 'run'}", "steps=5")
    with pytest.raises(ValueError, match="LoRA leaves the way for semantics"):
        train(*tiny, "lora.rank=2", f"start_from={whole / 'weights.safetensors'}", f"clip={clip}", f"out={tmp_path}/x")
    with pytest.raises(ValueError, match=r"48 numbers, and the network takes 8: say network\.semantic_size=48"):
        train(*tiny, f"clip={clip}", f"out={tmp_path / 'other'}")


def test_validation_tells_the_network_what_clip_sees(whole: Path) -> None:
    network, generator = load_infdit(whole / "weights.safetensors"), torch.Generator().manual_seed(0)
    torch.nn.init.normal_(network.semantic_out.weight, std=0.5, generator=generator)
    original, low_res = (torch.rand(1, 3, side, side, generator=generator) * 2 - 1 for side in (32, 8))
    figures = []
    for vector in (None, torch.ones(1, 8)):
        held = Held(original / 2 + 0.5, {"clean": Batch(original, low_res, original, vector)})
        ((found, _),) = validate(network, TrainConfig(presets=["faithful"]), [held], None)
        figures.append(found)
    for key in figures[0]:
        assert (figures[0][key] == figures[1][key]) == ("bicubic" in key), key


def test_a_file_with_another_network_is_refused(whole: Path, tiny: list[str], tmp_path: Path) -> None:
    arguments = [*tiny, f"out={tmp_path}", f"start_from={whole / 'weights.safetensors'}"]
    with pytest.raises(ValueError, match=r"another network: hidden_size 32 instead of 64.*network=null"):
        train(*arguments, "network.hidden_size=64")
    with pytest.raises(ValueError, match="preconditioning edm instead of v"):
        train(*arguments, "network.preconditioning=v")
    with pytest.raises(ValueError, match=r"nowhere\.safetensors doesn't exist"):
        train(*arguments, "start_from=nowhere.safetensors")


RATE = "optimizer.learning_rate=1e-3"
PREDICTOR = ["network.predictor_width=4", "network.predictor_depth=1", "loss.lr_dropout=0", "presets=[faithful]"]


@pytest.fixture(scope="module")
def predicting(whole: Path, tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that gave the network of `whole` a predictor."""
    out = tmp_path_factory.mktemp("predicting")
    start = f"start_from={whole / 'weights.safetensors'}"
    assert train(*tiny, *PREDICTOR, "stage=predictor", start, f"out={out}", "steps=10", RATE)
    return out


def test_the_first_stage_trains_the_predictor_alone(whole: Path, predicting: Path) -> None:
    before, after = weights(whole / "weights.safetensors"), weights(predicting / "weights.safetensors")
    new = after.keys() - before.keys()
    assert new == {
        f"predictor.{name}.{part}"
        for name in ("head", "tail", "blocks.0.conv_in", "blocks.0.conv_out")
        for part in ("weight", "bias")
    }
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert after["predictor.tail.weight"].any()
    losses = [float(row["loss"]) for row in rows(predicting / "validation.csv")]
    assert losses[-1] < losses[0]
    assert {"clean_predicted_psnr_y", "degraded_loss_mean"} <= rows(predicting / "validation.csv")[0].keys()


def test_the_first_stage_goes_on_where_it_stopped(
    whole: Path, predicting: Path, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = f"start_from={whole / 'weights.safetensors'}"
    arguments = [*tiny, *PREDICTOR, "stage=predictor", start, f"out={tmp_path}", "steps=10", RATE, "save_every=5"]
    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        after_step(patch, 7, _stop)
        train(*arguments)
    with pytest.raises(ValueError, match="stage was predictor, is network"):
        train(*arguments, "stage=network", f"start_from={predicting / 'weights.safetensors'}")
    train(*arguments)
    assert_same_state(tmp_path, predicting, 10)


def test_a_predictor_made_deeper_and_conditioned_starts_with_the_same_answers(
    predicting: Path, tiny: list[str], tmp_path: Path, assert_close: CloseTo, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, sizes = predicting / "weights.safetensors", ["network.predictor_depth=3", "network.predictor_condition=2"]
    deeper = [*tiny, *PREDICTOR, *sizes, "steps=4"]
    first, low_res = [*deeper, "stage=predictor", f"start_from={start}"], torch.linspace(-1, 1, 189).view(1, 3, 9, 7)
    before = load_infdit(start).predict(low_res)
    train(*first, f"out={tmp_path / 'still'}", "optimizer.learning_rate=1e-12")
    still = load_infdit(tmp_path / "still" / "weights.safetensors")
    assert (still.config.predictor_depth, still.config.predictor_condition) == (3, 2)
    assert_close(still.predict(low_res), before, 1e-6)
    train(*first, f"out={tmp_path / 'learnt'}", RATE)
    learnt = weights(tmp_path / "learnt" / "weights.safetensors")
    assert learnt["predictor.blocks.1.conv_out.weight"].any() and learnt["predictor.blocks.2.conv_out.weight"].any()
    assert learnt["predictor.blocks.0.modulation.weight"].any()
    monkeypatch.setattr(losses, "CONDITION", 0)
    train(*first, f"out={tmp_path / 'untaught'}", RATE)
    untaught, name = weights(tmp_path / "untaught" / "weights.safetensors"), "predictor.condition.0.weight"
    assert not torch.equal(learnt[name], untaught[name])
    with pytest.raises(ValueError, match="predictor_depth 1 instead of 3"):
        train(*deeper, f"start_from={start}", f"out={tmp_path / 'second'}")


def test_the_second_stage_leaves_the_predictor_and_sees_its_picture(
    predicting: Path, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Batch] = []
    real = loop.training_loss
    monkeypatch.setattr(loop, "training_loss", lambda *given: seen.append(given[3]) or real(*given))
    start = predicting / "weights.safetensors"
    arguments = [*tiny, *PREDICTOR, f"start_from={start}", f"out={tmp_path}", "steps=4", "data.surrounded=1"]
    assert train(*arguments) == tmp_path / "weights.safetensors"
    before, after = weights(start), weights(tmp_path / "weights.safetensors")
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed and not any(name.startswith("predictor.") for name in changed)
    network = load_infdit(start)
    assert len(seen) == 4
    for batch in seen:
        assert batch.low_res.shape[3] == 20  # 12 pixels and a block on every side
        assert torch.equal(batch.upsampled, network.upsample(batch.low_res, 4))


DETAILER = ["stage=detailer", "network.detail_rank=2", "loss.perceptual=20", "loss.overshoot=10", "lpips=[w]"]


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for LPIPS."""
    monkeypatch.setattr(loop, "load_lpips", lambda path, device: lambda x, y: (x - y).abs().flatten(1).mean(1))


@pytest.mark.usefixtures("judge")
def test_a_detailer_alone_learns_on_top_of_the_predictor(
    predicting: Path, tiny: list[str], tmp_path: Path, assert_close: CloseTo
) -> None:
    start, low_res = predicting / "weights.safetensors", torch.linspace(-1, 1, 189).view(1, 3, 9, 7)
    still, learnt, further = (tmp_path / name for name in ("still", "learnt", "further"))
    arguments = [*tiny, *PREDICTOR, *DETAILER, "data.degraded=0", "steps=20"]
    train(*arguments, f"start_from={start}", f"out={still}", "optimizer.learning_rate=1e-12")
    before, network = load_infdit(start), load_infdit(still / "weights.safetensors")
    assert network.config.detail_rank == 2
    assert_close(network.predict(low_res, detail=1), before.predict(low_res), 1e-6)

    train(*arguments, f"start_from={start}", f"out={learnt}", "optimizer.learning_rate=3e-4")
    without, after = (float(rows(run / "validation.csv")[-1]["loss"]) for run in (still, learnt))
    assert after < without
    was, now = weights(start), weights(learnt / "weights.safetensors")
    assert all(torch.equal(now[name], tensor) for name, tensor in was.items())
    assert all(name.startswith("detailer.") for name in now.keys() - was.keys())
    assert now["detailer.blocks.0.conv_in.up"].shape == (4, 2) and now["detailer.blocks.0.conv_in.up"].any()
    network = load_infdit(learnt / "weights.safetensors")
    assert not torch.allclose(network.predict(low_res, detail=1), before.predict(low_res), atol=1e-4)

    # From there, with the sizes that the file says.
    on = [*tiny, "network=null", *DETAILER[:1], *DETAILER[2:], "loss.lr_dropout=0", "presets=[faithful]", "steps=2"]
    train(*on, f"start_from={learnt / 'weights.safetensors'}", f"out={further}", "optimizer.learning_rate=1e-12")
    again = load_infdit(further / "weights.safetensors")
    assert_close(again.predict(low_res, detail=1), network.predict(low_res, detail=1), 0.01)


@pytest.mark.usefixtures("judge")
def test_other_stages_keep_a_detailer_or_leave_it_behind(
    predicting: Path, tiny: list[str], tmp_path: Path, assert_close: CloseTo, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Batch, float]] = []
    real = loop.training_loss
    monkeypatch.setattr(loop, "training_loss", lambda *given: seen.append((given[3], given[7])) or real(*given))
    start = f"start_from={predicting / 'weights.safetensors'}"
    train(*tiny, *PREDICTOR, *DETAILER, start, f"out={tmp_path / 'detailer'}", "steps=2", RATE)
    start = f"start_from={tmp_path / 'detailer' / 'weights.safetensors'}"
    kept = weights(tmp_path / "detailer" / "weights.safetensors")
    train(*tiny, *PREDICTOR, start, f"out={tmp_path / 'by_squares'}", "steps=4")
    assert len(seen) == 4 and not any(share for _, share in seen)
    seen.clear()
    train(*tiny, *PREDICTOR, start, f"out={tmp_path / 'network'}", "steps=8", "loss.perceptual=1", "lpips=[w]")
    (row,) = rows(tmp_path / "network" / "validation.csv")
    assert {"clean_loss_mean", "clean_loss_mean_0.7", "clean_loss_mean_0.9"} <= row.keys()
    network = load_infdit(tmp_path / "detailer" / "weights.safetensors")
    assert {share for _, share in seen} == {preset.detail for preset in network.config.presets.values()}
    for batch, share in seen:
        seen_by, margin = functools.partial(network.upsample, batch.low_res), batch.margin(network.config.scale)
        assert torch.equal(batch.upsampled, seen_by(margin, detail=share))
        assert not share or not torch.equal(batch.upsampled, seen_by(margin))
    after = weights(tmp_path / "network" / "weights.safetensors")
    assert load_infdit(tmp_path / "network" / "weights.safetensors").config.presets["balanced"].detail == 0.7
    same = [n for n in kept if n.startswith(("predictor.", "detailer.")) and not n.endswith((".up", ".down"))]
    assert same and all(torch.equal(after[name], kept[name]) for name in same)
    for name in (n.removesuffix(".up") for n in kept if n.endswith(".up")):
        before, now = (x[f"{name}.up"].float() @ x[f"{name}.down"].float() for x in (kept, after))
        assert_close(now, before, 0.01 * float(before.abs().max()))
    train(*tiny, *PREDICTOR, "stage=predictor", start, f"out={tmp_path / 'predictor'}", "steps=2")
    assert load_infdit(tmp_path / "predictor" / "weights.safetensors").detailer is None


@pytest.mark.usefixtures("judge")
def test_unfit_settings_of_a_detailer_are_named(predicting: Path, tiny: list[str], tmp_path: Path) -> None:
    first = [*tiny, *PREDICTOR, *DETAILER, f"out={tmp_path}"]
    start = f"start_from={predicting / 'weights.safetensors'}"
    with pytest.raises(ValueError, match=r"what looks right: say loss\.perceptual=20"):
        parse([*first, start, "loss.perceptual=0"])
    with pytest.raises(ValueError, match=r"no use for these: say lora\.rank=0"):
        parse([*first, start, "loss.own_input=0.1"])
    with pytest.raises(ValueError, match=r"adds to a predictor that knows something: say start_from=FILE"):
        train(*first)
    with pytest.raises(ValueError, match=r"detail_rank 0 instead of 2"):
        train(*tiny, *PREDICTOR, start, f"out={tmp_path}", "network.detail_rank=2")
    with pytest.raises(ValueError, match=r"there is none; say network\.detail_rank=12"):
        train(*first, start, "network.detail_rank=0")


def test_unfit_stages_are_named(whole: Path, tiny: list[str], tmp_path: Path) -> None:
    first = [*tiny, f"out={tmp_path}", "stage=predictor"]
    with pytest.raises(ValueError, match=r"needs network\.predictor_width and network\.predictor_depth"):
        parse(first)
    with pytest.raises(ValueError, match=r"PSNR, not by these: say lora\.rank=0"):
        parse([*first, *PREDICTOR, "loss.lr_dropout=0.1"])
    with pytest.raises(ValueError, match=r"PSNR, not by these: .*loss\.own_input=0"):
        parse([*first, *PREDICTOR, "loss.own_input=0.1"])
    with pytest.raises(ValueError, match=r"fsdp doesn't shard: use strategy=auto"):
        train(*first, *PREDICTOR, "strategy=fsdp", "optimizer.kind=adamw")
    start = f"start_from={whole / 'weights.safetensors'}"
    with pytest.raises(ValueError, match="holds no predictor, and network=null adds none"):
        train(*first, "network=null", start, "loss.lr_dropout=0")
    for second in ([start], []):
        with pytest.raises(ValueError, match=r"predictor.*train it first, stage=predictor"):
            train(*tiny, *PREDICTOR, f"out={tmp_path}", *second)


def test_lora_trains_only_what_it_adapts(whole: Path, tiny: list[str], tmp_path: Path, assert_close: CloseTo) -> None:
    base = whole / "weights.safetensors"
    arguments = [*tiny, *PLAIN, f"out={tmp_path}", f"start_from={base}", "lora.rank=2", "lora.alpha=4"]
    arguments += ["optimizer.kind=adamw", "optimizer.learning_rate=0.02", "optimizer.warmup=1"]
    assert train(*arguments, "steps=4", "save_every=2") == tmp_path / "weights.safetensors"
    lora = open_lora(tmp_path / "lora.safetensors")
    assert (lora.rank, lora.alpha) == (2, 4)
    before, after = weights(base), weights(tmp_path / "weights.safetensors")
    assert after.keys() == before.keys()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {f"{module}.weight" for module in lora.modules}
    merged = load_infdit(base)
    apply_lora(merged, tmp_path / "lora.safetensors")
    for name, value in load_infdit(tmp_path / "weights.safetensors").state_dict().items():
        if not name.startswith("semantic_"):  # left out of the file, for they change nothing
            assert_close(value, merged.state_dict()[name].bfloat16().float(), 1e-6)
    with pytest.raises(ValueError, match=r"lora\.rank was 2, is 3"):
        train(*arguments, "lora.rank=3")


def test_unfit_settings_are_named_before_training(tiny: list[str], tmp_path: Path) -> None:
    for changed, said in (
        ("data.crop=40", r"data\.crop=40: it must be a multiple of 16"),
        ("data.crop=32", r"data\.crop=32: .*at least 44 pixels; .*data\.degraded=0"),
        ("data.crop=32 network.grids=2 loss.perceptual=1 lpips=[w] data.degraded=0", "at least 34 pixels, .* 10 more"),
        ("presets=[faithful,best]", r"presets=.*best.*the network has faithful, balanced, detailed"),
        ("data.held=4", "all are held for validation"),
        ("wandb=project", "pip install wandb"),
    ):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match=said):
            patch.setitem(sys.modules, "wandb", None)
            train(*tiny, f"out={tmp_path}", *changed.split())
    assert not (tmp_path / "log.csv").exists()


# --- pictures


def test_damaged_and_small_pictures_dont_stop_a_run(
    photographs: Path, tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, tests = tmp_path / "mixed", tmp_path / "tests"
    folder.mkdir(), tests.mkdir()
    content = (photographs / "0.png").read_bytes()
    for place in (folder / "0-cut-and-held.png", folder / "5-cut.png", tests / "cut.png"):
        place.write_bytes(content[: len(content) // 2])
    for number in (1, 2, 4, 5):
        shutil.copy(photographs / f"{number % 4}.png", folder / f"{number}.png")
    shutil.copy(photographs / "1.png", tests / "whole.png")
    Image.new("RGB", (35, 300)).save(tests / "small.png")
    Image.new("RGB", (300, 20)).save(folder / "small.png")
    (folder / "notes.txt").write_text("hello")
    out = tmp_path / "run"
    places = [f"data.train=[{folder}]", f"data.test=[{tests}]", "data.held=2"]
    assert train(*tiny, *PLAIN, *places, f"out={out}", "steps=6")
    said = capsys.readouterr().err
    assert "4 pictures to train on, 1 to validate on, 1 to test on" in said
    assert "4 skipped, all named in" in said
    skipped = (out / "skipped.txt").read_text()
    assert "small.png: it has 300 x 20 px" in skipped
    assert "small.png: it has 35 x 300 px" in skipped
    assert "0-cut-and-held.png: it is damaged" in skipped
    assert f"{tests / 'cut.png'}: it is damaged" in skipped
    assert said.count("skipped " + str(folder / "5-cut.png")) == 1
    assert "(1 so far)" in said
    assert [row["picture"] for row in rows(out / "test.csv")] == [str(tests / "whole.png"), "mean"]


def test_held_pictures_are_never_trained_on(tiny: list[str], photographs: Path, tmp_path: Path) -> None:
    fabric = Fabric(accelerator="cpu", devices=1)

    def split(*changed: str) -> tuple[set[str], set[str]]:
        config = parse([*tiny, f"out={tmp_path}", *changed])
        assert config.network is not None
        found = loop._pictures(config, config.network, tmp_path, fabric)
        names = [[Path(picture.name).name for picture in part] for part in (found.training, found.validation)]
        return set(names[0]), set(names[1])

    assert split() == ({"1.png", "2.png", "3.png"}, {"0.png"})
    assert split("data.held=2") == ({"1.png", "3.png"}, {"0.png", "2.png"})
    twice = f"data.train=[{photographs},{photographs}]"
    assert split("data.held=2", twice) == ({"1.png", "3.png"}, {"0.png", "2.png"})
    given = split(f"data.validation=[{photographs}/2.png]", f"data.train=['{photographs}/[013].png']")
    assert given == ({"0.png", "1.png", "3.png"}, {"2.png"})


def test_nothing_to_train_on_is_said_without_a_traceback(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("hello")
    assert cli.main(["train", *tiny, f"data.train=[{tmp_path / 'texts'}]", f"out={tmp_path / 'run'}"]) == 1
    assert capsys.readouterr().err.startswith(f"infdit: {tmp_path / 'texts'}: no picture of at least 80 x 80 px")


# --- a step


def prepared(tiny: list[str], *changed: str) -> tuple[Any, loop.State, TrainConfig, Iterator[Any], Fabric]:
    """What a step takes."""
    config = parse([*tiny, *PLAIN, "out=unused", *changed])
    fabric = Fabric(accelerator="cpu", devices=1)
    network = loop._network(config)
    model, state = loop._prepare(network, config, fabric)
    pictures = loop._Pictures(loop.find_pictures(config.data.train, 32)[0], [], [], 32)
    report = loop._Report(config, network.config, state, fabric, None)
    return model, state, config, loop._batches(pictures, config, network.config, 0, fabric, report), fabric


def test_averaged_weights_come_and_go(tiny: list[str]) -> None:
    _, state, *_ = prepared(tiny)
    own = {name: p.detach().clone() for name, p in state.network.named_parameters()}
    for value in state.average.values():
        value.fill_(7)
    with pytest.raises(InterruptedError), state.averaged():
        for name, parameter in state.network.named_parameters():
            assert torch.all(parameter == 7) or name.startswith("semantic_")
        _stop()
    assert all(torch.equal(p, own[name]) for name, p in state.network.named_parameters())


def test_the_average_follows_the_weights(tiny: list[str]) -> None:
    model, state, config, batches, fabric = prepared(tiny, "optimizer.ema=0.5")
    for decay in (2 / 11, 3 / 12, 4 / 13):  # (1 + step) / (10 + step), until that is above ema
        before = {name: value.clone() for name, value in state.average.items()}
        loop._step(model, state, config, batches, fabric)
        for name, parameter in state.network.named_parameters():
            if name in before:
                expected = decay * before[name] + (1 - decay) * parameter.detach()
                torch.testing.assert_close(state.average[name], expected, rtol=1e-5, atol=1e-7)
    state.step, before = 1000, {name: value.clone() for name, value in state.average.items()}
    loop._step(model, state, replace(config, steps=2000), batches, fabric)
    weight = "layers.1.qkv.weight"
    expected = (before[weight] + state.network.get_parameter(weight).detach()) / 2
    torch.testing.assert_close(state.average[weight], expected, rtol=1e-5, atol=1e-7)


def test_gradients_are_clipped_and_their_norm_is_told(tiny: list[str]) -> None:
    def norm(model: nn.Module) -> float:
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        return torch.cat(gradients).norm().item()

    model, state, config, batches, fabric = prepared(tiny, "optimizer.clip=1e9")
    told = loop._step(model, state, config, batches, fabric)
    assert norm(state.network) == pytest.approx(told, rel=1e-4)
    model, state, config, batches, fabric = prepared(tiny, "optimizer.clip=0.01")
    assert loop._step(model, state, config, batches, fabric) == pytest.approx(told, rel=1e-4)
    assert told > 0.02
    assert norm(state.network) == pytest.approx(0.01, rel=1e-3)


def test_a_gradient_that_isnt_finite_stops_the_run_before_it_harms(
    tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, state, config, batches, fabric = prepared(tiny)
    before = {name: p.detach().clone() for name, p in state.network.named_parameters()}

    def infinite(*arguments: Any, **others: Any) -> tuple[Tensor, Tensor]:
        losses, sigma = training_loss(*arguments, **others)
        return losses * torch.inf, sigma

    monkeypatch.setattr(loop, "training_loss", infinite)
    with pytest.raises(FloatingPointError, match=r"step 1 .*lower optimizer\.learning_rate"):
        loop._step(model, state, config, batches, fabric)
    assert all(torch.equal(p, before[name]) for name, p in state.network.named_parameters())


def test_learning_rate_rises_stays_and_falls(whole: Path) -> None:
    config = OptimizerConfig(learning_rate=2.0, warmup=4, decay=0.5)
    rates = [learning_rate(config, step, 12) for step in range(12)]
    assert rates == pytest.approx([0.5, 1.0, 1.5, 2, 2, 2, 2, 10 / 6, 8 / 6, 1, 4 / 6, 2 / 6])
    flat = [learning_rate(replace(config, warmup=0, decay=0.0), step, 12) for step in range(12)]
    assert flat == [2.0] * 12
    told = {row["step"]: float(row["learning_rate"]) for row in rows(whole / "log.csv")}
    assert told == pytest.approx({"4": 4e-3, "8": 5e-3, "12": 5e-3, "16": 5e-3 * 5 / 6, "20": 5e-3 / 6})


def test_muon_takes_the_layers_matrices_only(tiny: list[str]) -> None:
    network = loop._network(parse([*tiny, "out=unused"]))
    names = {id(p): name for name, p in network.named_parameters()}
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    muon, adamw = optimizers(trained, OptimizerConfig(kind="muon", betas=(0.5, 0.6), weight_decay=0.3))
    of_muon, of_adamw = ({names[id(p)] for p in o.param_groups[0]["params"]} for o in (muon, adamw))
    assert of_muon | of_adamw == trained.keys()
    assert not of_muon & of_adamw
    kinds = {"qkv", "attention_out", "mlp_in", "mlp_out", "query", "key_value", "out"}
    assert {name.split(".")[-2] for name in of_muon} == kinds
    assert adamw.param_groups[0]["betas"] == (0.5, 0.6)
    assert [o.param_groups[0]["weight_decay"] for o in (muon, adamw)] == [0.3, 0.3]
    (alone,) = optimizers(trained, OptimizerConfig(kind="adamw"))
    assert {names[id(p)] for p in alone.param_groups[0]["params"]} == trained.keys()


@pytest.mark.parametrize("flat", [False, True])
def test_centred_kernels_learn_about_the_mean_of_what_comes_in(flat: bool) -> None:
    random = torch.Generator().manual_seed(5)
    module = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1))
    if flat:
        flatten_kernels(module)
    centring = Centring(module)
    x, wanted = (torch.randn(2, n, 12, 12, generator=random) + n for n in (3, 4))
    mean = x.mean((0, 2, 3))
    kernel, bias = module[0].weight.detach().clone(), module[0].bias.detach().clone()
    free = kernel.clone().requires_grad_(True)  # of the same function, with what the kernel shifts taken from the bias
    shift = ((free - kernel) * mean[:, None, None]).sum((1, 2, 3))
    torch.nn.functional.conv2d(x, free, bias - shift, padding=1).sub(wanted).square().mean().backward()
    for part, half in zip(x, wanted, strict=True):  # two backward passes
        module(part[None]).sub(half).square().mean().div(2).backward()
    with centring.step(lambda means: means), torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.sub_(0.1 * parameter.grad)
    assert free.grad is not None
    torch.testing.assert_close(module[0].weight, kernel - 0.1 * free.grad)
    level = mean[None, :, None, None].expand(-1, -1, 5, 5)
    after = module(level)[..., 2, 2]
    torch.testing.assert_close(after, torch.nn.functional.conv2d(level, kernel, bias, padding=1)[..., 2, 2])
    assert (module[0].bias - bias).abs().max() > 0.01


def test_switches_reach_the_layers(tiny: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, *_, **__: compiled.append(self))
    network = loop._network(parse([*tiny, "out=unused"]))
    assert (compiled, network.checkpointing) == ([], False)
    network = loop._network(parse([*tiny, "out=unused", "compile=true", "checkpointing=true"]))
    assert compiled == list(network.layers)
    assert network.checkpointing is True


def test_recomputed_activations_change_no_number(tiny: list[str], tmp_path: Path) -> None:
    for switch in ("false", "true"):
        train(*tiny, *PLAIN, f"out={tmp_path / switch}", "steps=3", f"checkpointing={switch}", "compile=false")
    assert_same_state(tmp_path / "true", tmp_path / "false", 3)


def test_half_precision_trains_float32_weights(tiny: list[str], tmp_path: Path) -> None:
    for precision in ("float32", "bfloat16"):
        train(*tiny, *PLAIN, f"out={tmp_path / precision}", "steps=2", f"precision={precision}")
    a, b = (state(tmp_path / precision, 2) for precision in ("float32", "bfloat16"))
    assert {value.dtype for name, value in b.items() if name.startswith((".network", ".average"))} == {torch.float32}
    name = ".network.layers.1.qkv.weight"
    assert 0 < (a[name] - b[name]).abs().max() < 0.05


# --- learning


def test_it_learns(photographs: Path, tiny: list[str], tmp_path: Path) -> None:
    one = f"{photographs}/1.png"
    arguments = [*tiny, *PLAIN, f"data.train=[{one}]", f"data.validation=[{one}]", f"out={tmp_path}"]
    arguments += ["data.direct=1", "data.mirror=0", "data.turn=false", "loss.lr_dropout=0", "loss.regression=0"]
    arguments += ["optimizer.learning_rate=0.02", "batch=4", "steps=60"]
    train(*arguments, "log_every=20", "validate_every=20", "save_every=60")
    losses = [float(row["loss"]) for row in rows(tmp_path / "log.csv")]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.7 * losses[0]
    held = [float(row["loss"]) for row in rows(tmp_path / "validation.csv")]
    assert held == sorted(held, reverse=True)
    assert held[-1] < 0.9 * held[0]


# --- what is shown


def test_the_log_shows_losses_by_level_rate_and_throughput(whole: Path) -> None:
    columns = list(rows(whole / "log.csv")[0])
    levels = ["loss_below_0.04", "loss_0.04_0.091", "loss_0.091_0.2", "loss_above_0.2", "loss_mean"]
    assert columns[:7] == ["step", "loss", *levels]
    assert columns[7:10] == ["learning_rate", "gradient_norm", "crops_per_second"]
    for row in rows(whole / "log.csv"):
        assert float(row["crops_per_second"]) > 0
        assert 0 <= float(row["data_share"]) <= 1
        assert 0 <= float(row["saving_share"]) < 1
    assert list((whole / "tensorboard").glob("events*"))


def test_progress_says_what_is_left(whole: Path, tiny: list[str], tmp_path: Path, capsys: Any) -> None:
    train(*tiny, *PLAIN, f"out={tmp_path}", "steps=2", "log_every=1")
    said = capsys.readouterr().err
    assert "step 1/2, loss " in said
    assert "0 h 00 min left" in said


def test_validation_measures_every_kind_at_three_levels(whole: Path) -> None:
    found = rows(whole / "validation.csv")
    assert [row["step"] for row in found] == ["8", "16", "20"]
    levels = [f"{np.exp(-2.4 + 1.2 * z):.3g}" for z in (-1, 0, 1)]
    kinds = ("clean", "degraded", "mild")
    losses = {kind: [f"{kind}_loss_{level}" for level in [*levels, "mean"]] for kind in kinds}
    expected = ["step", "loss"]
    for kind in kinds:
        expected += [*losses[kind], f"{kind}_bicubic_psnr_y", f"{kind}_faithful_psnr_y"]
    assert list(found[0]) == expected
    for row in found:
        values = [float(row[name]) for names in losses.values() for name in names]
        assert float(row["loss"]) == pytest.approx(sum(values) / 12, rel=1e-4)
    first = {kind: float(found[0][f"{kind}_bicubic_psnr_y"]) for kind in kinds}
    assert first["clean"] > first["mild"] != first["degraded"]
    assert len({row["degraded_bicubic_psnr_y"] for row in found}) == 1


def test_validation_asks_what_training_asks(tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "load_lpips", lambda path, device: lambda a, b: torch.full((len(a),), 0.125))
    asked: list[tuple[Batch, Tensor, Tensor, Tensor, float]] = []
    real = validation.loss_at

    def seen(denoise: Any, network: Any, config: Any, batch: Any, *rest: Any, detail: float) -> Tensor:
        unjudged = real(denoise, network, replace(config, perceptual=0.0), batch, *rest, detail=detail)
        asked.append((batch, *rest[:3], float(unjudged)))
        return real(denoise, network, config, batch, *rest, detail=detail)

    monkeypatch.setattr(validation, "loss_at", seen)
    arguments = [*tiny, *PLAIN, "steps=1", "data.crop=64", "lpips=[alex.safetensors]", "loss.perceptual_below=0.2"]
    train(*arguments, "loss.perceptual=4", "loss.own_input=0.5", "loss.screen=0", "loss.overshoot=3", f"out={tmp_path}")
    (row,) = rows(tmp_path / "validation.csv")
    found = {key: float(value) for key, value in row.items() if "_loss_" in key}
    low, middle, high = (np.exp(-2.4 + 1.2 * z) for z in (-1, 0, 1))
    assert low < middle < 0.2 < high
    expected = [(f"clean_loss_{x:.3g}", x, False) for x in (low, middle, high)]
    expected += [(f"clean_own_loss_{x:.3g}", x, True) for x in (low, middle)] + [("clean_loss_mean", 2.0, False)]
    assert list(found) == [name for name, *_ in expected]
    for (name, level, own), (batch, sigma, noisy, was_own, unjudged) in zip(expected, asked, strict=True):
        assert float(sigma) == pytest.approx(level) and bool(was_own) == own
        noise = noisy - (batch.upsampled if own or name.endswith("mean") else batch.original)
        assert float(noise.std()) == pytest.approx(0 if name.endswith("mean") else level, rel=0.05)
        assert found[name] == pytest.approx(unjudged + 4 * 0.125 * level / 0.2 * (level < 0.2), rel=1e-4)


def test_samples_are_rows_of_lr_bicubic_presets_and_original(whole: Path) -> None:
    assert sorted(path.name for path in (whole / "samples").iterdir()) == [f"step-{s:08d}.png" for s in (8, 16, 20)]
    side = 48 + 2 * 16
    with Image.open(whole / "samples" / "step-00000008.png") as image:
        assert image.size == (3 * 4 * side, side)
        pixels = np.asarray(image).astype(int)
    parts = [pixels[:, i * side : (i + 1) * side] for i in range(12)]
    assert np.array_equal(parts[3], parts[7])  # the original
    assert np.array_equal(parts[0][0::4, 0::4], parts[0][3::4, 3::4])  # the low resolution, by nearest neighbour
    assert np.abs(parts[1] - parts[3]).mean() < np.abs(parts[0] - parts[3]).mean()


def test_so_many_pictures_as_asked_for(tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "load_lpips", lambda path, device: lambda a, b: torch.full((len(a),), 0.125))
    arguments = [*tiny, *PLAIN, "data.held=3", "steps=1", "presets=[faithful,balanced]", "lpips=[alex.safetensors]"]
    arguments += ["network.presets.balanced.steps=2", "network.presets.balanced.start=0.1"]
    train(*arguments, f"out={tmp_path / 'two'}", "pictures=2")
    with Image.open(tmp_path / "two" / "samples" / "step-00000001.png") as image:
        assert image.size == (5 * 32, 2 * 32)
    (row,) = rows(tmp_path / "two" / "validation.csv")
    assert {row[f"clean_{name}_lpips"] for name in ("bicubic", "faithful", "balanced")} == {"0.125"}
    train(*arguments, f"out={tmp_path / 'none'}", "pictures=0")
    assert not (tmp_path / "none" / "samples").exists()


def test_the_end_is_a_test_on_whole_pictures(photographs: Path, tiny: list[str], tmp_path: Path) -> None:
    test = f"data.test=[{photographs}/0.png,{photographs}/1.png]"
    train(*tiny, *PLAIN, test, f"out={tmp_path}", "steps=1", "optimizer.learning_rate=1e-9")
    found = rows(tmp_path / "test.csv")
    assert [Path(row["picture"]).name for row in found] == ["0.png", "1.png", "mean"]
    figures = ["bicubic_psnr_y", "bicubic_ssim_y", "faithful_psnr_y", "faithful_ssim_y"]
    assert list(found[0]) == ["picture", *figures]
    for name in figures:
        first, second, mean = (float(row[name]) for row in found)
        assert first != second
        assert mean == pytest.approx((first + second) / 2, rel=1e-4)
    # An untrained residual network answers with the upsampled picture.
    assert float(found[2]["faithful_psnr_y"]) == pytest.approx(float(found[2]["bicubic_psnr_y"]), abs=0.2)


# --- ways in


def test_infdit_train_is_the_same_entry(tiny: list[str], tmp_path: Path) -> None:
    arguments = [*tiny, *PLAIN, "steps=2"]
    assert cli.main(["train", *arguments, f"out={tmp_path / 'cli'}"]) == 0
    assert entry.main([*arguments, f"out={tmp_path / 'module'}"]) == 0
    assert_same_state(tmp_path / "cli", tmp_path / "module", 2)


def test_infdit_train_tells_of_sigterm(tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    after_step(monkeypatch, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert cli.main(["train", *tiny, *PLAIN, f"out={tmp_path}", "steps=3"]) == 143


@pytest.mark.parametrize("package", ["lightning_fabric", "omegaconf", "tensorboard", "filelock"])
def test_missing_training_packages_are_named(
    package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in list(sys.modules):
        if name.startswith(("infdit_core.training", "torch.utils.tensorboard")):
            monkeypatch.delitem(sys.modules, name)
        elif name.partition(".")[0] == package:
            monkeypatch.setitem(sys.modules, name, None)
    assert cli.main(["train", "nano"]) == 1
    assert f"training needs {package}: pip install 'inf-dit[train]'" in capsys.readouterr().err


def test_debug_stops_in_the_debugger_on_the_first_process(monkeypatch: pytest.MonkeyPatch) -> None:
    stops: list[type[BaseException] | None] = []
    monkeypatch.setattr(pdb, "post_mortem", lambda: stops.append(sys.exc_info()[0]))
    monkeypatch.setattr(loop, "train", lambda config: 1 // 0)
    arguments = ["nano", "data.train=[a]", "out=b"]
    for rank, debug, expected in (("0", True, 1), ("1", True, 1), ("0", False, 1)):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(ZeroDivisionError):
            entry.main([*arguments, *(["--debug"] if debug else [])])
        assert len(stops) == expected
    assert stops == [ZeroDivisionError]
