"""Load Inf-DiT."""

from comfy_api.latest import io

from . import host


class LoadInfDiT(io.ComfyNode):
    """A file of models/infdit, or the shipped default, as MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InfDiTLoader",
            display_name="Load Inf-DiT",
            category="image/upscaling/Inf-DiT",
            description="Loads an Inf-DiT upscaling network: the small one that ships with this pack, or a file "
            "(.safetensors, or the published .pt) that you put into models/infdit.",
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=host.model_names(),
                    default=host.SHIPPED,
                    tooltip="The shipped network needs no download. For others put the file into models/infdit and "
                    "press R.",
                ),
                io.Combo.Input(
                    "precision",
                    options=list(host.PRECISIONS),
                    default="auto",
                    tooltip="auto suits your device. bf16 halves memory; fp16 does too and may overflow in networks "
                    "trained in bf16; fp32 is exact; fp8 halves the weights' memory again and loses a little.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    id="model", display_name="model", tooltip="For the Inf-DiT nodes and the samplers of ComfyUI."
                )
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, model_name: str | None, precision: str | None) -> str:
        return host.fingerprint(host.model_path, model_name)  # the host compares the precision itself

    @classmethod
    def validate_inputs(cls, model_name: str | None) -> bool | str:
        return host.is_there(host.model_path, model_name)

    @classmethod
    def execute(cls, model_name: str, precision: str) -> io.NodeOutput:
        return io.NodeOutput(host.load_model(host.model_path(model_name), precision))
