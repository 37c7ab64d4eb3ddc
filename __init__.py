"""The pack's door for the host, ComfyUI: registers the model folder, hands out the nodes, says where the help is."""

from .nodes import comfy_entrypoint
from .nodes.host import register_model_folder

WEB_DIRECTORY = "./web"

register_model_folder()  # at import: the host never calls the extension's on_load

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
