"""LoRA (arXiv 2106.09685): fine-tuning Inf-DiT through low-rank updates of attention and MLP, small files of their own.

On disk, an adapted module keeps the name it has in the published file (`keys.py`): `<module>.lora_A.weight`
(rank, in) and `<module>.lora_B.weight` (out, rank); rank and alpha stand in the metadata.
"""

import math
import os
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, register_parametrization

from ..weights import WeightsError, WeightsFile, open_weights, save_weights
from .keys import factored_kernels, key_table
from .model import InfDiT

# Linear modules below `layers.`: attention, cross-attention and MLP, but not adaLN's modulation.
_ADAPTED = {"qkv", "attention_out", "mlp_in", "mlp_out", "query", "key_value", "out"}
_ARCHITECTURE = "infdit_lora"
_A, _B = ".lora_A.weight", ".lora_B.weight"
_UPDATE = ".parametrizations.weight.0"  # where torch keeps an update


class LowRank(nn.Module):
    """W -> W + alpha / rank B A (eq. 3). A: (rank, in), random; B: (out, rank), zero: the start changes nothing.

    A convolution's kernel counts as the matrix (out, in * 3 * 3).
    """

    def __init__(self, weight: Tensor, rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        self.rank, self.alpha = rank, alpha
        inputs = weight[0].numel()
        bound = inputs**-0.5  # the paper says a Gaussian, its code takes nn.Linear's own distribution
        a = torch.empty(rank, inputs, dtype=torch.float32, device=generator.device)
        self.A = nn.Parameter(a.uniform_(-bound, bound, generator=generator).to(weight.device))
        self.B = nn.Parameter(weight.new_zeros(weight.shape[0], rank, dtype=torch.float32))

    def forward(self, weight: Tensor) -> Tensor:
        # Added in fp32 also to a bf16 weight: it is rounded once.
        return (weight + self.alpha / self.rank * (self.B @ self.A).view_as(weight)).to(weight.dtype)


def add_lora(model: InfDiT, rank: int, alpha: float, generator: torch.Generator) -> None:
    """Freeze a network and put an update of the given rank, zero at first, on every linear layer of attention and MLP.

    alpha: the update is scaled by alpha / rank. generator: for A, a CPU one gives the same on every device.
    The updates' parameters are fp32 and the only ones with gradients. Raises ValueError for a rank below 1 and for
    a network that has updates already.
    """
    if rank < 1:
        raise ValueError(f"a LoRA's rank is {rank}: it must be at least 1")
    _require_plain(model)
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if name.startswith("layers.") and name.rpartition(".")[2] in _ADAPTED and isinstance(module, nn.Linear):
            register_parametrization(module, "weight", LowRank(module.weight, rank, alpha, generator))


def low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(out, rank) and (rank, in): the factors of the nearest matrix of that rank, as large as each other."""
    up, strength, down = torch.linalg.svd(matrix, full_matrices=False)
    half = strength[:rank].sqrt()
    return up[:, :rank] * half, half[:, None] * down[:rank]


@torch.no_grad()
def adapt_detailer(model: InfDiT, generator: torch.Generator) -> None:
    """Leave gradients to the detailer alone, to its kernels as updates, of its rank, of the predictor's."""
    assert model.predictor is not None and model.detailer is not None
    model.requires_grad_(False)
    model.detailer.requires_grad_(True)
    rank = model.config.detail_rank
    for name in factored_kernels(model.config.predictor_depth):
        kernel, base = model.detailer.get_submodule(name), model.predictor.get_submodule(name)
        assert isinstance(kernel, nn.Conv2d) and isinstance(base, nn.Conv2d)
        added = kernel.weight - base.weight
        kernel.weight.copy_(base.weight)
        update = LowRank(kernel.weight, rank, rank, generator)
        if added.any():
            for factor, found in zip((update.B, update.A), low_rank(added.flatten(1), rank), strict=True):
                factor.copy_(found)
        kernel.weight.requires_grad_(False)
        register_parametrization(kernel, "weight", update)


def _updates(model: InfDiT) -> dict[str, LowRank]:
    """By the adapted module's name in the code."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, LowRank)}
    return {name.removesuffix(_UPDATE): module for name, module in found.items() if name.startswith("layers.")}


def _require_plain(model: InfDiT) -> None:
    if _updates(model):
        raise ValueError("the network has a LoRA already; load its weights anew, or take those of merged_state")


@torch.no_grad()
def merged_state(model: InfDiT) -> dict[str, Tensor]:
    """The network's tensors under their plain names, updates merged in; the network itself stays as it is.

    What has no update shares memory with the network, as in state_dict.
    """
    state = dict(model.state_dict())
    for name, module in model.named_modules():
        if is_parametrized(module, "weight"):
            state = {key: tensor for key, tensor in state.items() if not key.startswith(f"{name}.parametrizations.")}
            state[f"{name}.weight"] = module.weight
    return state


# --- files


def lora_tensors(model: InfDiT) -> dict[str, Tensor]:
    """A and B of every adapted module under their names on disk; {} for a plain network. Shares memory with it."""
    disk_names = {code: disk for disk, code in key_table(model.config.num_layers).items()}
    tensors: dict[str, Tensor] = {}
    for name, update in _updates(model).items():
        module = disk_names[f"{name}.weight"].removesuffix(".weight")
        tensors |= {module + _A: update.A.detach(), module + _B: update.B.detach()}
    return tensors


def save_lora(
    path: str | os.PathLike[str],
    model: InfDiT,
    metadata: Mapping[str, str] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write an adapted network's updates as safetensors, atomically, without the network.

    metadata: added to the file's own. Raises ValueError for a network without updates.
    """
    update = next(iter(_updates(model).values()), None)
    if update is None:
        raise ValueError("the network has no LoRA to save; add one with add_lora")
    tensors = lora_tensors(model)
    layout = {name: (tuple(tensor.shape), dtype) for name, tensor in tensors.items()}
    own = {"architecture": _ARCHITECTURE, "rank": str(update.rank), "alpha": str(update.alpha)}
    on_disk = (tensor.to(device="cpu", dtype=dtype) for tensor in tensors.values())
    save_weights(path, layout, on_disk, dict(metadata or {}) | own)


class LoRA(NamedTuple):
    """An opened LoRA file; modules are named as on disk."""

    file: WeightsFile
    rank: int
    alpha: float
    modules: list[str]

    def require_fit(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise WeightsError unless every update has its weight in `shapes`, those of a network by name on disk."""
        problems = []
        for module in self.modules:
            adapted = (self.file.shapes[module + _B][0], self.file.shapes[module + _A][1])
            shape = shapes.get(f"{module}.weight")
            if shape is None:
                problems.append(f"it adapts {module}, which the network doesn't have")
            elif shape != adapted:
                problems.append(f"it adapts weights {adapted} of {module}, but the network's are {shape}")
        if problems:
            raise WeightsError(
                f"{self.file.path} doesn't fit this network: {problems[0]} ({len(problems)} of {len(self.modules)} "
                "modules don't fit); use it with the network that it was trained on"
            )

    def merge(self, name: str, weight: Tensor, strength: float = 1.0) -> Tensor:
        """A network's tensor, by its name on disk, plus its update in fp32; as it is where it has none."""
        module = name.removesuffix(".weight")
        if module + _A not in self.file.shapes:
            return weight
        a, b = (self.file.read(module + end).to(weight.device, torch.float32) for end in (_A, _B))
        return weight.float() + strength * self.alpha / self.rank * (b @ a)


def is_lora(file: WeightsFile) -> bool:
    """Whether a file is a LoRA for Inf-DiT."""
    return file.metadata.get("architecture") == _ARCHITECTURE


def read_lora(file: WeightsFile) -> LoRA:
    """Rank, alpha and modules of a LoRA file. Raises WeightsError for files of another kind and incomplete ones."""
    if not is_lora(file):
        some = ", ".join(list(file.shapes)[:3])
        raise WeightsError(
            f"{file.path} is not a LoRA for Inf-DiT: its tensors start with {some}, and its metadata says architecture "
            f"{file.metadata.get('architecture', 'unknown')} instead of {_ARCHITECTURE}; give a file that was saved "
            "as a LoRA of this network"
        )
    try:
        rank, alpha = int(file.metadata["rank"]), float(file.metadata["alpha"])
        if rank < 1 or not math.isfinite(alpha):
            raise ValueError(f"rank {rank}, alpha {alpha}")
    except (KeyError, ValueError) as error:
        raise WeightsError(
            f"{file.path} is a LoRA for Inf-DiT, but its metadata doesn't say a rank and an alpha ({error})"
        ) from error
    modules = list(dict.fromkeys(name.removesuffix(_A).removesuffix(_B) for name in file.shapes))
    for module in modules:
        a, b = (file.shapes.get(module + end) for end in (_A, _B))
        if a is None or b is None or len(a) != 2 or len(b) != 2 or a[0] != rank or b[1] != rank:
            raise WeightsError(
                f"{file.path} is not a complete LoRA of rank {rank}: for {module} it has {_A[1:]} of shape {a} "
                f"and {_B[1:]} of shape {b}, instead of ({rank}, in) and (out, {rank}); get the file again"
            )
    return LoRA(file, rank, alpha, modules)


def open_lora(path: str | os.PathLike[str]) -> LoRA:
    """`read_lora` on a path. Raises WeightsError."""
    return read_lora(open_weights(path))


def describe_lora(file: WeightsFile) -> dict[str, str]:
    """What a LoRA file is, for people: one line an entry. Raises WeightsError for an incomplete file."""
    lora = read_lora(file)
    precisions = sorted({str(dtype).removeprefix("torch.") for dtype in file.dtypes.values()})
    lines = {
        "kind": f"LoRA for Inf-DiT, {file.format}",
        "rank": str(lora.rank),
        "alpha": f"{lora.alpha:g}",
        "adapts": f"{len(lora.modules)} modules",
        "parameters": f"{sum(math.prod(shape) for shape in file.shapes.values()):,}",
        "precision": ", ".join(precisions),
    }
    said = {f"says {key}": value for key, value in file.metadata.items() if key not in ("rank", "alpha")}
    return lines | said


@torch.no_grad()
def apply_lora(model: InfDiT, path: str | os.PathLike[str], strength: float = 1.0) -> None:
    """Add a LoRA file's updates to a loaded network's weights, in place, `strength` times.

    Raises WeightsError for a file of another kind or for another network, which then stays as it was, and
    ValueError for a network with a LoRA of its own.
    """
    _require_plain(model)
    lora, state = open_lora(path), model.state_dict()
    weights = {disk: state[code] for disk, code in key_table(model.config.num_layers).items()}
    lora.require_fit({name: tuple(weight.shape) for name, weight in weights.items()})
    for module in lora.modules:
        name = f"{module}.weight"
        weights[name].copy_(lora.merge(name, weights[name], strength))
