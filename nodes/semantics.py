"""What CLIP sees in a picture, and steering it by text."""

from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..infdit_core.images import colours_and_alpha
from ..infdit_core.semantics import DESCRIPTION, VIEWS
from . import host
from .target import check_image

Clip = io.Custom("INFDIT_CLIP")  # host.HostClip
Semantic = io.Custom("INFDIT_SEMANTIC")  # (1 or B, semantic_size) unit vectors


class LoadClip(io.ComfyNode):
    """A CLIP of open_clip."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InfDiTLoadCLIP",
            display_name="Load CLIP (Inf-DiT)",
            category="image/upscaling/Inf-DiT",
            description="Loads the CLIP that tells Inf-DiT what is in a picture: ViT-L-14 datacomp_xl_s13b_b90k of "
            "open_clip, whole or just the image tower inside the published Inf-DiT file. The CLIPs of checkpoints and "
            "of CLIP Vision are other ones. The network that ships with this pack doesn't use any.",
            inputs=[
                io.Combo.Input(
                    "clip_name",
                    options=host.clip_names(),
                    default=host.NO_CLIP,
                    tooltip="Files of models/infdit and models/clip_vision: open_clip's, or the published Inf-DiT file "
                    "(no text then). The last entry fetches 1.7 GB once, with its progress in the console.",
                )
            ],
            outputs=[Clip.Output(id="clip", display_name="clip", tooltip="For 'Semantic Encode' and 'Text Steering'.")],
        )

    @classmethod
    def fingerprint_inputs(cls, clip_name: str | None) -> str:
        return host.fingerprint(host.clip_path, clip_name, DESCRIPTION)

    @classmethod
    def validate_inputs(cls, clip_name: str | None) -> bool | str:
        return host.is_there(host.clip_path, clip_name)

    @classmethod
    def execute(cls, clip_name: str) -> io.NodeOutput:
        return io.NodeOutput(host.load_clip(host.clip_path(clip_name)))


class SemanticEncode(io.ComfyNode):
    """A picture's CLIP vector."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InfDiTSemanticEncode",
            display_name="Semantic Encode",
            category="image/upscaling/Inf-DiT",
            description="Lets CLIP look at the picture before it is enlarged, so that Inf-DiT knows what is in it.",
            inputs=[
                io.Image.Input("image", tooltip="The picture that will be enlarged, or several of the same size."),
                io.Combo.Input(
                    "view",
                    options=list(VIEWS),
                    default="centre",
                    tooltip="CLIP sees squares. centre: the middle, as Inf-DiT was trained. squash: everything, "
                    "distorted. pad: everything, smaller. squares: the mean of overlapping squares along the picture.",
                ),
                Clip.Input("clip", optional=True, tooltip="From 'Load CLIP (Inf-DiT)'."),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="In place of clip, if it computes with GELU, which ViT-L from 'Load CLIP Vision' doesn't.",
                ),
            ],
            outputs=[
                Semantic.Output(
                    id="semantic", display_name="semantic", tooltip="For the upscaler, or for 'Text Steering' before."
                )
            ],
        )

    @classmethod
    def execute(cls, image: Tensor, view: str, clip: Any = None, clip_vision: Any = None) -> io.NodeOutput:
        check_image(image)
        if (clip is None) == (clip_vision is None):
            raise ValueError("Connect either clip, from 'Load CLIP (Inf-DiT)', or clip_vision.")
        x = colours_and_alpha(image.movedim(-1, 1).float())[0] * 2 - 1
        vectors = host.encode_image(clip, x, view) if clip is not None else host.vision_vectors(clip_vision, x, view)
        return io.NodeOutput(vectors)


class TextSteering(io.ComfyNode):
    """Moves a picture's vector towards one text and away from another."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InfDiTTextSteering",
            display_name="Text Steering",
            category="image/upscaling/Inf-DiT",
            description="Pushes what CLIP sees towards one text and away from another. The node shows how similar the "
            "picture is to both, before and after.",
            inputs=[
                Semantic.Input("semantic", tooltip="From 'Semantic Encode', with the same CLIP."),
                Clip.Input("clip", tooltip="From 'Load CLIP (Inf-DiT)': it needs the text tower."),
                io.String.Input(
                    "positive",
                    default="HD, high resolution, clear.",
                    multiline=True,
                    tooltip="What the result should be like. Phrases are kept apart by | or a new line; (phrase:1.5) "
                    "counts more. Empty doesn't count.",
                ),
                io.String.Input(
                    "negative",
                    default="noisy,blurry,low resolution.",
                    multiline=True,
                    tooltip="What the result should not be like, written in the same way.",
                ),
                io.Float.Input(
                    "strength",
                    default=2.0,
                    min=0.0,
                    max=10.0,
                    step=0.1,
                    tooltip="How far to push; 0 leaves the picture's vector as it is.",
                ),
            ],
            outputs=[Semantic.Output(id="steered", display_name="semantic", tooltip="For the upscaler.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, semantic: Tensor, clip: Any, positive: str, negative: str, strength: float) -> io.NodeOutput:
        steered, report = host.steer(clip, semantic, positive, negative, strength)
        host.show_text(report, cls.hidden and cls.hidden.unique_id)
        return io.NodeOutput(steered)
