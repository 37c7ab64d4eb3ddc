"""The training loop, on Lightning Fabric."""

import contextlib
import math
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from filelock import FileLock, Timeout
from lightning_fabric import Fabric
from lightning_fabric.strategies.model_parallel import ModelParallelStrategy
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ..bench import matmul_rate
from ..degradation import smallest_side
from ..evaluation import grids
from ..infdit.checkpoint import load_infdit, save_infdit
from ..infdit.config import DETAILER_PRESETS, InfDiTConfig
from ..infdit.lora import adapt_detailer, add_lora, merged_state, save_lora
from ..infdit.model import InfDiT
from ..infdit.predictor import Predictor
from ..metrics import Lpips, load_lpips
from ..semantics import Clip, load_clip
from ..weights import write_atomically
from . import checkpoints
from .config import TrainConfig, differences, parse, save
from .data import Batch, Crops, PictureFile, Skipped, decodable, find_pictures, loader, reduce
from .logs import Log
from .losses import (
    LossMeter,
    condition_loss,
    detail_loss,
    detail_shares,
    prediction_loss,
    training_loss,
    with_prediction,
)
from .optimizers import Centring, flatten_kernels, learning_rate, optimizers
from .validation import Held, contact_sheet, held_crops, test, validate

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class TrainingError(ValueError):
    """A run that can't start or go on; the message says why and what to do."""


@dataclass
class State:
    """What changes while training, and what a checkpoint holds."""

    network: InfDiT
    optimizers: list[Optimizer]
    average: dict[str, Tensor]  # of the trained parameters over the steps
    losses: LossMeter  # since the last row of the log
    centring: Centring | None  # of the predictor's blocks, where these learn
    step: int = 0
    seconds: float = 0.0  # that the run took, over all its processes
    saving: float = 0.0  # of these

    def tensors(self) -> dict[str, Any]:
        """Loading writes into these tensors."""
        return {
            "network": self.network.state_dict(),
            "average": self.average,
            "optimizers": get_optimizer_state_dict(self.network, self.optimizers),
            "losses": self.losses.sums,
            "progress": {"step": self.step, "seconds": self.seconds, "saving": self.saving},
        }

    def restore(self, checkpoint: Path, fabric: Fabric) -> None:
        saved = self.tensors()
        checkpoints.restore(checkpoint, saved, fabric)
        set_optimizer_state_dict(self.network, self.optimizers, optim_state_dict=saved["optimizers"])
        for name, value in saved["progress"].items():
            setattr(self, name, value)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the network has its averaged weights."""
        trained = {name: p for name, p in self.network.named_parameters() if name in self.average}
        own = {name: p.detach().clone() for name, p in trained.items()}

        def put(values: dict[str, Tensor]) -> None:
            with torch.no_grad():
                for name, p in trained.items():
                    p.copy_(values[name])

        put(self.average)
        try:
            yield
        finally:
            put(own)


def train(config: TrainConfig) -> Path | None:
    """Train, or go on where the run in config.out stopped; under torchrun every process calls this.

    Returns the path of the weights that validated best (averaged over steps, bf16), None where SIGTERM ended the run
    before its last step. Raises ValueError for settings, data or checkpoints that don't fit, OSError where files
    can't be read or written, FloatingPointError where the gradient isn't finite.
    """
    fabric = _fabric(config)
    fabric.launch()
    out = Path(config.out)
    with _alone_in(out, fabric), _signals() as asked:
        network = _network(config)
        config = replace(config, network=network.config)
        _settle(config, out, fabric)
        pictures = _pictures(config, network.config, out, fabric)
        model, state = _prepare(network, config, fabric)
        if newest := checkpoints.newest(out / "checkpoints"):
            state.restore(newest, fabric)
            _say(fabric, f"going on from step {state.step}")
        lpips = [load_lpips(file, fabric.device) for file in config.lpips]
        clip = _clip(config, network.config, fabric.device)
        held = held_crops(pictures.validation, pictures.side, network.config.scale, config.data, fabric.device, clip)
        log = Log(out, state.step, config.wandb, asdict(config)) if fabric.is_global_zero else None
        with contextlib.ExitStack() as stack:
            if log is not None:
                stack.callback(log.close)
            report = _Report(config, network.config, state, fabric, log)
            batches = _batches(pictures, config, network.config, state.step, fabric, report)
            while state.step < config.steps:
                norm = _step(model, state, config, batches, fabric, clip, lpips)
                report.stepped(norm)
                last = state.step == config.steps
                stop, wanted = asked.agreed(fabric)
                score = None
                if state.step % config.validate_every == 0 or last:
                    with state.averaged(), report.apart(), fabric.autocast(), _eager():
                        score = _validate(state, held, config, lpips, fabric, log)
                if state.step % config.save_every == 0 or last or stop or wanted or score is not None:
                    with report.saving():
                        _save(state, config, out, score, fabric)
                if stop and not last:
                    _say(fabric, f"stopped and saved at step {state.step}; the same command goes on")
                    return None
        weights = out / checkpoints.WEIGHTS
        if pictures.test and log is not None:
            _test(weights, pictures.test, config, lpips, clip, fabric, log)
        fabric.barrier()
        _say(fabric, f"weights: {weights}")
        return weights


# --- setting up


def _fabric(config: TrainConfig) -> Fabric:
    world, local = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    strategy: Any = "auto" if world == 1 else "ddp"
    if config.strategy == "fsdp" and world > 1:
        strategy = ModelParallelStrategy(_shard, data_parallel_size=world, tensor_parallel_size=1)
    return Fabric(
        accelerator="cuda" if torch.cuda.is_available() else "cpu",
        devices=local,
        num_nodes=world // local,
        strategy=strategy,
        precision="bf16-mixed" if config.precision == "bfloat16" else "32-true",
    )


def _shard(network: InfDiT, mesh: DeviceMesh) -> InfDiT:
    """FSDP2: a layer is one unit, without its modulation, which is called before, once for all blocks.

    The first layer, whose cross-attention is called from outside it too, stays with what stands around the layers.
    """
    devices = mesh["data_parallel"]
    for layer in list(network.layers)[1:]:
        fully_shard(layer.modulation, mesh=devices)
        fully_shard(layer, mesh=devices)
    fully_shard(network, mesh=devices)
    register_fsdp_forward_method(network, "denoise")  # as validation calls it
    return network


@contextlib.contextmanager
def _alone_in(out: Path, fabric: Fabric) -> Iterator[None]:
    """Hold the run's folder: the lock goes when the process does, however it ends."""
    if not fabric.is_global_zero:
        yield
        return
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / "run.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise TrainingError(f"another run is at work in {out}; wait for it, or say another out=FOLDER") from None
    try:
        yield
    finally:
        lock.release()


class _Asked:
    """What signals asked for: SIGUSR1 to save, SIGTERM to save and stop."""

    def __init__(self) -> None:
        self.stop = self.save = False

    def agreed(self, fabric: Fabric) -> tuple[bool, bool]:
        """(stop, save) as any process was asked, the same on all; asking to save is answered once."""
        told = self.save  # a signal that comes while the others are waited for is for the next time
        flags = torch.tensor([float(self.stop), float(told)], device=fabric.device)
        stop, save = _summed(flags, fabric).tolist()
        self.save = self.save and not told
        return stop > 0, save > 0


@contextlib.contextmanager
def _signals() -> Iterator[_Asked]:
    asked = _Asked()
    handlers = {"SIGTERM": lambda *_: setattr(asked, "stop", True), "SIGUSR1": lambda *_: setattr(asked, "save", True)}
    before: dict[int, Any] = {}
    for name, handler in handlers.items():
        if number := getattr(signal, name, None):  # Windows has no SIGUSR1
            before[number] = signal.signal(number, handler)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


_JUDGED = 34  # pixels of a side, for what LPIPS looks at
_UNTRAINED = "train it first, stage=predictor, or say network.predictor_width=0 network.predictor_depth=0"


def _network(config: TrainConfig) -> InfDiT:
    generator = torch.Generator().manual_seed(config.seed)
    if config.start_from:
        network = load_infdit(None if config.start_from == "default" else config.start_from)
        found, wanted = network.config, config.network or network.config
        if config.stage == "predictor":
            network.detailer, found = None, _without_detailer(found)
            wanted = _without_detailer(wanted)
        elif not wanted.detail_rank:
            wanted = replace(wanted, detail_rank=found.detail_rank)
        if wanted.detail_rank and not _has_detail(wanted):
            wanted = replace(wanted, presets=found.presets if _has_detail(found) else DETAILER_PRESETS)
        changes: dict[str, Any] = {"presets": wanted.presets, "grids": wanted.grids}
        if config.stage == "detailer" and not found.detail_rank:
            changes |= {"detail_rank": wanted.detail_rank}
        grows = config.stage == "predictor" and 0 < found.predictor_depth <= wanted.predictor_depth
        grows = grows and found.predictor_condition in (0, wanted.predictor_condition)
        if network.predictor is None:
            changes |= {"predictor_width": wanted.predictor_width}
        if network.predictor is None or grows:
            changes |= {size: getattr(wanted, size) for size in ("predictor_depth", "predictor_condition")}
        if wrong := differences(wanted, replace(found, **changes)):
            said = ", ".join(f"{key} {b} instead of {a}" for key, (a, b) in wrong.items())
            raise TrainingError(f"{config.start_from} holds another network: {said}. Say network=null to take that one")
        if network.predictor is None and wanted.predictor_depth:
            if config.stage != "predictor":
                raise TrainingError(f"{config.start_from} holds no predictor: {_UNTRAINED}")
            network.predictor = _fresh(wanted, generator).predictor
        elif network.predictor is not None and (found.predictor_depth, found.predictor_condition) != (
            wanted.predictor_depth,
            wanted.predictor_condition,
        ):
            network.predictor = _grown(network.predictor, _fresh(wanted, generator).predictor)
        if wanted.detail_rank and network.detailer is None:
            network.detailer = deepcopy(network.predictor)
        network.config = wanted
        network.train().requires_grad_(True)
    else:
        assert config.network is not None
        if config.network.detail_rank:
            raise TrainingError(
                "a detailer adds to a predictor that knows something: say start_from=FILE, or network.detail_rank=0 to "
                "train that first"
            )
        if config.network.predictor_depth and config.stage != "predictor":
            raise TrainingError(f"fresh weights have a predictor that knows nothing: {_UNTRAINED}")
        network = _fresh(config.network, generator)
    if config.strategy == "fsdp" and network.predictor is not None:
        raise TrainingError("a predictor runs apart from the layers, which fsdp doesn't shard: use strategy=auto")
    if config.data.crop % network.config.block_size:
        raise TrainingError(
            f"data.crop={config.data.crop}: it must be a multiple of {network.config.block_size}, the block"
        )
    unseen = grids(network.config)[-1] if config.stage == "network" else 0
    if config.loss.perceptual and config.data.crop < _JUDGED + unseen:
        raise TrainingError(
            f"data.crop={config.data.crop}: loss.perceptual needs at least {_JUDGED} pixels, for what LPIPS looks at"
            + (f", and {unseen} more, which the second grid of blocks doesn't reach" if unseen else "")
        )
    if unknown := [preset for preset in config.presets if preset not in network.config.presets]:
        raise TrainingError(f"presets={unknown}: the network has {', '.join(network.config.presets)}")
    if config.lora.rank and config.clip and not network.uses_semantics:
        raise TrainingError(
            f"clip={config.clip}: a LoRA leaves the way for semantics as it is, and {config.start_from} was trained "
            "without; say lora.rank=0, or clip=''"
        )
    if config.lora.rank:
        add_lora(network, config.lora.rank, config.lora.alpha, generator)
    elif not config.clip:  # then these get no gradient
        for module in (network.semantic_in, network.semantic_out):
            module.requires_grad_(False)
    if config.stage == "predictor":
        if network.predictor is None:
            raise TrainingError(f"stage=predictor: {config.start_from} holds no predictor, and network=null adds none")
        network.requires_grad_(False)
        network.predictor.requires_grad_(True)
        if config.optimizer.kind == "muon":
            flatten_kernels(network.predictor.blocks)
    elif config.stage == "detailer":
        if network.detailer is None:
            raise TrainingError(
                "stage=detailer: there is none; say network.detail_rank=12, and the network's other settings, such as "
                "nano, instead of network=null"
            )
        adapt_detailer(network, generator)
    else:
        for first in (network.predictor, network.detailer):
            if first is not None:
                first.requires_grad_(False)
    network.checkpointing = config.checkpointing
    if config.compile:
        for layer in network.layers:
            layer.compile()
    return network


def _fresh(config: InfDiTConfig, generator: torch.Generator) -> InfDiT:
    with torch.random.fork_rng(devices=[]):  # torch's layers draw weights of their own
        network = InfDiT(config)
    network.initialise(generator)
    return network


def _has_detail(config: InfDiTConfig) -> bool:
    return any(preset.detail for preset in config.presets.values())


def _without_detailer(config: InfDiTConfig) -> InfDiTConfig:
    presets = {name: replace(preset, detail=0.0) for name, preset in config.presets.items()}
    return replace(config, detail_rank=0, presets=presets)


def _grown(predictor: Predictor | None, fresh: Predictor | None) -> Predictor:
    """`fresh` with the weights of a shallower or unconditioned one, whose answers it gives: what it has more of adds
    and changes nothing yet."""
    assert predictor is not None and fresh is not None
    silent = {name: torch.zeros_like(x) if ".conv_out." in name else x for name, x in fresh.state_dict().items()}
    fresh.load_state_dict(silent | predictor.state_dict())
    return fresh


def _clip(config: TrainConfig, network: InfDiTConfig, device: torch.device) -> Clip | None:
    if not config.clip:
        return None
    clip = load_clip(config.clip, device)
    if clip.size != network.semantic_size:
        raise TrainingError(
            f"clip={config.clip} gives vectors of {clip.size} numbers, and the network takes {network.semantic_size}: "
            f"say network.semantic_size={clip.size}, or use another"
        )
    return clip


def _settle(config: TrainConfig, out: Path, fabric: Fabric) -> None:
    """Keep the settings with the run; what a run can't change on its way is an error."""
    path = out / "config.yaml"
    if fabric.is_global_zero:
        if path.exists() and checkpoints.newest(out / "checkpoints"):
            changed = differences(parse([str(path)]), config)
            fixed = [key for key in changed if key.startswith(("network.", "stage", "lora.", "optimizer.kind"))]
            fixed = [key for key in fixed if key not in ("network.presets", "network.grids")]
            if "clip" in changed and not all(changed["clip"]):  # what is trained depends on it
                fixed.append("clip")
            if fixed:
                said = ", ".join(f"{key} was {changed[key][0]}, is {changed[key][1]}" for key in fixed)
                raise TrainingError(f"the run in {out} trains something else: {said}. Say another out=FOLDER")
            for key, (before, now) in changed.items():
                _say(fabric, f"{key} was {before}, is {now} from here on")
            of_score: tuple[str, ...] = ("loss.", "lpips", "clip", "network.grids")
            of_score += tuple(f"data.{key}" for key in ("validation", "train", "held", "crop", "degraded", "mild"))
            of_score += ("data.softness", "data.surrounded")
            if any(key.startswith(of_score) for key in changed):
                checkpoints.forget_scores(out / "checkpoints")
        save(config, path)
    fabric.barrier()


@dataclass(frozen=True)
class _Pictures:
    training: list[PictureFile]
    validation: list[PictureFile]
    test: list[PictureFile]
    side: int  # of the crops drawn, in pixels: with the surroundings that the low resolution may show


def _pictures(config: TrainConfig, network: InfDiTConfig, out: Path, fabric: Fabric) -> _Pictures:
    data = config.data
    side = data.crop + (2 * network.block_size if data.surrounded else 0)
    least = smallest_side(network.scale)
    if data.degraded and (side if data.surrounded == 1 else data.crop) < least:
        raise TrainingError(
            f"data.crop={data.crop}: degraded low resolutions need crops of at least {least} pixels; give that, "
            "or data.degraded=0"
        )
    training, skipped = find_pictures(data.train, side)
    if data.validation:
        found, more = find_pictures(data.validation, side)
        skipped += more
    else:
        found = list(dict.fromkeys(training))  # some may be listed more than once, to count more
    held = found[:: max(1, len(found) // data.held)][: data.held]
    validation, more = decodable(held)
    skipped += more
    if not data.validation:
        away = set(held)
        training = [picture for picture in training if picture not in away]
        if not training:
            raise TrainingError(
                f"{len(found)} pictures in {', '.join(data.train)}, and all are held for validation: "
                "give more, or say data.held=1, or data.validation=[FOLDER]"
            )
    least = math.ceil(_JUDGED / network.scale) * network.scale  # what is over is cut off
    tested, more = find_pictures(data.test, least) if data.test else ([], [])
    skipped += more
    tested, more = decodable(tested)
    skipped += more
    _say(fabric, f"{len(training)} pictures to train on, {len(validation)} to validate on, {len(tested)} to test on")
    if skipped:
        some = "; ".join(f"{name}: {reason}" for name, reason in skipped[:3])
        _say(fabric, f"{len(skipped)} skipped, all named in {out / 'skipped.txt'}: {some}")
    if fabric.is_global_zero:
        (out / "skipped.txt").write_text("".join(f"{name}: {reason}\n" for name, reason in skipped))
    return _Pictures(training, validation, tested, side)


def _prepare(network: InfDiT, config: TrainConfig, fabric: Fabric) -> tuple[Any, State]:
    """The network as Fabric wraps it, and the state around it."""
    model = fabric.setup_module(network)
    if config.stage != "network":
        model.mark_forward_method("predict")
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    average = {name: p.detach().clone() for name, p in trained.items()}
    meter = LossMeter(config.loss, network.config.sigma_max, fabric.device)
    centring = None
    if config.stage == "predictor":
        assert network.predictor is not None  # `_network` sees to it
        centring = Centring(network.predictor.blocks)
    return model, State(network, optimizers(trained, config.optimizer), average, meter, centring)


# --- a step


def _batches(
    pictures: _Pictures,
    config: TrainConfig,
    network: InfDiTConfig,
    step: int,
    fabric: Fabric,
    report: "_Report",
) -> Iterator[tuple[Batch, torch.Generator]]:
    """This process's batches from a step on, each with the generator of its noise.

    Batch number m, counted over all processes, has random numbers of its own: however many processes share the work,
    and wherever a run was taken up again, it is the same.
    """
    world = fabric.world_size
    numbers = range(
        step * config.accumulate * world + fabric.global_rank, config.steps * config.accumulate * world, world
    )
    crops = Crops(pictures.training, pictures.side, config.data, config.seed)
    margin = (pictures.side - config.data.crop) // 2
    loading = loader(crops, config.batch, numbers)
    for number in numbers:
        with report.waiting():
            loaded = next(loading)
        report.broken(loaded.broken)
        random = np.random.default_rng([config.seed, number, 1])
        generator = torch.Generator(fabric.device).manual_seed(int(random.integers(2**63)))
        here = fabric.to_device(loaded.crops)
        around = margin if random.random() < config.data.surrounded else 0
        if not around:
            here = here[:, :, margin : pictures.side - margin, margin : pictures.side - margin]
        data = config.data
        die = torch.rand(len(here), generator=generator, device=here.device)
        degraded, mild = die < data.degraded, die < data.degraded * data.mild
        yield reduce(here, network.scale, around, degraded, mild, data.softness, generator), generator


def _step(
    model: Any,
    state: State,
    config: TrainConfig,
    batches: Iterator[tuple[Batch, torch.Generator]],
    fabric: Fabric,
    clip: Clip | None = None,
    lpips: Sequence[Lpips] = (),
) -> float:
    """One step of the optimisers; returns the gradient's norm."""
    for optimizer in state.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.optimizer, state.step, config.steps)
        optimizer.zero_grad()
    for number in range(config.accumulate):
        batch, generator = next(batches)
        with fabric.no_backward_sync(model, enabled=number + 1 < config.accumulate):
            given = state.network.config
            if config.stage != "network":
                detailed = config.stage == "detailer"
                with fabric.autocast():  # only `forward` has its own
                    if detailed:
                        row, column = torch.randint(0, 4, (2,), generator=generator, device=fabric.device).tolist()
                        losses = detail_loss(model.predict, given.scale, config.loss, batch, lpips, (row, column))
                    else:
                        losses = prediction_loss(model.predict, given.scale, batch)
                    losses = losses + condition_loss(state.network, batch, detailed)
                sigma = torch.full_like(losses, given.sigma_max)  # the log calls it loss_mean
            else:
                shares = detail_shares(given, config.loss)
                several = len(shares) > 1
                drawn = torch.randint(len(shares), (), generator=generator, device=fabric.device) if several else 0
                share = shares[int(drawn)]
                with fabric.autocast():
                    batch = with_prediction(batch, state.network, share)
                losses, sigma = training_loss(model, given, config.loss, batch, generator, clip, lpips, share)
            fabric.backward(losses.mean() / config.accumulate)
        state.losses.add(losses, sigma)
    # Of all parameters: Fabric's own clips those of one optimiser.
    norm = torch.nn.utils.clip_grad_norm_(state.network.parameters(), config.optimizer.clip)
    value = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    if not math.isfinite(value):
        raise FloatingPointError(
            f"the gradient of step {state.step + 1} isn't finite; go on from the last checkpoint with a lower "
            "optimizer.learning_rate"
        )
    centred = state.centring.step(lambda x: _summed(x, fabric) / fabric.world_size) if state.centring else None
    with centred or contextlib.nullcontext():
        for optimizer in state.optimizers:
            optimizer.step()
    state.step += 1
    decay = min(config.optimizer.ema, (1 + state.step) / (10 + state.step))  # the first steps count for less
    with torch.no_grad():
        values = dict(state.network.named_parameters())
        torch._foreach_lerp_(list(state.average.values()), [values[name] for name in state.average], 1 - decay)
    return value


# --- what is kept and shown


def _save(state: State, config: TrainConfig, out: Path, score: float | None, fabric: Fabric) -> None:
    """Write a checkpoint (score: its validation loss), delete old ones, copy the best one's weights to the run's."""

    def write_weights(folder: Path) -> None:
        with state.averaged():
            tensors = merged_state(state.network)
            whole = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tensors.items()}
            if not fabric.is_global_zero:
                return
            network = InfDiT(state.network.config, device="meta")
            network.load_state_dict(whole, assign=True)
            trained = {"steps": str(state.step), "hours": f"{state.seconds / 3600:.2f}"}
            trained["crops"] = f"{state.step * config.batch * config.accumulate * fabric.world_size}"
            trained["crops"] += f" of {config.data.crop} px"
            save_infdit(folder / checkpoints.WEIGHTS, network, metadata=trained)
            if config.lora.rank:
                save_lora(folder / checkpoints.LORA, state.network, metadata=trained)

    folder = out / "checkpoints"
    state.losses.sums.copy_(_summed(state.losses.sums, fabric) / fabric.world_size)  # a checkpoint has one for all
    checkpoint = checkpoints.save(folder, state.step, state.tensors(), score, write_weights, fabric)
    if fabric.is_global_zero:
        checkpoints.prune(folder, config.keep)
        best = checkpoints.best(folder) or checkpoint
        for name in (checkpoints.WEIGHTS, checkpoints.LORA):
            if (best / name).exists():
                _copy(best / name, out / name)


def _eager() -> contextlib.AbstractContextManager[None]:
    """Streaming has too many shapes to compile."""
    return cast(Any, torch.compiler.set_stance("force_eager"))


def _copy(source: Path, target: Path) -> None:
    content = source.read_bytes()
    write_atomically(target, lambda file: file.write(content))


def _validate(
    state: State,
    held: Sequence[Held],
    config: TrainConfig,
    lpips: Sequence[Lpips],
    fabric: Fabric,
    log: Log | None,
) -> float:
    """Every process takes its share of the crops; returns the mean loss, the same on all."""
    share = math.ceil(len(held) / fabric.world_size)
    numbers = range(fabric.global_rank * share, (fabric.global_rank + 1) * share)
    # Shares must be equal where weights are sharded: crops that some see twice count once.
    mine = [held[number % len(held)] for number in numbers]
    counts = torch.tensor([float(number < len(held)) for number in numbers])
    rows, pictures = [], []
    for figures, row in validate(state.network, config, mine, lpips):
        rows.append(figures)
        pictures.append(row)
    sums = (torch.tensor([list(row.values()) for row in rows]) * counts[:, None]).sum(0)
    means = dict(zip(rows[0], (_summed(sums.to(fabric.device), fabric) / len(held)).tolist(), strict=True))
    losses = [value for name, value in means.items() if "_loss_" in name]
    score = sum(losses) / len(losses)
    if log is not None:
        log.write("validation", state.step, {"loss": score} | means)
        shown = {name: value for name, value in means.items() if "_loss_" not in name}
        _say(fabric, f"validation: loss {score:.4g}, " + ", ".join(f"{n} {v:.4g}" for n, v in shown.items()))
        if config.pictures:
            log.picture(state.step, contact_sheet(pictures[: config.pictures]))
    return score


def _test(
    weights: Path,
    pictures: Sequence[PictureFile],
    config: TrainConfig,
    lpips: Sequence[Lpips],
    clip: Clip | None,
    fabric: Fabric,
    log: Log,
) -> None:
    rows: dict[str, dict[str, float]] = {}
    presets = [] if config.stage == "predictor" else config.presets
    for name, figures in test(weights, pictures, presets, lpips, fabric.device, clip):
        rows[name] = figures
        _say(fabric, f"test: {name}: " + ", ".join(f"{key} {value:.4g}" for key, value in figures.items()))
    means = {key: sum(row[key] for row in rows.values()) / len(rows) for key in next(iter(rows.values()))}
    _say(fabric, "test, mean: " + ", ".join(f"{key} {value:.4g}" for key, value in means.items()))
    log.table("test", rows | {"mean": means})


class _Report:
    """Times the run and writes a row of the log every so many steps."""

    def __init__(
        self, config: TrainConfig, network: InfDiTConfig, state: State, fabric: Fabric, log: Log | None
    ) -> None:
        self.config, self.state, self.fabric, self.log = config, state, fabric, log
        flops = network.prediction_flops if config.stage != "network" else network.evaluation_flops
        self.flops = 3 * flops(config.data.crop, config.data.crop)  # backward is twice forward
        if config.stage == "network":
            self.flops *= network.grids
        self.named: set[str] = set()
        self.began = time.monotonic() - state.seconds
        self._window()

    def _window(self) -> None:
        self.opened, self.first, self.waited, self.elsewhere = time.monotonic(), self.state.step, 0.0, 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """For data."""
        start = time.monotonic()
        yield
        self.waited += time.monotonic() - start

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """Time that is no training."""
        start = time.monotonic()
        yield
        self.elsewhere += time.monotonic() - start

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        start = time.monotonic()
        with self.apart():
            yield
        self.state.saving += time.monotonic() - start

    def broken(self, skipped: Sequence[Skipped]) -> None:
        """Name damaged pictures, each once."""
        for name, reason in skipped:
            if name not in self.named:
                self.named.add(name)
                print(f"skipped {name}: {reason} ({len(self.named)} so far)", file=sys.stderr, flush=True)

    def stepped(self, norm: float) -> None:
        state, config, fabric = self.state, self.config, self.fabric
        state.seconds = time.monotonic() - self.began
        if state.step % config.log_every and state.step != config.steps:
            return
        steps, seconds = state.step - self.first, time.monotonic() - self.opened - self.elsewhere
        crops = steps * config.batch * config.accumulate  # of one device
        figures = state.losses.means(_summed(state.losses.sums, fabric))
        state.losses.sums.zero_()
        rate = self.flops * crops / seconds
        figures |= {
            "learning_rate": state.optimizers[-1].param_groups[0]["lr"],
            "gradient_norm": norm,
            "crops_per_second": crops * fabric.world_size / seconds,
            "tflops_per_device": rate / 1e12,
            "share_of_matmul": rate / matmul_rate(fabric.device, _DTYPES[config.precision]),
            "data_share": self.waited / seconds,
            "saving_share": state.saving / state.seconds,
            "hours": state.seconds / 3600,
        }
        if self.log is not None:
            self.log.write("log", state.step, figures)
        left = int((config.steps - state.step) * (time.monotonic() - self.opened) / steps)
        _say(
            fabric,
            f"step {state.step}/{config.steps}, loss {figures['loss']:.4g}, gradient norm {norm:.3g}, "
            f"{figures['crops_per_second']:.3g} crops/s, {left // 3600} h {left // 60 % 60:02} min left",
        )
        self._window()


def _summed(x: Tensor, fabric: Fabric) -> Tensor:
    """Over all processes."""
    return cast(Tensor, fabric.all_reduce(x, reduce_op="sum")) if fabric.world_size > 1 else x


def _say(fabric: Fabric, text: str) -> None:
    if fabric.is_global_zero:
        print(text, file=sys.stderr, flush=True)
