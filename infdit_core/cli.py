"""infdit upscale | info | convert | bench | eval | train"""

import argparse
import json
import logging
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from . import __version__, train
from .evaluation import TileSize
from .images import (
    READABLE,
    Picture,
    PictureError,
    check_writable,
    colours_and_alpha,
    read_picture,
    resize,
    write_picture,
)
from .infdit import InfDiT
from .infdit.checkpoint import convert, describe, load_infdit
from .memory import out_of_memory, peak_memory, reset_peak_memory
from .semantics import VIEWS, Clip, Steering, download_clip, load_clip
from .upscale import UpscaleProgress, semantics_matter, target_size, upscale
from .weights import WeightsError, open_weights

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit status: 0 done, 1 something failed, 2 wrong usage, 130 interrupted."""
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except (PictureError, WeightsError, ValueError, OSError, MemoryError, ArithmeticError) as error:
        print(f"infdit: {error}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        print(f"infdit: {_said(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninfdit: interrupted; nothing half-written is left", file=sys.stderr)
        return 130


def _said(error: Exception) -> str:
    """What a user is told of it; raises what is no fault of theirs again."""
    if not isinstance(error, RuntimeError):
        return str(error)
    if not out_of_memory(error):
        raise error
    return f"out of memory; choose a smaller result or cut the picture ({error})"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="infdit", description="Enlarge pictures to any size with Inf-DiT.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    sub = command("upscale", _upscale, "enlarge pictures, or all pictures of folders")
    sub.add_argument("inputs", nargs="+", type=Path, metavar="IN", help="picture or folder")
    sub.add_argument("-o", "--output", required=True, type=Path, help="picture, or a folder for several")
    sub.add_argument("--scale", type=_number, help="factor (4 if no size is given)")
    sub.add_argument("--width", type=int, help="of the result, in pixels")
    sub.add_argument("--height", type=int, help="of the result, in pixels; alone, the other side follows the aspect")
    sub.add_argument("--model", default="default", help="weights file (the shipped default)")
    sub.add_argument("--preset", default="balanced", help="faithful, balanced or detailed (balanced)")
    sub.add_argument(
        "--steps", type=int, help="sampler steps instead of the preset's; 0: the predictor's picture, if any"
    )
    sub.add_argument("--start", type=_number, metavar="SIGMA", help="noise to start from instead of the preset's")
    sub.add_argument("--detail", type=float, metavar="SHARE", help="of the detailer, 0 to 1, instead of the preset's")
    sub.add_argument("--sampler", help="heun, euler, ddim or dpmpp_2m instead of the preset's")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--tile", type=_tile, default="auto", help="auto, whole, or N for NxN blocks a step (auto)")
    sub.add_argument("--colour", default="none", choices=["none", "wavelet", "mean"], help="transfer from the input")
    _semantic_options(sub)
    sub.add_argument("--overwrite", action="store_true", help="replace files that exist")
    _device_options(sub)

    sub = command("info", _info, "say what a weights file is")
    sub.add_argument("file", type=Path)

    sub = command("convert", _convert, "write a weights file as safetensors")
    sub.add_argument("source", type=Path, metavar="IN")
    sub.add_argument("target", type=Path, metavar="OUT")
    sub.add_argument("--dtype", choices=sorted(_DTYPES), help="of the network's tensors (as they are)")
    sub.add_argument("--clip", type=Path, metavar="FILE", help="split the CLIP tower off into this file")
    sub.add_argument("--drop-clip", action="store_true", help="leave the CLIP tower out")
    sub.add_argument("--lora", type=Path, metavar="FILE", help="merge this LoRA into the network")
    sub.add_argument("--overwrite", action="store_true", help="replace files that exist")

    sub = command("bench", _bench, "time one evaluation of a random-weight network, whole and streamed")
    sub.add_argument("--network", default="medium", choices=["nano", "medium", "published"])
    sub.add_argument("--size", nargs="+", type=_size, default=[(1024, 1024)], metavar="WxH")
    sub.add_argument("--tile", nargs="+", type=_tile, default=[None, 1], help="whole, or N for NxN blocks a step")
    sub.add_argument("--rounds", type=int, default=3)
    sub.add_argument("--threads", type=int, default=0, help="on the CPU (all)")
    sub.add_argument("--json", action="store_true")
    _device_options(sub)

    sub = command("eval", _eval, "compare pictures with their originals: PSNR-Y, SSIM, LPIPS, seam energy")
    sub.add_argument("--original", required=True, type=Path, metavar="DIR")
    what = sub.add_mutually_exclusive_group(required=True)
    what.add_argument("--upscaled", type=Path, metavar="DIR", help="pictures of the same names")
    what.add_argument(
        "--semantics",
        action="store_true",
        help="reduce the originals, and enlarge them without CLIP, with it, and steered by the prompts",
    )
    sub.add_argument("--model", default="default", help="for --semantics: weights file (the shipped default)")
    sub.add_argument("--preset", default="balanced", help="for --semantics (balanced)")
    _semantic_options(sub)
    _device_options(sub)
    sub.add_argument("--lpips", type=Path, metavar="FILE", help="LPIPS weights, of AlexNet or VGG16; without, no LPIPS")
    text = "pixels of a block's side, for the seam energy of x4 results (32, the default weights')"
    sub.add_argument("--block", type=int, default=32, help=text)
    sub.add_argument("--grids", type=int, choices=(1, 2), default=2, help="of blocks (2, the default weights')")
    sub.add_argument("--json", action="store_true")

    sub = command("train", _train, "train on folders of pictures")
    sub.add_argument("arguments", nargs="+", metavar="CONFIG|key=value", help="nano, infdit or a YAML file; settings")
    sub.add_argument("--debug", action="store_true", help="into the debugger at an error")
    return parser


def _device_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (auto)")
    parser.add_argument("--dtype", default="auto", choices=["auto", *_DTYPES], help="auto: bfloat16 on CUDA")


def _semantic_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--clip",
        metavar="FILE",
        help="CLIP weights to see the picture with: a file of open_clip, 'model' for those inside the --model file, "
        "or 'download'",
    )
    parser.add_argument("--view", default="centre", choices=VIEWS, help="what CLIP sees of a picture (centre)")
    parser.add_argument("--prompt", default="", metavar="TEXT", help="steer towards: phrase | (another:1.5)")
    parser.add_argument("--negative", default="", metavar="TEXT", help="steer away from")
    parser.add_argument("--strength", type=float, default=2.0, help="of the steering, 0 is none (2)")


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _tile(text: str) -> TileSize:
    if text in ("auto", "whole"):
        return "auto" if text == "auto" else None
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not auto, whole or a number of blocks")
    return int(text)


def _size(text: str) -> tuple[int, int]:
    width, cross, height = text.partition("x")
    if not (cross and width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text} is not WIDTHxHEIGHT, like 1024x768")
    return int(width), int(height)


def _device(options: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    name = options.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device {name!r} is not known: use auto, cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("no CUDA device is usable here; use --device cpu")
    if options.dtype == "auto":
        return device, torch.bfloat16 if device.type == "cuda" else torch.float32
    return device, _DTYPES[options.dtype]


# --- upscale


def _upscale(options: argparse.Namespace) -> int:
    jobs = _jobs(options.inputs, options.output)
    if options.scale is not None and (options.width or options.height):
        raise ValueError("give either --scale, or --width and --height")
    device, dtype = _device(options)
    model = load_infdit(None if options.model == "default" else options.model, device, dtype)
    semantics = _Semantics(options, model)
    failed = 0
    for source, target in jobs:
        try:
            check_writable(target, overwrite=options.overwrite)
            picture = read_picture(source)
            _upscale_one(source, picture, target, model, semantics, device, options)
        except (PictureError, ValueError, MemoryError, RuntimeError) as error:
            said = _said(error)
            print(f"infdit: {source}: {said}" if str(source) not in said else f"infdit: {said}", file=sys.stderr)
            failed += 1
    if failed and len(jobs) > 1:
        print(f"infdit: {failed} of {len(jobs)} pictures failed", file=sys.stderr)
    return 1 if failed else 0


def _upscale_one(
    source: Path,
    picture: Picture,
    target: Path,
    model: InfDiT,
    semantics: "_Semantics",
    device: torch.device,
    options: argparse.Namespace,
) -> None:
    height, width = picture.pixels.shape[:2]
    sized = options.width is not None or options.height is not None
    size = target_size(
        height,
        width,
        scale=None if sized else options.scale or 4.0,
        size=(options.height, options.width) if sized else None,
    )
    check_writable(target, size, picture.pixels.shape[2], overwrite=options.overwrite)
    reset_peak_memory(device)
    started = time.monotonic()
    pixels = upscale(
        picture.pixels[None],
        model=model,
        size=size,
        preset=options.preset,
        steps=options.steps,
        start=options.start,
        detail=options.detail,
        sampler=options.sampler,
        seed=options.seed,
        tile=options.tile,
        colour=options.colour,
        semantic=semantics.steered(semantics.seen(_colours(picture))),
        on_progress=_ProgressLine(source.name),
    )
    write_picture(target, picture._replace(pixels=pixels[0]), overwrite=options.overwrite)
    seconds, peak = time.monotonic() - started, peak_memory(device) / 2**20
    where = "GPU" if device.type == "cuda" else "process"
    print(
        f"{target}: {width} x {height} -> {size[1]} x {size[0]}, {seconds:.1f} s, peak memory {peak:.0f} MiB ({where})"
    )


class _Semantics:
    """What CLIP sees, and where prompts steer it, if --clip is there. On the CPU, for it runs once a picture."""

    clip: Clip | None = None
    steering: Steering | None = None

    def __init__(self, options: argparse.Namespace, model: InfDiT) -> None:
        wanted = options.clip is not None or options.prompt or options.negative
        if not wanted or not semantics_matter(model):
            return
        path, self.view = options.clip, options.view
        if path is None:
            raise ValueError("prompts steer what CLIP sees: say --clip FILE, or --clip download")
        if path in ("model", "download"):
            path = options.model if path == "model" else download_clip()
        self.clip = load_clip(path)
        if self.clip.size != model.config.semantic_size:
            raise ValueError(
                f"{path} gives vectors of {self.clip.size} numbers, and this network takes "
                f"{model.config.semantic_size}: use the CLIP that it was trained with"
            )
        if options.prompt or options.negative:
            self.steering = Steering(self.clip, options.prompt, options.negative, options.strength)

    def seen(self, x: Tensor) -> Tensor | None:
        """x: (1, 3, H, W) in 0..1."""
        return None if self.clip is None else self.clip.encode_image(x * 2 - 1, self.view)

    def steered(self, vector: Tensor | None) -> Tensor | None:
        return vector if self.steering is None or vector is None else self.steering(vector)


class _ProgressLine:
    """Progress with time left, on a terminal in one line, elsewhere every ten seconds."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.started, self.shown = time.monotonic(), -math.inf

    def __call__(self, progress: UpscaleProgress) -> None:
        now = time.monotonic()
        live = sys.stderr.isatty()
        done = progress.fraction >= 1
        if now - self.shown >= (0.2 if live else 10) or (done and live):
            left = (now - self.started) * (1 / progress.fraction - 1)
            line = f"{self.name}: {progress.fraction:4.0%}, {left:.0f} s left"
            print(
                f"\r{line:<70}" if live else line,
                end="\r" if live and done else "" if live else "\n",
                file=sys.stderr,
                flush=True,
            )
            self.shown = now


def _jobs(inputs: list[Path], output: Path) -> list[tuple[Path, Path]]:
    """(input, output) of every picture; folders give all pictures in them, as PNG."""
    sources: list[Path] = []
    for path in inputs:
        if path.is_dir():
            found = sorted(p for p in path.iterdir() if p.suffix.lower() in READABLE)
            if not found:
                raise PictureError(f"folder {path} holds no picture ({', '.join(READABLE)})")
            sources += found
        else:
            sources.append(path)
    if len(sources) == 1 and not inputs[0].is_dir() and not output.is_dir() and output.suffix:
        return [(sources[0], output)]
    if output.exists() and not output.is_dir():
        raise PictureError(f"{output} is a file; give a folder for several pictures")
    output.mkdir(parents=True, exist_ok=True)
    jobs = [(source, output / f"{source.stem}.png") for source in sources]
    taken: dict[Path, Path] = {}
    for source, target in jobs:
        if target in taken:
            raise PictureError(f"{taken[target]} and {source} would both become {target}; run them apart")
        taken[target] = source
    return jobs


# --- weights files


def _info(options: argparse.Namespace) -> int:
    for name, value in describe(open_weights(options.file)).items():
        print(f"{name}: {value}")
    return 0


def _convert(options: argparse.Namespace) -> int:
    for path in (options.target, options.clip):
        if path is not None and path.exists() and not options.overwrite:
            raise WeightsError(f"{path} exists; nothing was written. Choose another name, or allow it with --overwrite")
    if options.clip is not None and options.clip.resolve() in (options.source.resolve(), options.target.resolve()):
        raise WeightsError(f"{options.clip} can't hold the CLIP tower and the network; choose another name")
    if options.source.exists() and options.target.exists() and options.source.samefile(options.target):
        raise WeightsError(f"{options.source} can't be converted onto itself; choose another name")
    outputs = [path.resolve() for path in (options.target, options.clip) if path is not None]
    if options.lora is not None and options.lora.resolve() in outputs:
        raise WeightsError(f"{options.lora} can't hold the LoRA and the result; choose another name")
    dtype = _DTYPES[options.dtype] if options.dtype else None
    convert(
        options.source,
        options.target,
        dtype=dtype,
        clip=options.clip,
        drop_clip=options.drop_clip,
        lora=options.lora,
    )
    print(f"{options.target}: {options.target.stat().st_size / 2**20:.1f} MiB")
    return 0


# --- measuring


def _bench(options: argparse.Namespace) -> int:
    from . import bench

    device, dtype = _device(options)
    if options.threads:
        torch.set_num_threads(options.threads)
    block = bench.NETWORKS[options.network].block_size
    cases = []
    for width, height in options.size:
        if width < block or height < block or width % block or height % block:
            raise ValueError(f"size {width}x{height}: sides must be multiples of the block, {block}")
        for tile in options.tile:
            if tile == "auto":
                raise ValueError("bench takes --tile whole or a number of blocks")
            cases.append(bench.Case(width, height, None if tile is None else (tile, tile)))
    results = bench.run(options.network, cases, device=device, dtype=dtype, rounds=options.rounds)
    if options.json:
        rows = [result._asdict() | {"case": result.case._asdict()} for result in results]
        print(
            json.dumps(
                {"network": options.network, "device": str(device), "dtype": str(dtype), "results": rows}, indent=1
            )
        )
        return 0
    print(f"{options.network}, {device}, {dtype}, one evaluation, median of {options.rounds}")
    print(f"{'size':>12} {'tile':>6} {'s':>8} {'TFLOP':>8} {'of matmul':>10} {'extra MiB':>10} {'of it pictures':>15}")
    for r in results:
        tile = "whole" if r.case.tile is None else "x".join(map(str, r.case.tile))
        print(
            f"{r.case.width:>6}x{r.case.height:<5} {tile:>6} {r.seconds:8.2f} {r.flops / 1e12:8.2f} "
            f"{r.share_of_matmul:10.2f} {r.peak_bytes / 2**20:10.0f} {r.picture_bytes / 2**20:15.0f}"
        )
    print(f"matmul: {results[0].matmul_flops_per_second / 1e12:.3f} TFLOP/s")
    return 0


def _eval(options: argparse.Namespace) -> int:
    measure = _measure(options)
    if options.semantics:
        rows = _with_and_without(options, list(_by_stem(options.original).values()), measure)
    else:
        rows = {}
        upscaled = _by_stem(options.upscaled)
        for stem, path in _by_stem(options.original).items():
            if stem not in upscaled:
                print(f"infdit: {options.upscaled} has no {stem}", file=sys.stderr)
                continue
            x, original = (_colours(read_picture(p)) for p in (upscaled[stem], path))
            if x.shape != original.shape:
                sides = [f"{t.shape[3]} x {t.shape[2]}" for t in (x, original)]
                raise PictureError(f"{upscaled[stem]} is {sides[0]}, its original {sides[1]}")
            try:
                rows[stem] = measure(x, original)
            except ValueError as error:
                raise PictureError(f"{path}: {error}") from error
        if not rows:
            raise PictureError(f"{options.original} and {options.upscaled} have no picture in common")
    means = {name: sum(row[name] for row in rows.values()) / len(rows) for name in next(iter(rows.values()))}
    if options.json:

        def known(row: dict[str, float]) -> dict[str, float | None]:
            return {name: value if math.isfinite(value) else None for name, value in row.items()}  # not Infinity

        print(
            json.dumps({"mean": known(means), "pictures": {name: known(row) for name, row in rows.items()}}, indent=1)
        )
        return 0
    width = max(12, *(len(name) + 2 for name in means))
    print(f"{'picture':<32}" + "".join(f"{name:>{width}}" for name in means))
    for picture, row in [*rows.items(), ("mean", means)]:
        print(f"{picture:<32}" + "".join(f"{value:{width}.4f}" for value in row.values()))
    return 0


def _by_stem(folder: Path) -> dict[str, Path]:
    """The pictures of a folder, in order of name; refuses two that differ in their suffix alone."""
    pictures: dict[str, Path] = {}
    for path in sorted(p for p in folder.iterdir() if p.suffix.lower() in READABLE):
        if path.stem in pictures:
            raise PictureError(f"{pictures[path.stem]} and {path} can't be told apart; move one of them away")
        pictures[path.stem] = path
    return pictures


_Measurer = Callable[[Tensor, Tensor], dict[str, float]]  # of two (1, 3, H, W) in 0..1, the second the original


def _measure(options: argparse.Namespace) -> _Measurer:
    from .evaluation import grids
    from .infdit.config import InfDiTConfig
    from .metrics import load_lpips, psnr_y, seam_energy, ssim_y

    befores = grids(InfDiTConfig(block_size=options.block, grids=options.grids))
    lpips = load_lpips(options.lpips) if options.lpips else None

    def measure(x: Tensor, original: Tensor) -> dict[str, float]:
        return {
            "psnr_y": psnr_y(x, original),
            "ssim_y": ssim_y(x, original),
            **({"lpips": float(lpips(x, original))} if lpips else {}),
            "seam_energy": seam_energy(x, options.block, befores),
        }

    return measure


def _with_and_without(
    options: argparse.Namespace, originals: Sequence[Path], measure: _Measurer
) -> dict[str, dict[str, float]]:
    """Figures of every picture, reduced and enlarged without CLIP, with it, and steered; names are put before."""
    if options.clip is None:
        raise ValueError("--semantics needs CLIP weights: say --clip FILE, or --clip download")
    if not originals:
        raise PictureError(f"{options.original} holds no picture ({', '.join(READABLE)})")
    device, dtype = _device(options)
    model = load_infdit(None if options.model == "default" else options.model, device, dtype)
    if not model.uses_semantics:
        raise ValueError(f"the {options.model} weights were trained without semantics, so there is nothing to compare")
    semantics, scale = _Semantics(options, model), model.config.scale
    rows: dict[str, dict[str, float]] = {}
    for path in originals:
        original = _colours(read_picture(path))
        height, width = (side - side % scale for side in original.shape[2:])
        if 0 in (height, width):
            raise PictureError(f"{path} is smaller than {scale} pixels")
        original = original[:, :, :height, :width]
        small = ((resize(original, (height // scale, width // scale)) * 255).round() / 255).clamp(0, 1)
        seen = semantics.seen(small)
        vectors = {"without": None, "with": seen}
        if semantics.steering is not None:
            vectors["steered"] = semantics.steered(seen)
        rows[path.stem] = {}
        for name, vector in vectors.items():
            line = _ProgressLine(f"{path.stem}, {name}")
            x = upscale(
                small.movedim(1, -1), model=model, scale=scale, preset=options.preset, semantic=vector, on_progress=line
            )
            rows[path.stem] |= {f"{name}_{key}": v for key, v in measure(x.movedim(-1, 1), original).items()}
    return rows


def _colours(picture: Picture) -> Tensor:
    """(1, 3, H, W): without alpha, grey in all three."""
    return colours_and_alpha(picture.pixels.permute(2, 0, 1)[None])[0]


def _train(options: argparse.Namespace) -> int:
    return train.main([*options.arguments, *(["--debug"] if options.debug else [])])
