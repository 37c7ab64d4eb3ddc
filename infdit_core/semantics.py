"""CLIP image vectors for Inf-DiT, and steering them by text (arXiv 2405.04312).

The towers are open_clip's, imported when the first one is loaded.
"""

import json
import logging
import math
import re
import ssl
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Event, Thread
from typing import Any, Literal, NamedTuple, get_args
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .images import resize
from .weights import WeightsError, WeightsFile, open_weights

log = logging.getLogger(__name__)

View = Literal["centre", "squash", "pad", "squares"]
VIEWS = get_args(View)
DESCRIPTION = "open_clip_config.json"  # beside the weights, where open_clip publishes them
# What the published Inf-DiT was trained with.
ARCHITECTURE, PRETRAINED = "ViT-L-14", "datacomp_xl_s13b_b90k"

# OpenAI's CLIP statistics, per channel, of pixels in 0..1.
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_DEVIATION = (0.26862954, 0.26130258, 0.27577711)
_MOST_SQUARES = 32
_LONGEST_TEXT = 5000  # characters: a tokenizer takes minutes for one endless word


# --- pictures


def preprocess(
    x: Tensor,
    side: int = 224,
    view: View = "centre",
    mean: Sequence[float] = _MEAN,
    deviation: Sequence[float] = _DEVIATION,
) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] -> CLIP's input (B, 3, side, side), for "squares" (n B, 3, side, side).

    Resizing is bicubic with antialiasing and not clamped. view: "centre", as Inf-DiT was trained, resizes the short
    side to `side` and crops the centre; "squash" resizes both sides; "pad" resizes the long side and fills up with
    the mean colour; "squares" takes n squares that overlap by half (at most 32, so less beyond 16:1), the first of all
    pictures first.
    Raises ValueError for other views.
    """
    x = (x + 1) / 2
    height, width = x.shape[2:]
    short, long = min(height, width), max(height, width)
    if view == "centre":
        # Of a line nobody needs the ends; as many pixels on both sides, or the centre would move.
        height, width = (min(n, 8 * short + (n - 8 * short) % 2) for n in (height, width))
        x = _centre(x, height, width)
        x = _centre(resize(x, (side * height // short, side * width // short)), side, side)
    elif view == "squash":
        x = resize(x, (side, side))
    elif view == "squares":
        count = min(_MOST_SQUARES, math.ceil(2 * long / short) - 1)
        starts = torch.linspace(0, long - short, count).round().int().tolist()
        along = 2 if height > width else 3
        x = torch.cat([resize(x.narrow(along, start, short), (side, side)) for start in starts])
    elif view != "pad":
        raise ValueError(f"view is {view!r}: it must be one of {', '.join(VIEWS)}")
    centre, spread = (torch.tensor(v, dtype=x.dtype, device=x.device)[:, None, None] for v in (mean, deviation))
    if view == "pad":
        inner = (max(1, round(side * height / long)), max(1, round(side * width / long)))
        missing = (side - inner[0], side - inner[1])
        edges = (missing[1] // 2, missing[1] - missing[1] // 2, missing[0] // 2, missing[0] - missing[0] // 2)
        return F.pad((resize(x, inner) - centre) / spread, edges)
    return (x - centre) / spread


def _centre(x: Tensor, height: int, width: int) -> Tensor:
    top, left = (round((have - want) / 2) for have, want in zip(x.shape[2:], (height, width), strict=True))
    return x[:, :, top : top + height, left : left + width]


def in_parts(
    encode: Callable[[Tensor], Tensor], seen: Tensor, on_part: Callable[[int, int], None] | None = None
) -> Tensor:
    """encode(seen), of 8 at a time; on_part(done, total) is called after each."""
    vectors = []
    for part in (parts := seen.split(8)):
        vectors.append(encode(part))
        if on_part is not None:
            on_part(len(vectors), len(parts))
    return torch.cat(vectors)


def mean_of_views(vectors: Tensor, count: int) -> Tensor:
    """CLIP's vectors (n count, D) of what `preprocess` made of `count` pictures -> a unit vector each, (count, D)."""
    unit = F.normalize(vectors, dim=-1)
    return unit if len(unit) == count else F.normalize(unit.unflatten(0, (-1, count)).mean(0), dim=-1)


# --- towers


class Clip:
    """An open_clip model: the image tower, and the text tower where the file had one. Made by `load_clip`.

    model: the module that holds both. size: of the vectors. source: for messages.
    """

    model: Any

    def __init__(
        self, model: nn.Module, size: int, source: str, statistics: tuple[Sequence[float], Sequence[float]]
    ) -> None:
        self.model, self.size, self.source, self.statistics = model, size, source, statistics
        self.has_text = hasattr(model, "encode_text")
        side = self.model.visual.image_size
        self.side: int = side if isinstance(side, int) else side[0]
        self._tokenizer: Any = None

    def _here(self) -> tuple[torch.device, torch.dtype]:
        weight = next(self.model.visual.parameters())
        return weight.device, weight.dtype

    @torch.no_grad()
    def encode_image(
        self, x: Tensor, view: View = "centre", on_part: Callable[[int, int], None] | None = None
    ) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] -> unit vectors (B, size), fp32. view: see `preprocess`.

        on_part(done, total) is called after every few squares; what it raises stops the work.
        """
        device, dtype = self._here()
        seen = preprocess(x.float(), self.side, view, *self.statistics).to(device=device, dtype=dtype)
        return mean_of_views(in_parts(lambda part: self.model.visual(part).float(), seen, on_part), len(x))

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Texts -> unit vectors (len(texts), size), fp32. Longer ones than the tower reads are cut, with a warning.

        Raises ValueError without a text tower.
        """
        if not self.has_text:
            raise ValueError(
                f"{self.source} holds only the image tower of CLIP, or a text tower of Hugging Face's, so it can't "
                f"read text: give the whole {ARCHITECTURE} {PRETRAINED} of open_clip (open_clip_model.safetensors)"
            )
        tokens = torch.stack([self._tokens(text) for text in texts]).to(self._here()[0])
        return F.normalize(self.model.encode_text(tokens).float(), dim=-1)

    def _tokens(self, text: str) -> Tensor:
        from open_clip.tokenizer import SimpleTokenizer

        if self._tokenizer is None:
            self._tokenizer = SimpleTokenizer(context_length=self.model.context_length)
        room = self.model.context_length - 2  # start and end
        ids = self._tokenizer.encode(text[:_LONGEST_TEXT])
        if len(ids) > room:
            cut = self._tokenizer.decode(ids[room:]).strip() + text[_LONGEST_TEXT:]
            shown = cut if len(cut) <= 200 else f"{cut[:200]} ... ({len(cut)} characters)"
            log.warning("CLIP reads %d tokens of a text; this was cut: %s", room, shown)
        tokens: Tensor = self._tokenizer(text[:_LONGEST_TEXT])[0]
        return tokens


def load_clip(path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Clip:
    """Open CLIP weights with open_clip's names: a file of open_clip, or the published Inf-DiT's, which brings a tower.

    The architecture of a vision transformer is read off the shapes; of any other, from the `open_clip_config.json`
    that open_clip publishes beside its files. Raises WeightsError for what can't be used, ValueError without open_clip.
    """
    open_clip = _open_clip()
    file = open_weights(path)
    prefix = _prefix(file)
    shapes = {name.removeprefix(prefix): shape for name, shape in file.shapes.items() if name.startswith(prefix)}
    beside = file.path.parent / DESCRIPTION
    described = _described(beside) if beside.is_file() else {}
    has_text = any(re.match(r"(text\.)?transformer\.", name) for name in shapes)
    text_config = described.get("model_cfg", {}).get("text_cfg", {})  # texts of Hugging Face's aren't read here
    has_text = has_text and not {"hf_tokenizer_name", "hf_model_name"} & set(text_config)
    model_config = described.get("model_cfg") or _vision_transformer(file.path, shapes, has_text)
    if not described:
        log.info("%s: read as computing with GELU; if it isn't so, put its %s beside it", file.path, beside.name)
    if model_config.get("quick_gelu"):
        log.warning(
            "%s was trained with QuickGELU, the tower of the published Inf-DiT (%s %s) with GELU: its vectors mean "
            "something else there",
            *(file.path, ARCHITECTURE, PRETRAINED),
        )
    try:
        vision, text = model_config["vision_cfg"], model_config["text_cfg"] if has_text else _NO_TEXT
        kind = open_clip.CustomTextCLIP if any(n.startswith("text.") for n in shapes) and has_text else open_clip.CLIP
        with torch.device("meta"):
            model = kind(model_config["embed_dim"], vision, text, quick_gelu=model_config.get("quick_gelu", False))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise WeightsError(f"{beside} doesn't describe a CLIP of this open_clip ({error})") from error
    if not has_text:
        model = _ImageTower(model.visual)
    wanted = model.state_dict()
    extra = [name for name in shapes if name not in wanted and name.startswith(("visual.", *(["text"] * has_text)))]
    if extra:
        raise WeightsError(
            f"{file.path} has tensors that the CLIP that its shapes say has not, such as {extra[0]}: put the "
            f"{beside.name} that belongs to it into the same folder"
        )
    wrong = {name: (shapes.get(name), tuple(t.shape)) for name, t in wanted.items() if shapes.get(name) != t.shape}
    if wrong:
        name, (found, expected) = next(iter(wrong.items()))
        raise WeightsError(
            f"{file.path} isn't the CLIP that its shapes or {beside.name} say: {name} is {found} instead of {expected}"
        )
    model.load_state_dict({name: file.read(prefix + name).to(device, dtype) for name in wanted}, assign=True)
    for module in model.modules():
        if isinstance(mask := getattr(module, "attn_mask", None), Tensor) and mask.is_meta:  # no part of the file
            module.attn_mask = torch.full(mask.shape, -math.inf, device=device, dtype=dtype).triu_(1)
    model.requires_grad_(False).eval()
    pictures = described.get("preprocess_cfg", {})
    return Clip(
        model, model_config["embed_dim"], str(file.path), (pictures.get("mean", _MEAN), pictures.get("std", _DEVIATION))
    )


_NO_TEXT: dict[str, Any] = {"width": 64, "heads": 1, "layers": 1, "vocab_size": 2}  # open_clip asks for some tower


def _described(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} can't be read ({error}): get it anew, or take it away") from error
    if not isinstance(content, dict) or not isinstance(content.get("model_cfg"), dict):
        raise WeightsError(f"{path} has no model_cfg, so it describes no CLIP: get it anew, or take it away")
    return content


class _ImageTower(nn.Module):
    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual


def _open_clip() -> Any:
    try:
        import open_clip
    except ModuleNotFoundError as error:
        raise ValueError(f"CLIP needs open_clip ({error}): pip install open_clip_torch") from error
    except Exception as error:  # beside an unfit torchvision it isn't only an ImportError
        raise ValueError(
            f"open_clip doesn't load ({error}); most often torchvision is of another version than torch: reinstall it"
        ) from error
    return open_clip


def _prefix(file: WeightsFile) -> str:
    """What stands before open_clip's names."""
    found = next((name for name in file.shapes if re.search(r"(^|\.)visual\.", name)), None)
    if found is not None:
        return found[: found.index("visual.")]
    if any("vision_model." in name for name in file.shapes):
        raise WeightsError(
            f"{file.path} has the names of Hugging Face's transformers: take the file that open_clip publishes "
            "(open_clip_model.safetensors), where a network's names begin with 'visual.'"
        )
    what = "only a text tower" if any("token_embedding" in name for name in file.shapes) else "no CLIP"
    raise WeightsError(f"{file.path} holds {what}: give {ARCHITECTURE} {PRETRAINED} of open_clip, or its image tower")


def _vision_transformer(path: Path, shapes: dict[str, tuple[int, ...]], has_text: bool) -> dict[str, Any]:
    """open_clip's description of a CLIP, read off its shapes."""

    def layers(prefix: str) -> int:
        found = {m[1] for name in shapes if (m := re.match(re.escape(prefix) + r"resblocks\.(\d+)\.", name))}
        return len(found)

    def transformer(prefix: str, width: int) -> dict[str, Any]:
        hidden = shapes[f"{prefix}resblocks.0.mlp.c_fc.weight"][0]
        return {"width": width, "layers": layers(prefix), "mlp_ratio": (hidden + 0.5) / width}  # it is cut to an int

    try:
        width, _, patch, _ = shapes["visual.conv1.weight"]
        tokens, _ = shapes["visual.positional_embedding"]
        size = shapes["visual.proj"][1]
        vision = transformer("visual.transformer.", width)
        vision |= {"patch_size": patch, "image_size": patch * math.isqrt(tokens - 1)}
        vision["head_width"] = {1280: 80, 1408: 88, 1664: 104, 1792: 112}.get(width, 64)  # ViT-H, g, bigG and e
        text = _NO_TEXT
        if has_text:
            before = "text." if "text.positional_embedding" in shapes else ""
            length, width = shapes[f"{before}positional_embedding"]
            text = transformer(f"{before}transformer.", width) | {"heads": max(1, width // 64)}
            text |= {"context_length": length, "vocab_size": shapes[f"{before}token_embedding.weight"][0]}
    except (KeyError, ValueError) as error:
        raise WeightsError(
            f"{path} is no CLIP with a vision transformer of open_clip's: put the open_clip_config.json that belongs "
            "to it into the same folder"
        ) from error
    return {"embed_dim": size, "vision_cfg": vision, "text_cfg": text}


def download_clip() -> Path:
    """Fetch the CLIP of the published Inf-DiT from where open_clip has it, once, with progress; 1.7 GB.

    Raises OSError where it can't be reached.
    """
    open_clip = _open_clip()
    from huggingface_hub import constants, hf_hub_download

    repository = open_clip.pretrained.get_pretrained_cfg(ARCHITECTURE, PRETRAINED)["hf_hub"].rstrip("/")
    reached = Event()

    def knock() -> (
        None
    ):  # the library's own retries take half a minute, and names are looked up for as long as it takes
        try:
            with urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=5):
                reached.set()
        except (HTTPError, ssl.SSLError):
            reached.set()
        except OSError as error:
            if isinstance(getattr(error, "reason", None), ssl.SSLError):
                reached.set()

    Thread(target=knock, daemon=True).start()
    online = reached.wait(8)
    error: Exception | None = None
    for name in ("open_clip_model.safetensors", "open_clip_pytorch_model.bin"):
        try:
            return Path(hf_hub_download(repository, name, local_files_only=not online))
        except Exception as found:  # of several libraries
            error = error or found
    why = str(error) if online else f"{constants.ENDPOINT} doesn't answer"
    raise OSError(
        f"{repository} can't be downloaded ({why}): get open_clip_model.safetensors from there by other means and give "
        "its path"
    ) from error


# --- text


class Phrase(NamedTuple):
    text: str
    weight: float


def phrases(prompt: str) -> list[Phrase]:
    """Phrases of a prompt, apart by | or line ends; (phrase:1.5) has a weight, others 1. Raises ValueError."""
    found = []
    for part in re.split(r"[|\n]", prompt):
        text = part.strip()
        if weighted := re.fullmatch(r"\(([^()]*):\s*([^:()]*)\)", text):
            try:
                text, weight = weighted[1].strip(), float(weighted[2])
            except ValueError:
                raise ValueError(f"the weight in {part.strip()!r} is no number: write (phrase:1.5)") from None
            if not (math.isfinite(weight) and weight > 0):
                raise ValueError(f"the weight in {part.strip()!r} must be above 0")
        else:
            weight = 1.0
        if re.search(r"\([^()]*:\s*[\d.]+\)", text):
            raise ValueError(f"{part.strip()!r} has a weight inside a phrase: keep weighted phrases apart by |")
        if text:
            found.append(Phrase(text, weight))
    return found


def encode_prompt(clip: Clip, prompt: str) -> Tensor | None:
    """The weighted mean of a prompt's phrases, a unit vector (1, size); None where there is no text."""
    found = phrases(prompt)
    if not found:
        return None
    weights = torch.tensor([phrase.weight for phrase in found], device=clip._here()[0])
    return F.normalize(weights[None] @ clip.encode_text([phrase.text for phrase in found]), dim=-1)


def steer(image_vector: Tensor, positive: Tensor, negative: Tensor, strength: float = 2.0) -> Tensor:
    """normalise(n(image) + strength * n(positive) - strength * n(negative)), n = division by the L2 norm.

    image_vector: (B, D); positive, negative: (1 or B, D), CLIP text vectors. Returns unit vectors (B, D); with
    strength 0 the image's, normalised once.
    """
    if not strength:
        return F.normalize(image_vector, dim=-1)
    image, good, bad = (F.normalize(v, dim=-1) for v in (image_vector, positive, negative))
    return F.normalize(image + strength * good - strength * bad, dim=-1)


class Steering:
    """Prompts (see `phrases`), encoded once, to steer pictures by. One that is empty doesn't count.

    Raises ValueError for prompts that can't be read, without a text tower, or for a strength that is no number.
    """

    def __init__(self, clip: Clip, positive: str, negative: str, strength: float = 2.0) -> None:
        if not math.isfinite(strength):
            raise ValueError(f"strength is {strength}: it must be a number")
        self.size, self.strength = clip.size, strength
        self.positive, self.negative = (encode_prompt(clip, p) if strength else None for p in (positive, negative))

    def __call__(self, image_vector: Tensor) -> Tensor:
        """`steer` of (B, size); strength 0 or no words change nothing. Raises ValueError for another width."""
        if image_vector.shape[-1] != self.size:
            raise ValueError(
                f"the picture's vector has {image_vector.shape[-1]} numbers, this CLIP's have {self.size}: use "
                "the CLIP that encoded the picture"
            )
        if self.positive is None and self.negative is None:
            return image_vector
        nothing = torch.zeros_like(image_vector)
        good, bad = (nothing if v is None else v.to(image_vector) for v in (self.positive, self.negative))
        return steer(image_vector, good, bad, self.strength)
