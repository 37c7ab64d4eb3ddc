"""The streaming path: pictures of any size, block by block."""

from functools import lru_cache
from typing import Any

from comfy_api.latest import io
from torch import Tensor

from . import host
from .semantics import Semantic
from .target import result_size, target_inputs

PRESETS = ["faithful", "balanced", "detailed"]
COLOURS = ["none", "wavelet", "mean"]


@lru_cache(maxsize=1)
def _default_model() -> Any:
    return host.load_model(None, "auto")


class Upscale(io.ComfyNode):
    """One node for everyone."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InfDiTUpscale",
            display_name="Upscale (Inf-DiT)",
            category="image/upscaling/Inf-DiT",
            description="Enlarges pictures of any size with the network that ships with this pack: nothing to "
            "download. For other networks and more control: 'Inf-DiT Upscale (tiled)'.",
            inputs=[
                io.Image.Input(
                    "image", tooltip="One or more pictures of any size; transparency is enlarged along with them."
                ),
                io.Float.Input(
                    "scale",
                    default=4.0,
                    min=0.05,
                    max=100.0,
                    step=0.05,
                    tooltip="How many times wider and higher, any number; 1 or less only resizes.",
                ),
                io.Combo.Input(
                    "preset",
                    options=PRESETS,
                    default="balanced",
                    tooltip="faithful: closest to the original on average, soft. balanced: sharper. detailed: "
                    "sharpest, makes up most.",
                ),
            ],
            outputs=[io.Image.Output(id="upscaled", display_name="image", tooltip="The enlarged pictures.")],
        )

    @classmethod
    def execute(cls, image: Tensor, scale: float, preset: str) -> io.NodeOutput:
        size = result_size(image, "scale", scale, 0, 0)
        # No seed to choose: the default weights' presets add no noise.
        return io.NodeOutput(host.upscale(_default_model(), image, size, seed=0, preset=preset))


class UpscaleTiled(io.ComfyNode):
    """The same with every choice."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InfDiTUpscaleTiled",
            display_name="Inf-DiT Upscale (tiled)",
            category="image/upscaling/Inf-DiT",
            description="Enlarges pictures to any size, tile by tile; the result is the same as in one piece. On the "
            "graphics card the memory needed grows with the shorter side only.",
            inputs=[
                io.Model.Input("model", tooltip="From 'Load Inf-DiT'."),
                io.Image.Input(
                    "image", tooltip="One or more pictures of any size; transparency is enlarged along with them."
                ),
                *target_inputs(),
                io.Combo.Input(
                    "preset",
                    options=PRESETS,
                    default="balanced",
                    tooltip="Share of detail, steps and starting noise as the weights define them; connected sigmas "
                    "replace the preset.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**64 - 1,
                    control_after_generate=True,
                    tooltip="Another seed makes up other detail where noise is added; the default weights' presets add "
                    "none.",
                ),
                io.Int.Input(
                    "tile",
                    default=0,
                    min=0,
                    max=1024,
                    tooltip="Blocks at once along each side; 0 chooses by free memory. Changes memory and time, never "
                    "the result.",
                ),
                io.Combo.Input(
                    "colour",
                    options=COLOURS,
                    default="none",
                    tooltip="For networks that shift colours. wavelet: take large areas' colours from the input; mean: "
                    "the mean and contrast of each channel.",
                ),
                io.Sampler.Input(
                    "sampler",
                    optional=True,
                    tooltip="Any SAMPLER instead of the preset's, such as 'EDM Heun Sampler'. The default weights' "
                    "presets don't sample: connect sigmas too.",
                ),
                io.Sigmas.Input(
                    "sigmas",
                    optional=True,
                    tooltip="Noise levels instead of the preset's, such as those of 'EDM Schedule'.",
                ),
                Semantic.Input(
                    "semantic",
                    optional=True,
                    tooltip="What is in the picture, from 'Semantic Encode' or 'Text Steering'. Optional; not every "
                    "network uses it.",
                ),
            ],
            outputs=[io.Image.Output(id="upscaled", display_name="image", tooltip="The enlarged pictures.")],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        image: Tensor,
        preset: str,
        seed: int,
        tile: int,
        colour: str,
        sampler: Any = None,
        sigmas: Tensor | None = None,
        semantic: Tensor | None = None,
        **target: Any,
    ) -> io.NodeOutput:
        host.network_of(model)
        size = result_size(image, **target)
        settings = {"preset": preset, "colour": colour, "sigmas": sigmas, "semantic": semantic}
        return io.NodeOutput(host.upscale(model, image, size, seed=seed, sampler=sampler, tile=tile, **settings))
