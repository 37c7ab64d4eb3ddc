"""What several test files share."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from infdit_core.infdit import InfDiT, InfDiTConfig, load_infdit

GOLDEN = Path(__file__).parent / "golden" / "infdit"

# Everything here is small: a second thread gains nothing, and on a busy machine waiting for it takes most of the time.
torch.set_num_threads(1)

Golden = dict[str, Tensor]
CloseTo = Callable[..., None]


@lru_cache
def _load_golden(name: str) -> Golden:
    # Inputs were stored as float16 and positions as int16 where that loses nothing.
    wide = {torch.float16: torch.float32, torch.int16: torch.int64}
    return {key: t.to(wide.get(t.dtype, t.dtype)) for key, t in load_file(GOLDEN / f"{name}.safetensors").items()}


@pytest.fixture(scope="session")
def golden_folder() -> Path:
    """Where the reference's inputs and outputs are."""
    return GOLDEN


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Golden]:
    """The reference's tensors by name of the file; not to be written to."""
    return _load_golden


@pytest.fixture(scope="session")
def golden_model() -> InfDiT:
    """The network with the reference's random weights, loaded from a file in the published layout."""
    return load_infdit(GOLDEN / "weights.safetensors")


@pytest.fixture(scope="session")
def assert_close() -> CloseTo:
    """assert_close(found, expected, tolerance): the same shape, no element further away than that."""

    def check(found: Tensor, expected: Tensor, tolerance: float) -> None:
        assert found.shape == expected.shape
        distance = (found.double() - expected.double()).abs().max().item()
        assert distance <= tolerance, f"{distance:.3g} away, {tolerance:.3g} allowed"

    return check


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., InfDiT]:
    """tiny_model(seed, **hyper-parameters): a small network with random weights, none of them zero."""

    def make(seed: int = 0, **changes: object) -> InfDiT:
        settings = {"hidden_size": 16, "num_layers": 3, "num_heads": 2, "block_size": 16, "semantic_size": 8}
        model = InfDiT(InfDiTConfig(**(settings | changes)))  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=max(0.2, parameter[0].numel() ** -0.5), generator=generator)
            for module in model.modules():
                if isinstance(module, nn.LayerNorm):
                    module.weight.add_(1)
        return model.eval().requires_grad_(False)

    return make


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of four pictures, 112 x 96 px of waves and a little noise; not to be written to."""
    folder = tmp_path_factory.mktemp("photographs")
    random = np.random.default_rng(0)
    y, x = np.mgrid[:96, :112] / 96
    for number in range(4):
        pixels = np.full((96, 112, 3), 127.0)
        for _ in range(6):
            rows, columns, phase = random.normal(size=3) * 8
            wave = np.sin(2 * np.pi * (rows * y + columns * x) + phase)
            pixels += 35 * wave[..., None] * random.uniform(-1, 1, 3)
        pixels += random.normal(size=pixels.shape) * 3
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number}.png")
    return folder


def of_lpips(shapes: dict[int, tuple[int, int, int]], judged: Sequence[int]) -> dict[str, Tensor]:
    """Random weights in the layout of an LPIPS file. shapes: channels out, in, and side, by number."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for n, (out, into, side) in shapes.items():
        kernel = torch.randn(out, into, side, side, generator=generator)
        weights[f"features.{n}.weight"] = kernel * (2 / (into * side**2)) ** 0.5
        weights[f"features.{n}.bias"] = torch.zeros(out)
    for i, n in enumerate(judged):
        weights[f"lin{i}.model.1.weight"] = torch.rand(1, shapes[n][0], 1, 1, generator=generator)
    return weights


@pytest.fixture(scope="session")
def alexnet() -> dict[str, Tensor]:
    """Not to be changed, as the next."""
    shapes = {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)}
    return of_lpips(shapes, list(shapes))


@pytest.fixture(scope="session")
def vgg16() -> dict[str, Tensor]:
    numbers = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]
    channels = [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    shapes = {n: (channels[i + 1], channels[i], 3) for i, n in enumerate(numbers)}
    return of_lpips(shapes, [2, 7, 14, 21, 28])
