"""Settings of a training run: dataclasses that OmegaConf fills from YAML files and key=value arguments."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ..infdit.config import InfDiTConfig

CONFIGS = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class DataConfig:
    """Where pictures come from, and what becomes of them. The defaults are the published recipe."""

    train: list[str] = field(default_factory=list)  # folders, WebDataset shards (.tar), or patterns of either
    validation: list[str] = field(default_factory=list)  # the same; without, `held` of the training pictures
    test: list[str] = field(default_factory=list)  # enlarged whole at the end of the run
    held: int = 8  # pictures for validation
    crop: int = 512  # pixels
    direct: float = 0.7  # share of crops cut as they are; the others after the short side was resized to the crop's
    mirror: float = 0.3  # share of the direct crops mirrored
    turn: bool = False  # also turn direct crops upside down and on their side, by halves
    candidates: int = 1  # crops drawn from a folder for one used: the one with the most detail
    surrounded: float = 0.0  # share of batches whose low resolution goes on for a block around the crop
    degraded: float = 1.0  # share of low resolutions degraded as in Real-ESRGAN; the others are bicubic
    softness: float = 1.0  # how far the degraded ones are blurred: 1 as published, 0 hardly at all
    mild: float = 0.0  # share of the degraded ones that have noise and JPEG only once, on the bicubic low resolution
    workers: int = 4  # processes that read and decode
    cache: float = 1.0  # GiB of decoded pictures that each of them keeps


@dataclass(frozen=True)
class LossConfig:
    """What the network is asked, and how much an answer weighs."""

    sigma_log_mean: float = -1.0  # ln sigma is normally distributed
    sigma_log_deviation: float = 1.4
    weight: Literal["edm", "unit", "v", "epsilon"] = "edm"
    power: int = 2  # of the error: 2 or 1
    regression: float = 0.0  # share of samples without noise, told sigma_max: they learn the mean (residual networks)
    # LPIPS is added, times this and, where noise is little, sigma / perceptual_below; without noise the detailer's
    # share of the first picture; for a detailer's own picture 1.
    perceptual: float = 0.0
    perceptual_below: float = 0.3  # sigma of what counts as little
    screen: float = 60.0  # how much a pattern counts beside LPIPS that repeats in every low-resolution pixel
    own_input: float = 0.0  # share of samples: little noise is added to the upsampled picture, as a sampler does it;
    # without `perceptual` they learn the mean
    # By so much more an error counts beyond what the original holds near by; a detailer's: times its square, beside the
    # logarithm of the error.
    overshoot: float = 0.0
    lr_dropout: float = 0.07  # share of samples whose low resolution is replaced by noise
    direction: Literal["lt", "rb"] = "lt"


@dataclass(frozen=True)
class OptimizerConfig:
    kind: Literal["adamw", "muon"] = "adamw"  # muon: for the layers' matrices, AdamW for the rest
    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)  # of AdamW
    weight_decay: float = 1e-4
    clip: float = 0.1  # of the gradient's norm
    warmup: int = 1000  # steps in which the learning rate rises
    decay: float = 0.0  # share of the steps, at the end, in which it falls to 0
    ema: float = 0.9999


@dataclass(frozen=True)
class LoRAConfig:
    rank: int = 0  # 0: train all weights
    alpha: float = 16.0


@dataclass(frozen=True)
class TrainConfig:
    """A run. `out` holds its log, checkpoints and pictures; the same command there goes on after the last save."""

    out: str = ""
    start_from: str = ""  # a weights file to fine-tune, or "default"; without, fresh weights
    clip: str = ""  # CLIP weights: the network is told what they see in the low resolution; without, nothing
    network: InfDiTConfig | None = field(default_factory=InfDiTConfig)  # null: that of start_from
    # What learns: a network's predictor first, then a detailer on top of it, which a predictor that learns on leaves
    # behind, or all else.
    stage: Literal["predictor", "detailer", "network"] = "network"
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    steps: int = 100_000
    batch: int = 8  # crops a device and backward pass
    accumulate: int = 1  # backward passes a step
    seed: int = 0

    precision: Literal["float32", "bfloat16"] = "bfloat16"  # of the matrix products; weights stay float32
    strategy: Literal["auto", "fsdp"] = "auto"  # auto: one device, or DDP under torchrun; fsdp: weights sharded too
    compile: bool = False
    checkpointing: bool = False  # recompute activations in the backward pass: less memory, a third more work

    log_every: int = 50  # steps
    validate_every: int = 1000
    save_every: int = 500
    keep: int = 2  # newest checkpoints that stay; the best one always does
    pictures: int = 4  # at most so many in the picture of samples
    presets: list[str] = field(default_factory=lambda: ["faithful", "balanced"])  # measured when validating
    lpips: list[str] = field(default_factory=list)  # files of LPIPS weights, of AlexNet or VGG16: pictures are measured
    # by the first, loss.perceptual counts the sum
    wandb: str = ""  # project; without, no Weights & Biases

    def check(self) -> None:
        """Raise ValueError for settings that don't make sense together."""
        needed = {"out=FOLDER": self.out, "data.train=[FOLDER]": self.data.train}
        if missing := [setting for setting, value in needed.items() if not value]:
            raise ValueError(f"say {' and '.join(missing)}")
        counts: dict[str, float] = {key: getattr(self, key) for key in ("steps", "batch", "accumulate", "keep")}
        counts |= {key: getattr(self, key) for key in ("log_every", "validate_every", "save_every")}
        counts |= {f"data.{key}": getattr(self.data, key) for key in ("held", "crop", "candidates")}
        counts["loss.perceptual_below"] = self.loss.perceptual_below
        counts |= {"optimizer.learning_rate": self.optimizer.learning_rate, "optimizer.clip": self.optimizer.clip}
        for key, value in counts.items():
            if not value > 0:
                raise ValueError(f"{key}={value}: it must be above 0")
        amounts: dict[str, float] = {"seed": self.seed, "pictures": self.pictures, "lora.rank": self.lora.rank}
        amounts |= {f"data.{key}": getattr(self.data, key) for key in ("workers", "cache")}
        amounts |= {f"optimizer.{key}": getattr(self.optimizer, key) for key in ("weight_decay", "warmup")}
        of_loss = ("sigma_log_deviation", "perceptual", "screen", "overshoot")
        amounts |= {f"loss.{key}": getattr(self.loss, key) for key in of_loss}
        for key, value in amounts.items():
            if not value >= 0:
                raise ValueError(f"{key}={value}: it must not be below 0")
        if not all(0 <= beta < 1 for beta in self.optimizer.betas):
            raise ValueError(f"optimizer.betas={list(self.optimizer.betas)}: they must be from 0 to below 1")
        of_data = ("direct", "mirror", "surrounded", "degraded", "softness", "mild")
        shares = {f"data.{key}": getattr(self.data, key) for key in of_data}
        shares |= {f"loss.{key}": getattr(self.loss, key) for key in ("regression", "own_input", "lr_dropout")}
        shares["loss.regression + loss.own_input"] = self.loss.regression + self.loss.own_input
        shares |= {"optimizer.decay": self.optimizer.decay, "optimizer.ema": self.optimizer.ema}
        for key, value in shares.items():
            if not 0 <= value <= 1:
                raise ValueError(f"{key}={value}: it must be a share, from 0 to 1")
        if self.loss.power not in (1, 2):
            raise ValueError(f"loss.power={self.loss.power}: it must be 1 or 2")
        if self.loss.perceptual and not self.lpips:
            raise ValueError("loss.perceptual needs the weights of LPIPS: say lpips=[FILE]")
        if self.network is None and not self.start_from:
            raise ValueError("network=null takes the network of a weights file: say start_from=FILE")
        if self.network is not None:
            self.network.check()
            if self.stage == "predictor" and not self.network.predictor_depth:
                raise ValueError("stage=predictor needs network.predictor_width and network.predictor_depth")
        others = ("perceptual", "own_input", "overshoot", "lr_dropout")
        if self.stage == "predictor" and (self.lora.rank or self.clip or any(getattr(self.loss, o) for o in others)):
            raise ValueError(
                "stage=predictor learns by PSNR, not by these: say lora.rank=0, clip='' and "
                + ", ".join(f"loss.{other}=0" for other in others)
            )
        if self.stage == "detailer" and not self.loss.perceptual:
            raise ValueError("stage=detailer learns what looks right: say loss.perceptual=20")
        if self.stage == "detailer" and (self.lora.rank or self.clip or self.loss.own_input or self.loss.lr_dropout):
            raise ValueError(
                "stage=detailer has no use for these: say lora.rank=0, clip='', loss.own_input=0, loss.lr_dropout=0"
            )
        if self.lora.rank and not self.start_from:
            raise ValueError("lora.rank adapts weights that exist: say start_from=FILE")
        if self.lora.rank and self.strategy == "fsdp":
            raise ValueError("LoRA weights are too few to shard: use strategy=auto")
        if self.optimizer.kind == "muon" and self.strategy == "fsdp":
            raise ValueError("Muon needs whole matrices, which fsdp shards: use optimizer.kind=adamw or strategy=auto")


def parse(arguments: Sequence[str]) -> TrainConfig:
    """["nano", "mine.yaml", "steps=10", ...] -> TrainConfig: files merge in order, key=value wins.

    A file is a path or the name of one in training/configs/. Raises ValueError for unknown keys and unfit values.
    """
    merged = OmegaConf.structured(TrainConfig)
    settings = [argument for argument in arguments if "=" in argument and not Path(argument).is_file()]
    for argument in (argument for argument in arguments if argument not in settings):
        path = CONFIGS / f"{argument}.yaml" if (CONFIGS / f"{argument}.yaml").exists() else Path(argument)
        if not path.is_file():
            known = ", ".join(sorted(path.stem for path in CONFIGS.glob("*.yaml")))
            raise ValueError(f"{argument} is no config: give {known}, a YAML file, or key=value")
        try:
            merged = OmegaConf.merge(merged, OmegaConf.load(path))
        except (OmegaConfBaseException, YAMLError, UnicodeDecodeError, TypeError, OSError) as error:
            raise ValueError(f"{path}: {_said(error)}") from error
    for setting in settings:
        try:
            merged = OmegaConf.merge(merged, OmegaConf.from_dotlist([setting]))
        except (OmegaConfBaseException, YAMLError) as error:
            raise ValueError(f"{setting}: {_said(error)}") from error
    try:
        config: TrainConfig = OmegaConf.to_object(merged)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        raise ValueError(_said(error)) from error
    config.check()
    return config


def _said(error: Exception) -> str:
    """What an error of OmegaConf says, with the whole key, without its internals."""
    key = getattr(error, "full_key", None)
    first = str(error).splitlines()[0]
    if "is not a ListConfig" in first:
        first = "it must be a list, like [a,b]"
    return f"{first} ({key})" if key else first


def save(config: TrainConfig, path: Path) -> None:
    """Write all settings as YAML."""
    OmegaConf.save(OmegaConf.structured(config), path)


def differences(before: Any, now: Any) -> dict[str, tuple[Any, Any]]:
    """Values by dotted key that two dataclasses of settings have differently."""

    def flat(config: Any, prefix: str = "") -> dict[str, Any]:
        values: dict[str, Any] = {}
        for f in dataclasses.fields(config):
            value = getattr(config, f.name)
            values |= flat(value, f"{prefix}{f.name}.") if dataclasses.is_dataclass(value) else {prefix + f.name: value}
        return values

    a, b = flat(before), flat(now)
    return {key: (a.get(key), b.get(key)) for key in a | b if a.get(key) != b.get(key)}
