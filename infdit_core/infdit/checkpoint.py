"""Inf-DiT's weights files: hyper-parameters, loading, saving, converting. Their names on disk: `keys.py`."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from ..weights import DEFAULT_WEIGHTS, WeightsError, WeightsFile, open_weights, save_weights
from .config import CHANNELS, LR_PATCH_SIZE, InfDiTConfig, Preset
from .keys import ADALN, CLIP_PREFIX, FACTORS, ROPE_TABLES, SEMANTIC, dropped_keys, factored_kernels, key_table
from .lora import describe_lora, is_lora, low_rank, merged_state, open_lora
from .model import InfDiT, fresh_matrix

DEFAULT_FILE = DEFAULT_WEIGHTS / "infdit_nano.safetensors"
_METADATA_FIELDS = (
    "semantic_size",
    "rope_side",
    "parametrisation",
    "preconditioning",
    "sigma_data",
    "sigma_min",
    "sigma_max",
    "grids",
)  # not in the shapes, or not always


def is_infdit(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a file's tensors are those of an Inf-DiT, whole or in part."""
    return ADALN + "re_pos_embed" in shapes or "mixins.patch_embed.proj.weight" in shapes


def require_infdit(file: WeightsFile) -> None:
    """Raise WeightsError for a file of another kind."""
    if is_lora(file):
        raise WeightsError(
            f"{file.path} is a LoRA for Inf-DiT, no network: merge it into one, infdit convert NETWORK OUT --lora FILE"
        )
    if not is_infdit(file.shapes):
        some = ", ".join(list(file.shapes)[:3])
        raise WeightsError(f"{file.path} is not an Inf-DiT file: its tensors start with {some}")


def _keys(config: InfDiTConfig) -> dict[str, str]:
    return key_table(
        config.num_layers, config.predictor_depth, bool(config.predictor_condition), bool(config.detail_rank)
    )


def _factored(state: dict[str, Tensor], config: InfDiTConfig) -> dict[str, Tensor]:
    """A network's tensors as they stand in a file: the detailer's kernels as two factors, the nearest of the rank."""
    state, rank = dict(state), config.detail_rank
    for kernel in factored_kernels(config.predictor_depth) if rank else ():
        added = state.pop(f"detailer.{kernel}.weight").float() - state[f"predictor.{kernel}.weight"].float()
        factors = zip(FACTORS, low_rank(added.flatten(1), rank), strict=True)
        state |= {f"detailer.{kernel}.{name}": factor for name, factor in factors}
    return state


def _multiplied(state: dict[str, Tensor], config: InfDiTConfig) -> dict[str, Tensor]:
    """The other way, in place."""
    for kernel in factored_kernels(config.predictor_depth) if config.detail_rank else ():
        up, down = (state.pop(f"detailer.{kernel}.{name}").float() for name in FACTORS)
        weight = state[f"predictor.{kernel}.weight"]
        state[f"detailer.{kernel}.weight"] = (weight.float() + (up @ down).view_as(weight)).to(weight.dtype)
    return state


def read_config(file: WeightsFile) -> InfDiTConfig:
    """Hyper-parameters from shapes, and from metadata what shapes don't say. Raises WeightsError."""
    try:
        layers, _, heads, head_size = file.shapes[ADALN + "re_pos_embed"]
        hidden, channels, patch, _ = file.shapes["mixins.patch_embed.proj.weight"]
        tokens = file.shapes[ADALN + "lr_query_position_embedding"][1]
        lr_tokens = file.shapes[ADALN + "lr_key_position_embedding"][1]
        time = file.shapes["time_embed.mlp.0.weight"][1]
        block_tokens, window_tokens = round(tokens**0.5), round(lr_tokens**0.5)
        if (
            block_tokens**2 != tokens
            or window_tokens**2 != lr_tokens
            or window_tokens % 3
            or heads * head_size != hidden
        ):
            raise ValueError("position embeddings don't belong to square blocks")
        if channels != 2 * CHANNELS:
            raise ValueError(f"{channels} input channels instead of {2 * CHANNELS}")
        block = block_tokens * patch
        settings: dict[str, Any] = {
            "hidden_size": hidden,
            "num_layers": layers,
            "num_heads": heads,
            "patch_size": patch,
            "block_size": block,
            "scale": block // (window_tokens // 3 * LR_PATCH_SIZE),
            "time_channels": time,
        }
        if "predictor.head.weight" in file.shapes:
            settings["predictor_width"] = file.shapes["predictor.head.weight"][0]
            settings["predictor_depth"] = len(
                {name.split(".")[2] for name in file.shapes if name.startswith("predictor.blocks.")}
            )
        if "predictor.condition.0.weight" in file.shapes:
            settings["predictor_condition"] = file.shapes["predictor.condition.0.weight"][0]
        if factor := next((name for name in file.shapes if name.startswith("detailer.") and name.endswith(".up")), ""):
            settings["detail_rank"] = file.shapes[factor][1]
        if SEMANTIC[0] in file.shapes:
            settings["semantic_size"] = file.shapes[SEMANTIC[0]][1]
        if ROPE_TABLES[0] in file.shapes:
            settings["rope_side"] = file.shapes[ROPE_TABLES[0]][0]
        said = dict(json.loads(file.metadata.get("config", "{}")))
        if not set(said) <= set(_METADATA_FIELDS):
            raise ValueError(f"its metadata says {', '.join(said)}, which this version doesn't know")
        settings |= said
        presets = {name: Preset(**fields) for name, fields in json.loads(file.metadata.get("presets", "{}")).items()}
        if presets:
            settings["presets"] = presets
        config = InfDiTConfig(**settings)
        config.check()
    except (KeyError, ValueError, TypeError, IndexError, AttributeError, ZeroDivisionError) as error:
        raise WeightsError(
            f"{file.path} starts like an Inf-DiT file, but its hyper-parameters can't be read: {error!s} "
            "(a tensor is missing or has an unknown shape)"
        ) from error
    return config


def unused_keys(file: WeightsFile, config: InfDiTConfig) -> dict[str, str]:
    """Check that every tensor is there and of the right shape; return those not read, with the reason.

    Raises WeightsError that names what is missing, unknown or of another shape.
    """
    table = _keys(config)
    unused = {name: why for name, why in dropped_keys(config.num_layers).items() if name in file.shapes}
    unused |= {name: "CLIP image tower" for name in file.shapes if name.startswith(CLIP_PREFIX)}
    expected = {
        name: tuple(t.shape) for name, t in _factored(InfDiT(config, device="meta").state_dict(), config).items()
    }
    if not set(SEMANTIC) & set(file.shapes) and "semantic_size" in json.loads(file.metadata.get("config", "{}")):
        table = {disk: code for disk, code in table.items() if disk not in SEMANTIC}
    problems = [f"missing: {name}" for name in table if name not in file.shapes]
    problems += [f"unknown: {name}" for name in file.shapes if name not in table and name not in unused]
    problems += [
        f"{name} has shape {file.shapes[name]} instead of {expected[code]}"
        for name, code in table.items()
        if name in file.shapes and file.shapes[name] != expected[code]
    ]
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise WeightsError(f"{file.path} is not a complete Inf-DiT file: {shown}")
    return unused


def load_infdit(
    path: str | os.PathLike[str] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    operations: Any = nn,
) -> InfDiT:
    """Load an Inf-DiT network for inference; None: the shipped default weights.

    path: the published DeepSpeed .pt, with or without the CLIP tower, or our safetensors; every hyper-parameter
    comes from the file. Returns the network in eval mode, without gradients. Raises WeightsError, which says what
    is wrong with the file.
    """
    file = open_weights(DEFAULT_FILE if path is None else path)
    require_infdit(file)
    config = read_config(file)
    unused_keys(file, config)
    model = InfDiT(config, operations=operations, device="meta")
    tensors = {code: file.read(disk) for disk, code in _keys(config).items() if disk in file.shapes}
    if SEMANTIC[0] not in file.shapes:
        tensors |= _unused_semantics(config)
    state = {code: tensor.to(device=device, dtype=dtype, copy=True) for code, tensor in tensors.items()}
    model.load_state_dict(_multiplied(state, config), assign=True)
    return model.eval().requires_grad_(False)


def _unused_semantics(config: InfDiTConfig) -> dict[str, Tensor]:
    """What a file leaves out, as fresh weights have it: without effect until it is trained."""
    size = config.hidden_size
    return {
        "semantic_in.weight": fresh_matrix(torch.empty(size, config.semantic_size), torch.Generator().manual_seed(0)),
        "semantic_in.bias": torch.zeros(size),
        "semantic_out.weight": torch.zeros(size, size),
        "semantic_out.bias": torch.zeros(size),
    }


def infdit_metadata(config: InfDiTConfig) -> dict[str, str]:
    """What shapes don't say, as safetensors metadata."""
    fields = {name: getattr(config, name) for name in _METADATA_FIELDS}
    presets = {name: asdict(preset) for name, preset in config.presets.items()}
    return {"architecture": "infdit", "config": json.dumps(fields), "presets": json.dumps(presets)}


def save_infdit(
    path: str | os.PathLike[str],
    model: InfDiT,
    dtype: torch.dtype = torch.bfloat16,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a network under the published names, atomically, a LoRA merged; `metadata` is added to the file's own.

    What takes up semantics is left out where it changes nothing.
    """
    state = _factored(merged_state(model), model.config)
    left_out = () if model.uses_semantics else SEMANTIC
    table = {disk: code for disk, code in _keys(model.config).items() if disk not in left_out}
    layout = {disk: (tuple(state[code].shape), dtype) for disk, code in table.items()}

    def tensors() -> Iterator[Tensor]:
        for code in table.values():
            yield state[code].to(device="cpu", dtype=dtype)

    save_weights(path, layout, tensors(), infdit_metadata(model.config) | dict(metadata or {}))


def describe(file: WeightsFile) -> dict[str, str]:
    """What an Inf-DiT or LoRA file is, for people: one line an entry. Raises WeightsError for any other."""
    if is_lora(file):
        return describe_lora(file)
    require_infdit(file)
    config = read_config(file)
    unused = unused_keys(file, config)
    used = [name for name in _keys(config) if name in file.shapes]
    parameters = sum(math.prod(file.shapes[name]) for name in used)
    precisions = sorted({str(file.dtypes[name]).removeprefix("torch.") for name in used})
    tower = [name for name in unused if name.startswith(CLIP_PREFIX)]
    lines = {
        "kind": f"Inf-DiT x{config.scale}, {file.format}",
        "network": f"{config.num_layers} layers, hidden {config.hidden_size}, {config.num_heads} heads, "
        f"block {config.block_size} px, patch {config.patch_size} px",
        "predictor": f"{config.predictor_depth} residual blocks, width {config.predictor_width}"
        + (f", told the degradation in {config.predictor_condition} numbers" if config.predictor_condition else "")
        if config.predictor_depth
        else "none: bicubic",
        "detailer": f"adds to the predictor's kernels with rank {config.detail_rank}" if config.detail_rank else "none",
        "parameters": f"{parameters:,}",
        "precision": ", ".join(precisions),
        "diffuses": f"{config.parametrisation}, sigma_data {config.sigma_data:g}, "
        f"sigma {config.sigma_min:g} to {config.sigma_max:g}",
        "grids of blocks": str(config.grids),
        "presets": "; ".join(f"{name}: {preset.describe()}" for name, preset in config.presets.items()),
        "CLIP image tower": f"{sum(math.prod(file.shapes[name]) for name in tower):,} parameters" if tower else "none",
    }
    for reason in sorted(set(unused.values()) - {"CLIP image tower"}):
        names = [name for name, why in unused.items() if why == reason]
        lines[f"unused ({reason})"] = ", ".join(names)
    return lines | {f"says {key}": value for key, value in file.metadata.items() if key not in ("config", "presets")}


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    clip: str | os.PathLike[str] | None = None,
    drop_clip: bool = False,
    lora: str | os.PathLike[str] | None = None,
) -> None:
    """Write an Inf-DiT file as safetensors, tensor by tensor: RoPE tables dropped, their side kept in the metadata.

    dtype: of the network's tensors, None keeps theirs. A CLIP tower is kept, left out with drop_clip, or goes to a
    file of its own, `clip`, under open_clip's names. lora: a LoRA file to merge into the network, in fp32.
    Raises WeightsError, and OSError where it can't be written.
    """
    file = open_weights(source)
    require_infdit(file)
    config = read_config(file)
    unused = unused_keys(file, config)
    tower = [name for name in unused if name.startswith(CLIP_PREFIX)]
    if clip is not None and not tower:
        raise WeightsError(f"{file.path} holds no CLIP tower to split off")
    names = [name for name in file.shapes if name not in ROPE_TABLES]
    if drop_clip or clip is not None:
        names = [name for name in names if name not in set(tower)]
    origin = {"converted_from": f"{file.path.name}, {file.format}, {file.path.stat().st_size} bytes"}
    adapter = None if lora is None else open_lora(lora)
    if adapter is not None:
        adapter.require_fit({name: file.shapes[name] for name in key_table(config.num_layers) if name in file.shapes})
        origin["merged_lora"] = f"{adapter.file.path.name}, rank {adapter.rank}, alpha {adapter.alpha:g}"

    def read(name: str) -> Tensor:
        tensor = file.read(name)
        return tensor if adapter is None else adapter.merge(name, tensor)

    def write(path: str | os.PathLike[str], names: list[str], prefix: str, metadata: Mapping[str, str]) -> None:
        kinds = {name: file.dtypes[name] if dtype is None or name in tower else dtype for name in names}
        layout = {name.removeprefix(prefix): (file.shapes[name], kinds[name]) for name in names}
        save_weights(path, layout, (read(name).to(kinds[name]) for name in names), metadata)

    write(target, names, "", dict(file.metadata) | infdit_metadata(config) | origin)
    if clip is not None:
        write(clip, tower, CLIP_PREFIX, {"architecture": "open_clip image tower"} | origin)
