"""Settings of a training run."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from ..infdit.config import InfDiTConfig, Preset

NANO = InfDiTConfig(
    hidden_size=256,
    num_layers=6,
    num_heads=4,
    block_size=32,
    parametrisation="residual",
    sigma_data=0.1,  # the deviation of photographs' residuals to their upsampled low resolution
    sigma_min=0.005,
    sigma_max=2.0,
    presets={"faithful": Preset(1), "balanced": Preset(4, 0.15), "detailed": Preset(4, 0.25)},
)


@dataclass(frozen=True)
class TrainConfig:
    """What can be said on the command line as key=value."""

    photographs: str  # folder
    out: str  # folder of the run: log.csv, state.pt, weights.safetensors
    start_from: str = ""  # weights to go on from, their optimiser state fresh
    steps: int = 4000
    warmup: int = 100  # steps in which the learning rate rises
    decay: float = 0.3  # share of the steps, at the end, in which it falls to 0
    batch: int = 16
    crop: int = 96  # pixels
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.01
    clip: float = 1.0  # of the gradient's norm
    ema: float = 0.999
    regression: float = 0.25  # share of samples without noise, told sigma_max: they learn the mean
    sigma_log_mean: float = -2.4  # of the other samples
    sigma_log_deviation: float = 1.2
    border: float = 0.2  # share of batches whose crops end as pictures do; the others go on around
    held: int = 8  # photographs for validation
    validate_every: int = 200  # steps
    save_every: int = 100
    seed: int = 0


def parse(settings: Sequence[str]) -> TrainConfig:
    """["steps=10", ...] -> TrainConfig. Raises ValueError for unknown or missing keys and unreadable values."""
    fields = {field.name: field for field in dataclasses.fields(TrainConfig)}
    values: dict[str, str | int | float] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals or name not in fields:
            raise ValueError(f"{setting!r} is no setting; write key=value with one of {', '.join(fields)}")
        kind = {"str": str, "int": int, "float": float}[str(getattr(fields[name].type, "__name__", fields[name].type))]
        try:
            values[name] = kind(text)
        except ValueError:
            raise ValueError(f"{name}={text}: {kind.__name__} expected") from None
    missing = [name for name in ("photographs", "out") if not values.get(name)]
    if missing:
        raise ValueError(f"say {' and '.join(f'{name}=FOLDER' for name in missing)}")
    config = TrainConfig(**values)  # type: ignore[arg-type]
    for name in ("steps", "warmup", "decay", "batch", "crop", "held", "validate_every", "save_every"):
        if getattr(config, name) <= 0:
            raise ValueError(f"{name}={getattr(config, name)}: it must be above 0")
    return config
