"""Hyper-parameters of Inf-DiT."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from torch import Tensor

from ..diffusion import edm
from ..diffusion.samplers import SAMPLERS

Parametrisation = Literal["picture", "residual"]
Preconditioning = Literal["edm", "v", "epsilon"]


@dataclass(frozen=True)
class Preset:
    """How to sample, how long, and from where.

    start: sigma of the noise put on a first picture, from where `steps` steps of a sampler go down: the
    predictor's, or without one the network's estimate. None: a run from sigma_max, which with one step is that
    estimate itself, and with none the predictor's picture. end: sigma where the last step begins; None: sigma_min.
    detail: share of the detailer in the picture that is refined, the rest is the predictor's.
    """

    steps: int
    start: float | None = None
    sampler: str = "heun"
    end: float | None = None
    detail: float = 0.0

    def describe(self) -> str:
        if self.start is None and self.steps <= 1:
            alone = "the estimate alone" if self.steps else "the predictor's picture alone"
            return alone + (f", detail {self.detail:g}" if self.detail else "")
        start = "the largest sigma" if self.start is None else f"sigma {self.start:g}"
        steps = f"{self.steps} step{'s' if self.steps > 1 else ''} of {self.sampler} from {start}"
        steps += "" if self.end is None else f", the last from {self.end:g}"
        steps += f", detail {self.detail:g}" if self.detail else ""
        return steps if self.start is None else f"a first picture, then {steps}"

    def sigmas(self, sigma_min: float, sigma_max: float) -> Tensor:
        """Its noise levels for weights with these limits, falling to 0: (steps + 1,)."""
        start = self.start or sigma_max
        return edm.sigmas(self.steps, self.end if self.end and self.end < start else sigma_min, start)


# For files that say nothing, the published ones: the paper samples 20 steps from sigma_max.
PUBLISHED_PRESETS = {"faithful": Preset(1), "balanced": Preset(20), "detailed": Preset(40)}
# Of networks that get a detailer: to the predictor's picture alone the shipped one adds next to nothing.
DETAILER_PRESETS = {"faithful": Preset(0), "balanced": Preset(1, detail=0.7), "detailed": Preset(1, detail=0.9)}


@dataclass(frozen=True)
class InfDiTConfig:
    """Hyper-parameters of one Inf-DiT network. The defaults are the published network's.

    Everything down to `detail_rank` follows from the shapes of a weights file; what stands below it doesn't,
    and comes from the file's metadata (a published file has none: the defaults are what it was trained with).
    """

    hidden_size: int = 1280
    num_layers: int = 28
    num_heads: int = 16
    patch_size: int = 4  # pixels
    block_size: int = 128  # pixels
    scale: int = 4  # output side / low-resolution side
    time_channels: int = 192
    predictor_width: int = 0  # channels of the convolutional network that gives a first picture; 0: that is bicubic
    predictor_depth: int = 0  # of its residual blocks
    predictor_condition: int = 0  # numbers that tell it how the low resolution was degraded; 0: nothing does
    detail_rank: int = 0  # of what the detailer's kernels add to the predictor's; 0: there is no detailer

    semantic_size: int = 768  # width of the CLIP image vector; the shapes say it where weights use one
    rope_side: int = 1024  # positions wrap after so many patches
    parametrisation: Parametrisation = "picture"  # what is diffused: the picture, or its residual to the upsampled LR
    preconditioning: Preconditioning = "edm"  # what the network predicts: diffusion/preconditioning.py
    sigma_data: float = 0.5
    sigma_min: float = 0.002
    sigma_max: float = 40.0
    grids: int = 1  # of blocks, that pictures are made of: 2 where the network leaves traces at its blocks' borders
    presets: dict[str, Preset] = field(default_factory=PUBLISHED_PRESETS.copy)

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def block_tokens(self) -> int:
        """Tokens along one side of a block."""
        return self.block_size // self.patch_size

    @property
    def lr_block_tokens(self) -> int:
        """LR feature tokens along one side of a block: one for 2x2 low-resolution pixels."""
        return self.block_size // self.scale // LR_PATCH_SIZE

    def evaluation_flops(self, width: int, height: int) -> float:
        """Floating point operations of one evaluation, a multiply-add is two: matrix products and attention."""
        blocks = (width // self.block_size) * (height // self.block_size)
        tokens, hidden, window = self.block_tokens**2, self.hidden_size, (3 * self.lr_block_tokens) ** 2
        layer = 24 * hidden**2 + 4 * 4 * tokens * hidden  # projections and MLP; four blocks of keys
        cross = 4 * hidden**2 + 4 * window * hidden
        low_res = self.lr_block_tokens**2 * (4 * hidden**2 + 2 * 12 * hidden)
        ends = 2 * hidden * (6 + 3) * self.patch_size**2
        return float(blocks * (tokens * (self.num_layers * layer + cross + ends) + low_res))

    def prediction_flops(self, width: int, height: int) -> float:
        """The same for one answer of the predictor, to one turn, for a result of that size."""
        wide = self.predictor_width
        kernels = 9 * wide * (CHANNELS + 2 * self.predictor_depth * wide + CHANNELS * self.scale**2)
        return 2.0 * kernels * (width // self.scale) * (height // self.scale)

    def prediction_work(self, detail: float = 0.0) -> float:
        """What the picture that is refined takes, in evaluations, with so much of the detailer in it."""
        side, answers = self.block_size, TURNS * (detail < 1) + (detail > 0)
        return answers * self.prediction_flops(side, side) / (self.grids * self.evaluation_flops(side, side))

    def check(self) -> None:
        """Raise ValueError for hyper-parameters that no network can have."""
        if self.parametrisation not in get_args(Parametrisation):
            raise ValueError(f"parametrisation {self.parametrisation!r} is not known to this version")
        if self.preconditioning not in get_args(Preconditioning):
            raise ValueError(f"preconditioning {self.preconditioning!r} is not known to this version")
        if not 0 < self.sigma_min <= self.sigma_max or self.sigma_data <= 0 or self.rope_side < 1:
            raise ValueError("sigma_data, 0 < sigma_min <= sigma_max and rope_side must be positive and in order")
        predictor = (self.predictor_width, self.predictor_depth)
        if predictor != (0, 0) and min(predictor) < 1:
            raise ValueError(
                f"predictor_width and predictor_depth are {predictor}: both at least 1, or both 0 for none"
            )
        if self.predictor_condition < 0:
            raise ValueError(f"predictor_condition is {self.predictor_condition}: it must be at least 0, for none")
        if self.detail_rank and not 0 < self.detail_rank <= self.predictor_width:
            raise ValueError(
                f"detail_rank is {self.detail_rank}: it must be 0, for no detailer, or up to the predictor's width, "
                f"{self.predictor_width}"
            )
        if self.grids not in (1, 2):
            raise ValueError(f"grids is {self.grids}: it must be 1 or 2")
        for name, preset in self.presets.items():
            try:
                self.check_steps(preset.steps, preset.start)
                self.check_detail(preset.detail)
            except ValueError as error:
                raise ValueError(f"preset {name}: {error}") from error
        starts = [preset.start for preset in self.presets.values() if preset.start is not None]
        if not all(self.sigma_min < start <= self.sigma_max for start in starts):
            raise ValueError(f"a preset's start must lie above sigma_min and up to sigma_max, not {starts}")
        ends = [preset.end for preset in self.presets.values() if preset.end is not None]
        if not all(self.sigma_min <= end <= self.sigma_max for end in ends):
            raise ValueError(f"a preset's end must lie between sigma_min and sigma_max, not {ends}")
        if unknown := [preset.sampler for preset in self.presets.values() if preset.sampler not in SAMPLERS]:
            raise ValueError(f"a preset's sampler is {unknown[0]!r}: it must be one of {', '.join(SAMPLERS)}")
        if self.hidden_size % self.num_heads or self.head_size % 4:
            raise ValueError(
                f"hidden size {self.hidden_size} over {self.num_heads} heads must give a multiple of 4 per head, "
                "two axes of rotary pairs"
            )
        if self.block_size % self.patch_size or self.block_size % (self.scale * LR_PATCH_SIZE):
            raise ValueError(
                f"block size {self.block_size} must be a multiple of the patch size {self.patch_size} "
                f"and of {LR_PATCH_SIZE} low-resolution pixels ({self.scale * LR_PATCH_SIZE})"
            )

    def check_steps(self, steps: int, start: float | None) -> None:
        """Raise ValueError for a number of steps that can't be taken from a sigma, or from where there is none."""
        if steps == 0 and not self.predictor_depth:
            raise ValueError("steps is 0: these weights have no predictor, so at least 1 is needed")
        least = 0 if start is None and self.predictor_depth else 1
        if steps < least:
            raise ValueError(f"steps is {steps}: at least {least} is needed")

    def check_detail(self, detail: float) -> None:
        """Raise ValueError for a share that there can't be of the detailer."""
        if not 0 <= detail <= 1:
            raise ValueError(f"detail is {detail}: it must be a share, from 0 to 1")
        if detail and not self.detail_rank:
            raise ValueError(f"detail is {detail}: these weights have no detailer, so it must be 0")


LR_PATCH_SIZE = 2  # low-resolution pixels along one side of an LR feature token
CHANNELS = 3  # RGB
TURNS = 4  # of the picture, by a quarter, that a prediction is the mean of
