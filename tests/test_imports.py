"""The library is light: what a ComfyUI user hasn't installed must not keep it from loading."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import importlib.abc, sys

class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"open_clip", "torchvision", "png", "scipy", "lpips", "lightning", "omegaconf", "cv2",
                                  "webdataset", "tensorboard", "wandb", "transformers", "timm", "comfy"}:
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Block())
import infdit_core
import infdit_core.cli
print(infdit_core.__file__)
"""


def test_imports_without_optional_packages() -> None:
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).parent == root / "infdit_core"


def test_library_imports_are_relative_and_stay_below_the_host() -> None:
    """The host imports the folder by its path, under a name of its own."""
    root = Path(__file__).parents[1] / "infdit_core"
    lines = [(path, line) for path in root.rglob("*.py") for line in path.read_text().splitlines()]
    assert not [entry for entry in lines if entry[1].lstrip().startswith(("import infdit_core", "from infdit_core"))]
    assert not [entry for entry in lines if entry[1].lstrip().startswith(("import comfy", "from comfy"))]


def test_both_lists_of_requirements_are_the_same() -> None:
    """pip reads pyproject.toml, ComfyUI-Manager requirements.txt."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 brings it")
    root = Path(__file__).parents[1]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    lines = (root / "requirements.txt").read_text().splitlines()
    assert ["torch>=2.6", *(line for line in lines if not line.startswith("#"))] == project["dependencies"]
