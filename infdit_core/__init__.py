"""Any-resolution upscaling with Inf-DiT: tensors in, tensors out; never imports the host."""

from . import diffusion, semantics
from .infdit import InfDiT, InfDiTConfig, load_infdit
from .upscale import upscale
from .weights import WeightsError

__version__ = "0.1.0"
__all__ = ["InfDiT", "InfDiTConfig", "WeightsError", "diffusion", "load_infdit", "semantics", "upscale"]
