"""Checkpoints of a run: whole or not there, the last few and the best kept.

checkpoints/step-00001000/state/     everything the run needs to go on (torch.distributed.checkpoint)
checkpoints/step-00001000/weights.safetensors, and lora.safetensors where only that was trained
checkpoints/step-00001000/score.json where it was validated: its loss
"""

import contextlib
import json
import math
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lightning_fabric import Fabric
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as load_state
from torch.distributed.checkpoint.state_dict_saver import save as save_state

_STATE, _SCORE = "state", "score.json"
WEIGHTS = "weights.safetensors"
LORA = "lora.safetensors"


def save(
    folder: Path,
    step: int,
    state: dict[str, Any],
    score: float | None,
    write_weights: Callable[[Path], None],
    fabric: Fabric,
) -> Path:
    """Write a checkpoint under a temporary name and rename it; every process calls it.

    score: validation loss. write_weights(folder) is called on every process.
    Raises OSError where the disk is full, say.
    """
    target, part = folder / f"step-{step:08d}", folder / f".step-{step:08d}.part"
    try:
        if fabric.is_global_zero:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        fabric.barrier()
        with _alone():
            save_state(state, checkpoint_id=part / _STATE, no_dist=fabric.world_size == 1)
        write_weights(part)
        fabric.barrier()
        if fabric.is_global_zero:
            if score is not None:
                (part / _SCORE).write_text(json.dumps({"loss": score}))
            shutil.rmtree(target, ignore_errors=True)
            part.rename(target)
    except (CheckpointException, OSError, RuntimeError) as error:
        shutil.rmtree(part, ignore_errors=True)
        raise OSError(f"checkpoint {target} can't be written: {_cause(error)}. Earlier ones are whole") from error
    fabric.barrier()
    return target


def newest(folder: Path) -> Path | None:
    return max(folder.glob("step-*"), default=None)


def restore(checkpoint: Path, state: dict[str, Any], fabric: Fabric) -> None:
    """Load into the tensors of `state`, in place. Raises OSError for a damaged or unfit checkpoint."""
    try:
        with _alone():
            load_state(state, checkpoint_id=checkpoint / _STATE, no_dist=fabric.world_size == 1)
    except (CheckpointException, OSError, RuntimeError, ValueError) as error:
        raise OSError(
            f"{checkpoint} can't be gone on from: {_cause(error)}. Delete it to go on from the one before"
        ) from error


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Without the warning that one process is one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _cause(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return (str(error).splitlines() or [type(error).__name__])[0]


def best(folder: Path) -> Path | None:
    """The checkpoint with the lowest validation loss; one that isn't a number counts as the highest."""
    scores = {path.parent: json.loads(path.read_text())["loss"] for path in folder.glob(f"step-*/{_SCORE}")}
    return min(scores, key=lambda path: (math.isnan(scores[path]), scores[path], path), default=None)


def forget_scores(folder: Path) -> None:
    """Where the loss is another from here on: else those by the smaller one would stay the best."""
    for path in folder.glob(f"step-*/{_SCORE}"):
        path.unlink()


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` and the best, and what a killed run left half-written."""
    kept = {*sorted(folder.glob("step-*"))[-keep:], best(folder)}
    for path in [*folder.glob("step-*"), *folder.glob(".step-*.part")]:
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)
