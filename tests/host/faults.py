"""A custom node file for the host under test: makes the upscaler fail on demand. It brings no nodes.

The file named by INFDIT_FAULTS, while it exists, holds the largest tile in blocks that there is "memory" for.
"""

import os
import sys
from pathlib import Path

import torch

NODE_CLASS_MAPPINGS: dict[str, type] = {}

(network,) = (m for name, m in list(sys.modules.items()) if name.endswith("inf-dit.infdit_core.infdit.model"))
original = network.InfDiT.denoise


def denoise(self, noisy, sigma, low_res, *, tile=None, **options):
    """The network's, short of memory."""
    fault = Path(os.environ["INFDIT_FAULTS"])
    if fault.exists() and tile[0] * tile[1] > int(fault.read_text()):
        raise torch.OutOfMemoryError("injected")
    return original(self, noisy, sigma, low_res, tile=tile, **options)


network.InfDiT.denoise = denoise
