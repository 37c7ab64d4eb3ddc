"""A custom node file for the host under test: a node that makes the upscaler run out of memory."""

import math
import sys

import torch


class OutOfMemory:
    """Passes an image through; from then on there is "memory" for tiles of so many blocks, -1 for any."""

    CATEGORY, FUNCTION, RETURN_TYPES = "testing", "execute", ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"image": ("IMAGE",), "blocks": ("INT", {"min": -1})}}

    @classmethod
    def IS_CHANGED(cls, image, blocks):
        return math.nan  # never taken from the cache

    def execute(self, image, blocks):
        (module,) = (m for name, m in sys.modules.items() if name.endswith("inf-dit.infdit_core.infdit.model"))
        original = getattr(module.InfDiT.denoise, "original", module.InfDiT.denoise)

        def denoise(network, *arguments, tile=None, **options):
            if tile[0] * tile[1] > blocks:
                raise torch.OutOfMemoryError("injected")
            return original(network, *arguments, tile=tile, **options)

        denoise.original = original
        module.InfDiT.denoise = original if blocks < 0 else denoise
        return (image,)


NODE_CLASS_MAPPINGS = {"OutOfMemory": OutOfMemory}
