"""The native path: the host's own samplers over the whole picture."""

import math
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..infdit_core.images import colours_and_alpha, resize
from ..infdit_core.upscale import pass_size, usable_semantic
from . import host
from .semantics import Semantic
from .target import result_size, target_inputs

RESULT = "infdit"  # entry of the LATENT: what 'Inf-DiT to Image' has to know


class InfDiTConditioning(io.ComfyNode):
    """A picture as CONDITIONING, and the LATENT that goes with it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InfDiTConditioning",
            display_name="Inf-DiT Conditioning",
            category="image/upscaling/Inf-DiT",
            description="Prepares a picture for KSampler and the other samplers of ComfyUI: use cfg 1, denoise 1 and "
            "the scheduler karras, and connect the conditioning as positive and negative. These samplers hold the "
            "whole picture many times over: for very large results take 'Inf-DiT Upscale (tiled)'.",
            inputs=[
                io.Model.Input("model", tooltip="From 'Load Inf-DiT': it decides how the picture is prepared."),
                io.Image.Input("image", tooltip="One or more pictures of the same size."),
                *target_inputs(),
                Semantic.Input(
                    "semantic",
                    optional=True,
                    tooltip="What is in the picture, from 'Semantic Encode' or 'Text Steering'. Optional; not every "
                    "network uses it.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    id="conditioning", display_name="conditioning", tooltip="For positive and for negative."
                ),
                io.Latent.Output(
                    id="latent", display_name="latent", tooltip="For latent_image: the picture enlarged bicubically."
                ),
            ],
        )

    @classmethod
    def execute(cls, model: Any, image: Tensor, semantic: Tensor | None = None, **target: Any) -> io.NodeOutput:
        network = host.network_of(model)
        config = network.config
        size = result_size(image, **target)
        colours, alpha = colours_and_alpha(image.permute(0, 3, 1, 2).float())
        x = colours * 2 - 1
        # One pass multiplies by the network's factor: for more, the picture is enlarged a little before.
        least = (math.ceil(size[0] / config.scale), math.ceil(size[1] / config.scale))
        if least[0] > x.shape[2] or least[1] > x.shape[3]:
            x = resize(x, (max(least[0], x.shape[2]), max(least[1], x.shape[3]))).clamp(-1, 1)
        large = pass_size((x.shape[2], x.shape[3]), config.scale)
        semantic = usable_semantic(semantic, network, len(image))
        entries = {host.LOW_RES: x} | ({} if semantic is None else {host.SEMANTIC: semantic})
        # The host's nodes for CONDITIONING want a tensor of text tokens; the network has none.
        conditioning = [[torch.zeros(len(image), 1, 1), entries]]
        samples = resize(x, large).clamp_(-1, 1)
        latent = {"samples": host.on_result_device(samples), RESULT: {"size": size, "alpha": alpha}}
        return io.NodeOutput(conditioning, latent)


class InfDiTToImage(io.ComfyNode):
    """What a sampler made of the LATENT, as IMAGE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InfDiTToImage",
            display_name="Inf-DiT to Image",
            category="image/upscaling/Inf-DiT",
            description="Turns the latent of an Inf-DiT sampler into pictures: resized to the size asked for, "
            "transparency restored. In place of a VAE.",
            inputs=[
                io.Latent.Input("samples", tooltip="From a sampler that got the latent of 'Inf-DiT Conditioning'.")
            ],
            outputs=[io.Image.Output(id="image", display_name="image", tooltip="The enlarged pictures.")],
        )

    @classmethod
    def execute(cls, samples: dict[str, Any]) -> io.NodeOutput:
        x = samples["samples"]
        if x.ndim != 4 or x.shape[1] != 3:
            raise ValueError(
                f"The latent has shape {tuple(x.shape)}, so it is no picture of Inf-DiT (three channels); for the "
                "latents of other models use 'VAE Decode'."
            )
        result = samples.get(RESULT)
        x = x.float()
        if result is not None:
            size = result["size"]
            x = x if tuple(x.shape[2:]) == size else resize(x, size)
        x = x.clamp(-1, 1).add(1).div(2)
        if result is not None and result["alpha"] is not None:
            alpha = resize(result["alpha"].to(x.device), result["size"]).clamp(0, 1)
            x = torch.cat([x, alpha.repeat(math.ceil(len(x) / len(alpha)), 1, 1, 1)[: len(x)]], dim=1)
        return io.NodeOutput(host.on_result_device(x.permute(0, 2, 3, 1)))
