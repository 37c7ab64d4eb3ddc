"""A stand-in for the host, ComfyUI: as much of it as the nodes need to be imported, and to run on the CPU.

It records schemas, has no memory management, and takes no keyword that the host doesn't take. What the nodes do inside
a real host is tested in tests/host.
"""

import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

PACK = Path(__file__).parents[1]
NAME = "custom_nodes/inf-dit"  # the host takes the folder's path for a name: nothing can be imported absolutely by it

# --- comfy_api.latest.io


@dataclass
class Input:
    id: str
    display_name: str | None = None
    optional: bool = False
    tooltip: str | None = None


@dataclass
class Widget(Input):
    default: Any = None


@dataclass
class FloatInput(Widget):
    min: float | None = None
    max: float | None = None
    step: float | None = None


@dataclass
class IntInput(Widget):
    min: int | None = None
    max: int | None = None
    step: int | None = None
    control_after_generate: bool | None = None


@dataclass
class ComboInput(Widget):
    options: list[str] | None = None
    control_after_generate: bool | None = None


@dataclass
class StringInput(Widget):
    multiline: bool = False


@dataclass
class Output:
    id: str | None = None
    display_name: str | None = None
    tooltip: str | None = None


@dataclass
class Schema:
    node_id: str
    display_name: str | None = None
    category: str = "sd"
    inputs: list[Input] = field(default_factory=list)
    outputs: list[Output] = field(default_factory=list)
    hidden: list[Any] = field(default_factory=list)
    description: str = ""


class ComfyNode:
    """Base of all nodes. hidden: what a running graph tells the node, None outside of one."""

    hidden = None


class NodeOutput:
    """What a node returns."""

    def __init__(self, *args: Any) -> None:
        self.args = args


class ComfyExtension:
    """Base of what hands out the nodes."""


def _type(widget: type[Input] = Input) -> SimpleNamespace:
    return SimpleNamespace(Input=widget, Output=Output)


def _io() -> ModuleType:
    io = ModuleType("io")
    for name in ("Image", "Latent", "Model", "Conditioning", "Sampler", "Sigmas", "ClipVision"):
        setattr(io, name, _type())
    for name, widget in {"Float": FloatInput, "Int": IntInput, "Combo": ComboInput, "String": StringInput}.items():
        setattr(io, name, _type(widget))
    vars(io).update(Custom=lambda _: _type(), Hidden=SimpleNamespace(unique_id="UNIQUE_ID"))
    vars(io).update(Input=Input, Output=Output, Schema=Schema, ComfyNode=ComfyNode, NodeOutput=NodeOutput)
    return io


# --- comfy


class ModelType(Enum):
    EDM = 5


class BaseModel(nn.Module):
    def __init__(self, model_config: Any, model_type: ModelType) -> None:
        super().__init__()
        self.model_config, self.model_type = model_config, model_type


class ModelConfig:
    def __init__(self, unet_config: dict[str, Any]) -> None:
        self.unet_config = unet_config


class ModelSampling:
    def __init__(self, model_config: Any) -> None:
        self.settings = model_config.sampling_settings


class NoiseScaling:
    def noise_scaling(self, sigma: Tensor, noise: Tensor, latent_image: Tensor, max_denoise: bool = False) -> Tensor:
        return latent_image + noise * (torch.sqrt(1 + sigma**2) if max_denoise else sigma)


class ModelPatcher:
    def __init__(self, model: nn.Module, load_device: torch.device, offload_device: torch.device) -> None:
        self.model, self.load_device, self.offload_device = model, load_device, offload_device
        self.callbacks: list[tuple[str, Any]] = []

    def add_callback(self, call_type: str, callback: Any) -> None:
        self.callbacks.append((call_type, callback))


class ProgressBar:
    def __init__(self, total: int) -> None:
        self.total = total

    def update_absolute(self, value: int, total: int | None = None, preview: Any = None) -> None:
        assert 0 <= value <= (total or self.total)


class KSampler:
    def __init__(self, sampler_function: Any) -> None:
        self.sampler_function = sampler_function


def _comfy() -> dict[str, dict[str, Any]]:
    cpu = torch.device("cpu")
    return {
        "comfy.conds": {"CONDRegular": lambda cond: SimpleNamespace(cond=cond)},
        "comfy.latent_formats": {"LatentFormat": type("LatentFormat", (), {})},
        "comfy.model_base": {"BaseModel": BaseModel, "ModelType": ModelType},
        "comfy.model_management": {
            "get_torch_device": lambda: cpu,
            "unet_offload_device": lambda: cpu,
            "intermediate_device": lambda: cpu,
            "text_encoder_device": lambda: cpu,
            "text_encoder_offload_device": lambda: cpu,
            "unet_dtype": lambda device, supported_dtypes: torch.float32,
            "unet_manual_cast": lambda weight_dtype, device, supported_dtypes: torch.float32,
            "supports_cast": lambda device, dtype: True,
            "load_models_gpu": lambda models, **_: None,
            "current_loaded_models": [],
            "soft_empty_cache": lambda: None,
            "throw_exception_if_processing_interrupted": lambda: None,
        },
        "comfy.model_patcher": {"ModelPatcher": ModelPatcher},
        "comfy.model_sampling": {"ModelSamplingContinuousEDM": ModelSampling, "EDM": NoiseScaling},
        "comfy.ops": {"pick_operations": lambda weight_dtype, compute_dtype: nn},
        "comfy.patcher_extension": {"CallbacksMP": SimpleNamespace(ON_PRE_RUN="on_pre_run", ON_CLEANUP="on_cleanup")},
        "comfy.samplers": {"KSAMPLER": KSampler},
        "comfy.supported_models_base": {"BASE": ModelConfig},
        "comfy.utils": {"ProgressBar": ProgressBar},
    }


# --- folder_paths


def _folder_paths(models: Path) -> dict[str, Any]:
    known = {"clip_vision": ([str(models / "clip_vision")], {".safetensors"})}

    def add_model_folder_path(name: str, path: str) -> None:
        known.setdefault(name, ([], set()))[0].append(path)

    def get_filename_list(name: str) -> list[str]:
        folders, extensions = known[name]
        files = [path for folder in folders if Path(folder).is_dir() for path in Path(folder).iterdir()]
        return sorted(path.name for path in files if not extensions or path.suffix in extensions)

    def get_full_path(name: str, file: str) -> str | None:
        found = [Path(folder) / file for folder in known[name][0] if (Path(folder) / file).is_file()]
        return str(found[0]) if found else None

    return {
        "models_dir": str(models),
        "folder_names_and_paths": known,
        "add_model_folder_path": add_model_folder_path,
        "get_filename_list": get_filename_list,
        "get_full_path": get_full_path,
        "get_folder_paths": lambda name: list(known[name][0]),
    }


# --- all together


def _modules(models: Path) -> dict[str, ModuleType]:
    contents = _comfy() | {"folder_paths": _folder_paths(models)}
    contents["comfy_api.latest"] = {"ComfyExtension": ComfyExtension, "io": _io()}
    found = {"comfy": ModuleType("comfy"), "comfy_api": ModuleType("comfy_api")}
    for name, content in contents.items():
        found[name] = ModuleType(name)
        vars(found[name]).update(content)
    for name, module in found.items():
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(found[parent], child, module)
    return found


def _theirs(name: str) -> bool:
    return name.partition(".")[0] in ("comfy", "comfy_api", "folder_paths", NAME)


@contextmanager
def loaded_pack(models: str | os.PathLike[str]) -> Iterator[ModuleType]:
    """The pack, imported by its path as the host does. models: the folder that holds the host's models.

    While it lasts, sys.modules holds the stand-in and the pack's modules under NAME; afterwards what it held before.
    """
    before = {name: module for name, module in sys.modules.items() if _theirs(name)}
    for name in before:
        del sys.modules[name]
    sys.modules.update(_modules(Path(models)))
    try:
        spec = importlib.util.spec_from_file_location(NAME, PACK / "__init__.py")
        assert spec is not None and spec.loader is not None
        pack = importlib.util.module_from_spec(spec)
        sys.modules[NAME] = pack
        spec.loader.exec_module(pack)
        yield pack
    finally:
        for name in [name for name in sys.modules if _theirs(name)]:
            del sys.modules[name]
        sys.modules.update(before)
