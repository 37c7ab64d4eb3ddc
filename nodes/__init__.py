"""ComfyUI adapters: a node is a schema and a call into the library. Only `host.py` touches the host's internals."""

from comfy_api.latest import ComfyExtension, io

from .loader import LoadInfDiT
from .native import InfDiTConditioning, InfDiTToImage
from .sampling import EDMHeunSampler, EDMSchedule
from .semantics import LoadClip, SemanticEncode, TextSteering
from .upscale import Upscale, UpscaleTiled

NODES: list[type[io.ComfyNode]] = [
    Upscale,
    LoadInfDiT,
    UpscaleTiled,
    InfDiTConditioning,
    InfDiTToImage,
    EDMHeunSampler,
    EDMSchedule,
    LoadClip,
    SemanticEncode,
    TextSteering,
]


class InfDiTExtension(ComfyExtension):
    """What the host asks for the nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> InfDiTExtension:
    """Called by the host once, after importing the pack."""
    return InfDiTExtension()
