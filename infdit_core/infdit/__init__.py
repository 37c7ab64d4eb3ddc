"""Inf-DiT, the upscaling network (arXiv 2405.04312)."""

from .checkpoint import load_infdit, save_infdit
from .config import InfDiTConfig, Preset
from .model import InfDiT

__all__ = ["InfDiT", "InfDiTConfig", "Preset", "load_infdit", "save_infdit"]
