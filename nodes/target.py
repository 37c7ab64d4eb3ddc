"""How big the result should be: the inputs that several nodes share."""

from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..infdit_core.upscale import target_size

BY_SCALE, BY_SIZE, BY_LONGEST = "scale", "width and height", "longest side"
LONGEST = 131072


def target_inputs() -> list[io.Input]:
    """size_by chooses which of the others count."""
    return [
        io.Combo.Input(
            "size_by",
            options=[BY_SCALE, BY_SIZE, BY_LONGEST],
            default=BY_SCALE,
            tooltip="Which of the next four inputs say how big the result is.",
        ),
        io.Float.Input(
            "scale",
            default=4.0,
            min=0.05,
            max=100.0,
            step=0.05,
            tooltip="For size_by 'scale': how many times wider and higher, any number.",
        ),
        io.Int.Input(
            "width",
            default=0,
            min=0,
            max=LONGEST,
            tooltip="For size_by 'width and height': pixels; 0 follows the height and keeps the aspect.",
        ),
        io.Int.Input(
            "height",
            default=0,
            min=0,
            max=LONGEST,
            tooltip="For size_by 'width and height': pixels; 0 follows the width and keeps the aspect.",
        ),
        io.Int.Input(
            "longest_side",
            default=4096,
            min=1,
            max=LONGEST,
            tooltip="For size_by 'longest side': pixels of the longer side; the other one keeps the aspect.",
        ),
    ]


def check_image(image: Tensor) -> None:
    """Raise ValueError for what is no picture."""
    if image.ndim != 4 or 0 in image.shape or image.shape[3] > 4:
        raise ValueError(f"The image has shape {tuple(image.shape)}: it must be (pictures, height, width, 1 to 4).")
    if not image.isfinite().all():
        raise ValueError("The image holds values that are not numbers (NaN or infinite).")


def result_size(image: Tensor, size_by: str, scale: float, width: int, height: int, **sides: Any) -> tuple[int, int]:
    """(height, width) of the result. Raises ValueError."""
    check_image(image)
    was = (image.shape[1], image.shape[2])
    if size_by == BY_SCALE:
        return target_size(*was, scale=scale)
    if size_by == BY_SIZE:
        return target_size(*was, size=(height or None, width or None))
    if size_by == BY_LONGEST:
        longest = sides["longest_side"]
        return target_size(*was, size=(longest, None) if was[0] >= was[1] else (None, longest))
    raise ValueError(f"size_by is {size_by!r}: it must be {BY_SCALE!r}, {BY_SIZE!r} or {BY_LONGEST!r}.")
