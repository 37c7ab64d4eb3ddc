"""Weights files: open them safely, write them atomically, find the shipped ones.

What a file's tensors mean is known to the networks (`infdit/checkpoint.py` and its siblings), not here.
"""

import json
import os
import pickle
import re
import struct
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

DEFAULT_WEIGHTS = Path(__file__).parent / "default_weights"

_SAFETENSORS_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


# numpy's random state stands beside the weights in a checkpoint out of a training run: plain numbers.
_RECONSTRUCT = np.empty(0).__reduce__()[0]
_RANDOM_STATE: list[Any] = [
    (_RECONSTRUCT, "numpy.core.multiarray._reconstruct"),  # numpy 1's name
    (_RECONSTRUCT, "numpy._core.multiarray._reconstruct"),
    np.ndarray,
    np.dtype,
    type(np.dtype(np.uint32)),
]


class WeightsError(ValueError):
    """A weights file that can't be used; the message says what was found and what to do."""


class WeightsFile(NamedTuple):
    """An opened file: tensors are read when asked for, none before."""

    path: Path
    format: str
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype]
    metadata: Mapping[str, str]
    read: Callable[[str], Tensor]


def open_weights(path: str | os.PathLike[str]) -> WeightsFile:
    """Open a .safetensors file, or a PyTorch one (.pt, .pth, .bin, .ckpt), memory-mapped.

    PyTorch files are read with weights_only=True, so nothing in them is executed; tensors are taken from the
    entry "module" (DeepSpeed), "state_dict" or "model" where there is one. Raises WeightsError.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "doesn't exist"
        raise WeightsError(f"weights file {path} {what}; give the path of a .safetensors or .pt file")
    if path.stat().st_size == 0:
        raise WeightsError(f"weights file {path} is empty; was its download cut short?")
    with path.open("rb") as file:
        start = file.read(9)
    # A safetensors file starts with the length of its header, which is JSON.
    return _open_safetensors(path) if start[8:9] == b"{" else _open_torch(path)


def _open_safetensors(path: Path) -> WeightsFile:
    try:
        file = safe_open(path, framework="pt")
        names = list(file.keys())
        slices = {name: file.get_slice(name) for name in names}
        shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
        known = {code: dtype for dtype, code in _SAFETENSORS_NAMES.items()}
        dtypes = {name: known[part.get_dtype()] for name, part in slices.items()}
        return WeightsFile(path, "safetensors", shapes, dtypes, file.metadata() or {}, file.get_tensor)
    except (SafetensorError, OSError, KeyError) as error:
        raise WeightsError(
            f"{path} looks like a safetensors file but can't be read ({error}); it may be cut short"
        ) from error


def _open_torch(path: Path) -> WeightsFile:
    try:
        with torch.serialization.safe_globals(_RANDOM_STATE):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        # torch's own message advises to load the file without this check.
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it holds {found[1]}, which is no tensor" if found else "it is no PyTorch file, or a damaged one"
        raise WeightsError(
            f"{path} was refused, and nothing in it was executed: {what}. "
            "Get the file from its publisher, as .safetensors where there is one"
        ) from error
    except Exception as error:  # torch's reader answers a damaged file with nearly any of them
        raise WeightsError(
            f"{path} can't be read as PyTorch weights ({error}); it is cut short or of another kind"
        ) from error
    for entry in ("module", "state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(entry), dict):
            content = content[entry]
            break
    tensors: dict[str, Tensor] = {}
    if isinstance(content, dict):
        tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise WeightsError(f"{path} holds no tensors at its top level, nor under module, state_dict or model")
    return WeightsFile(
        path,
        "PyTorch",
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
        {name: tensor.dtype for name, tensor in tensors.items()},
        {},
        tensors.__getitem__,
    )


def write_atomically(path: str | os.PathLike[str], write: Callable[[Any], None]) -> None:
    """Call write(binary file) on a temporary file beside `path`, then rename it: `path` is whole or untouched."""
    path = Path(path)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".infdit-", suffix=".part")
    try:
        with os.fdopen(descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        Path(temporary).chmod(0o666 & ~umask)  # mkstemp's own mode lets nobody else read
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def save_weights(
    path: str | os.PathLike[str],
    layout: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    tensors: Iterable[Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file tensor by tensor, so that at most one is in memory, and rename it into place.

    layout: shape and dtype by name; tensors come in the same order. Raises OSError where it can't be written.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for name, (shape, dtype) in layout.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        header[name] = {
            "dtype": _SAFETENSORS_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [position, position + size],
        }
        position += size
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)

    def write(file: Any) -> None:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for (name, (shape, dtype)), tensor in zip(layout.items(), tensors, strict=True):
            if tuple(tensor.shape) != shape or tensor.dtype != dtype:
                raise ValueError(f"{name} is {tuple(tensor.shape)} {tensor.dtype}, announced as {shape} {dtype}")
            if tensor.numel():
                file.write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    write_atomically(path, write)
