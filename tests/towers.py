"""CLIP towers of open_clip with random weights, and files of them."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

KEPT: list[torch.library.Library] = []


def _import_open_clip() -> Any:
    """A torch without CUDA can lack torchvision's operators; open_clip imports them, and uses none."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        operators = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        KEPT.append(operators)  # they go when it does
    return pytest.importorskip("open_clip")


open_clip = _import_open_clip()

SMALL_TEXT = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2}
# ViT-L-14 but for its depth and vocabulary's width, a small ViT, and what isn't read off the shapes: a ResNet with
# QuickGELU, and a text tower that stands by itself.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "ViT-L-14, 2 layers": {
        "embed_dim": 768,
        "vision_cfg": {"image_size": 224, "layers": 2, "width": 1024, "patch_size": 14},
        "text_cfg": SMALL_TEXT | {"width": 128, "heads": 2},
    },
    "small ViT": {
        "embed_dim": 48,
        "vision_cfg": {"image_size": 64, "layers": 1, "width": 128, "patch_size": 16, "mlp_ratio": 3.4},
        "text_cfg": SMALL_TEXT,
    },
    "ResNet": {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16},
        "text_cfg": SMALL_TEXT,
        "quick_gelu": True,
    },
    "custom text": {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 64, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": SMALL_TEXT,
        "custom_text": True,
    },
}
DESCRIBED = ("ResNet",)  # not read off the shapes


def made(name: str) -> Any:
    config = {key: value for key, value in ARCHITECTURES[name].items() if key != "custom_text"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kind = open_clip.CustomTextCLIP if "custom_text" in ARCHITECTURES[name] else open_clip.CLIP
        return kind(**config).eval()


def saved(folder: Path, name: str, prefix: str = "", only: str = "") -> Path:
    path = folder / "clip.safetensors"
    state = {prefix + key: value for key, value in made(name).state_dict().items() if key.startswith(only)}
    save_file(state, path)
    if name in DESCRIBED:
        (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": ARCHITECTURES[name]}))
    return path
