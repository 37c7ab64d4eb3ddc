"""The nodes without ComfyUI: schemas, translations, help, and what the adapters do by themselves."""

import ast
import asyncio
import inspect
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from stand_in import PACK, ComboInput, FloatInput, IntInput, Schema, loaded_pack
from torch import Tensor

LANGUAGES = ["de", "en", "es", "fr", "ja", "ko", "zh"]
TARGET = {"size_by": "scale", "scale": 4.0, "width": 0, "height": 0, "longest_side": 4096}
SHIPPED = "default (shipped)"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The host's folder for models."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def pack(models: Path) -> Iterator[ModuleType]:
    """The pack, imported as the host imports it."""
    with loaded_pack(models) as pack:
        yield pack


@pytest.fixture(scope="module")
def nodes(pack: ModuleType) -> dict[str, Any]:
    """Every node that the host is given, by its id."""
    extension = asyncio.run(pack.comfy_entrypoint())
    return {node.define_schema().node_id: node for node in asyncio.run(extension.get_node_list())}


@pytest.fixture(scope="module")
def schemas(nodes: dict[str, Any]) -> dict[str, Schema]:
    return {name: node.define_schema() for name, node in nodes.items()}


@pytest.fixture(scope="module")
def model(pack: ModuleType) -> Any:
    """The shipped network as MODEL."""
    return pack.nodes.host.load_model(None, "auto")


def core(pack: ModuleType, name: str) -> Any:
    """A module of the pack's library: not the tests' own infdit_core, which is another import of the same files."""
    return sys.modules[f"{pack.__name__}.infdit_core.{name}"]


def picture(height: int, width: int, channels: int = 3, batch: int = 1) -> Tensor:
    smooth = torch.rand(batch, channels, 4, 4, generator=torch.Generator().manual_seed(height * width))
    return torch.nn.functional.interpolate(smooth, size=(height, width), mode="bilinear").movedim(1, -1).clamp(0, 1)


# --- importing


def test_stand_in_leaves_nothing_behind(tmp_path: Path) -> None:
    before = dict(sys.modules)
    with loaded_pack(tmp_path) as pack:
        assert sys.modules["folder_paths"].models_dir == str(tmp_path)  # type: ignore[attr-defined]
        assert sys.modules[f"{pack.__name__}.nodes"] is pack.nodes and "comfy.utils" in sys.modules
    assert sys.modules == before


BLOCKED = """
import importlib.abc, sys, tempfile

class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"open_clip", "torchvision", "png", "scipy", "lightning", "omegaconf", "transformers"}:
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Block())
sys.path.insert(0, sys.argv[1])
from stand_in import loaded_pack

with loaded_pack(tempfile.mkdtemp()) as pack:
    print(len(pack.nodes.NODES))
"""


def test_pack_imports_without_optional_packages(tmp_path: Path) -> None:
    command = [sys.executable, "-c", BLOCKED, str(Path(__file__).parent)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0


def test_host_modules_are_imported_where_they_belong() -> None:
    """comfy.* and folder_paths in nodes/host.py alone; the rest of nodes/ takes comfy_api.latest; all else relative."""
    for path in (PACK / "nodes").glob("*.py"):
        lines = [line for line in path.read_text().splitlines() if line.startswith(("import ", "from "))]
        inner = [line for line in lines if re.match(r"(import|from) (comfy|folder_paths)\b(?!_api)", line)]
        assert not inner or path.name == "host.py", (path.name, inner)
        assert not [line for line in lines if re.match(r"(import|from) (nodes|infdit_core)\b", line)], path.name


# --- schemas


def test_schemas_are_complete(nodes: dict[str, Any], schemas: dict[str, Schema], pack: ModuleType) -> None:
    assert len(schemas) == len(pack.nodes.NODES) >= 7, "two nodes have the same id"
    assert len({schema.display_name for schema in schemas.values()}) == len(schemas)
    for name, schema in schemas.items():
        assert name.startswith("InfDiT"), "ids of all packs share one namespace"
        assert schema.display_name and schema.description, name
        assert schema.category == "image/upscaling/Inf-DiT", name
        inputs, outputs = [i.id for i in schema.inputs], [o.id for o in schema.outputs]
        assert len(set(inputs + outputs)) == len(inputs + outputs), f"{name}: an id twice"
        assert outputs and all(outputs), name
        assert all(i.tooltip for i in schema.inputs), name
        assert all(o.display_name and o.tooltip for o in schema.outputs), name


def test_texts_are_sentences(schemas: dict[str, Schema]) -> None:
    for name, schema in schemas.items():
        for text in [schema.description, *(part.tooltip for part in [*schema.inputs, *schema.outputs])]:
            assert text and re.fullmatch(r"\S.*\.", text) and "  " not in text, (name, text)


def test_defaults_are_allowed_values(schemas: dict[str, Schema]) -> None:
    checked = 0
    for name, schema in schemas.items():
        for entry in schema.inputs:
            if isinstance(entry, ComboInput):
                assert entry.options and entry.default in entry.options, (name, entry.id)
                checked += 1
            elif isinstance(entry, FloatInput | IntInput):
                assert entry.min is not None and entry.max is not None, (name, entry.id)
                assert entry.min <= entry.default <= entry.max, (name, entry.id)
                checked += 1
    assert checked > 15


def test_functions_take_the_inputs(nodes: dict[str, Any], schemas: dict[str, Schema]) -> None:
    for name, node in nodes.items():
        inputs = {entry.id: entry for entry in schemas[name].inputs}
        parameters = inspect.signature(node.execute).parameters
        named = {key: p for key, p in parameters.items() if p.kind is not p.VAR_KEYWORD}
        assert set(named) <= set(inputs), name
        assert set(named) == set(inputs) or len(named) < len(parameters), f"{name} doesn't take all its inputs"
        for key, entry in inputs.items():
            if entry.optional:
                assert named[key].default is None, f"{name}.{key} isn't connected at times"
        for function in ("validate_inputs", "fingerprint_inputs"):
            if hasattr(node, function):
                assert set(inspect.signature(getattr(node, function)).parameters) <= set(inputs), (name, function)


# --- translations

# Names that are the same word in English, and parameters that have a name in formulas only.
SYMBOLS = {"s_churn", "s_tmin", "s_tmax", "s_noise"}
COGNATES = {
    "de": {"clip", "seed", "sampler", "sigmas", "start", "latent"},
    "es": {"clip", "sigmas"},
    "fr": {"clip", "image", "sigmas", "latent"},
    "ja": {"clip"},
    "ko": {"clip"},
    "zh": {"clip", "sigmas", "latent"},  # as in the host's own translation
}
SCRIPTS = {"ja": r"[\u3040-\u30ff]", "ko": r"[\uac00-\ud7af]", "zh": r"[\u4e00-\u9fff]"}


def stored(language: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((PACK / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
    return found


def node_definitions(language: str) -> dict[str, Any]:
    """As people read them. The front end's message format takes {}@| for commands; {'|'} stands for the character."""

    def unescaped(entry: Any) -> Any:
        if isinstance(entry, str):
            return re.sub(r"\{'([{}@|])'\}", r"\1", entry)
        return {key: unescaped(inner) for key, inner in entry.items()}

    found: dict[str, Any] = unescaped(stored(language))
    return found


def as_definitions(schemas: dict[str, Schema]) -> dict[str, Any]:
    """What the host's front end looks up, from the schemas."""
    return {
        name: {
            "display_name": schema.display_name,
            "description": schema.description,
            "inputs": {i.id: {"name": i.display_name or i.id, "tooltip": i.tooltip} for i in schema.inputs},
            "outputs": {str(n): {"name": o.display_name, "tooltip": o.tooltip} for n, o in enumerate(schema.outputs)},
        }
        for name, schema in schemas.items()
    }


def flat(entry: Any, *keys: str) -> dict[tuple[str, ...], str]:
    """{(node, "inputs", id, "tooltip"): text, ...}"""
    if isinstance(entry, str):
        return {keys: entry}
    return {path: text for key, inner in entry.items() for path, text in flat(inner, *keys, key).items()}


def is_name(path: tuple[str, ...]) -> bool:
    return path[-1] == "name"


def test_languages_are_there() -> None:
    folders = sorted(path.name for path in (PACK / "locales").iterdir())
    assert folders == LANGUAGES
    for language in LANGUAGES:
        files = sorted(path.name for path in (PACK / "locales" / language).iterdir())
        assert files == ["nodeDefs.json"], language


def test_english_is_the_schema(schemas: dict[str, Schema]) -> None:
    assert node_definitions("en") == as_definitions(schemas)


@pytest.mark.parametrize("language", LANGUAGES)
def test_translation_has_every_text_and_no_other(language: str, schemas: dict[str, Schema]) -> None:
    texts = flat(stored(language))
    assert set(texts) == set(flat(as_definitions(schemas)))
    for path, text in texts.items():
        assert text == text.strip() != "", path
        assert not re.search(r"[{}@|]", re.sub(r"\{'[{}@|]'\}", "", text)), path


@pytest.mark.parametrize("language", sorted(COGNATES))
def test_translation_is_one(language: str) -> None:
    english, texts = flat(node_definitions("en")), flat(node_definitions(language))
    same = {path for path, text in texts.items() if text.casefold() == english[path].casefold()}
    assert all(is_name(path) for path in same), same
    assert {english[path] for path in same} == SYMBOLS | COGNATES[language]
    if language in SCRIPTS:
        foreign = [path for path, text in texts.items() if not is_name(path) and not re.search(SCRIPTS[language], text)]
        assert not foreign


def test_no_language_is_taken_for_another() -> None:
    texts = {language: flat(node_definitions(language)) for language in LANGUAGES}
    for one, other in combinations(LANGUAGES, 2):
        same = [path for path, text in texts[one].items() if text == texts[other][path] and not is_name(path)]
        assert not same, (one, other, same)


@pytest.mark.parametrize("language", sorted(COGNATES))
def test_translation_names_the_same_nodes_values_and_numbers(language: str, schemas: dict[str, Schema]) -> None:
    """Options aren't translated by the host, so they stand verbatim; nodes are called what they are called there."""
    definitions = node_definitions(language)
    texts, names = flat(definitions), {name: entry["display_name"] for name, entry in definitions.items()}
    options = {o for s in schemas.values() for i in s.inputs if isinstance(i, ComboInput) for o in i.options or []}
    options = {option for option in options if option.isascii() and re.fullmatch(r"[\w ]+", option)} - {"none"}
    found = 0
    for path, english in flat(node_definitions("en")).items():
        if is_name(path):
            continue
        for name, schema in schemas.items():
            if f"'{schema.display_name}'" in english:
                assert names[name] in texts[path], (path, names[name])
                found += 1
        verbatim = {option for option in options if re.search(rf"'{option}'|(^|[.;] ){option}\b", english)}
        for word in verbatim | set(re.findall(r"-?\d+|[a-z]+/[a-z]+|\.[a-z]+\b|\(\w+:[\d.]+\)|\|", english)):
            assert word in texts[path], (path, word)
            found += 1
    assert found > 40


# --- help


def help_page(pack: ModuleType, name: str) -> str:
    return (PACK / pack.WEB_DIRECTORY / "docs" / f"{name}.md").read_text(encoding="utf-8")


def test_every_node_has_a_help_page(pack: ModuleType, schemas: dict[str, Schema]) -> None:
    pages = {path.name for path in (PACK / pack.WEB_DIRECTORY / "docs").iterdir()}
    assert pages == {f"{name}.md" for name in schemas}


def test_help_explains_every_input_and_output(pack: ModuleType, schemas: dict[str, Schema]) -> None:
    for name, schema in schemas.items():
        page = help_page(pack, name)
        assert page.startswith(f"# {schema.display_name}\n"), name
        rows = re.findall(r"^\| `(\w+)` \| \S.* \|$", page, re.MULTILINE)
        inputs = [i.display_name or i.id for i in schema.inputs]
        explained = [row for row in rows if row in inputs or row in {o.display_name for o in schema.outputs}]
        assert explained == inputs + [o.display_name for o in schema.outputs], name
        for entry in schema.inputs:
            if isinstance(entry, ComboInput):
                for option in entry.options or []:
                    assert f"`{option}`" in page, (name, option)


def messages(path: Path) -> Iterator[str]:
    """Every string in a source file, with … where something is put in."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_help_quotes_messages_that_exist(pack: ModuleType, schemas: dict[str, Schema]) -> None:
    sources = [*(PACK / "nodes").glob("*.py"), *(PACK / "infdit_core").rglob("*.py")]
    known = [message for path in sources for message in messages(path)]
    quoted = 0
    for name in schemas:
        for table in re.findall(r"^\| message \|.*\n\|---\|---\|\n((?:\|.*\n?)+)", help_page(pack, name), re.MULTILINE):
            for row in table.splitlines():
                parts = [part for part in re.split(r"\s*…\s*", row.split("|")[1].strip()) if part]
                assert any(all(part in message for part in parts) for message in known), (name, parts)
                quoted += 1
    assert quoted > 15


def test_help_speaks_of_nodes_that_exist(pack: ModuleType, schemas: dict[str, Schema]) -> None:
    titles = {schema.display_name for schema in schemas.values()}
    for name in schemas:
        bold = {" ".join(words.split()) for words in re.findall(r"\*\*(.+?)\*\*", help_page(pack, name), re.DOTALL)}
        named = {words for words in bold if re.search("Inf-DiT|EDM|Semantic|Steering", words)}
        assert named and named <= titles, (name, named - titles)


# --- the size of the result


@pytest.mark.parametrize(
    ("target", "size"),
    [
        ({"scale": 2.5}, (15, 22)),
        ({"scale": 0.5}, (3, 4)),
        ({"scale": 0.05}, (1, 1)),
        ({"size_by": "width and height", "width": 27}, (18, 27)),
        ({"size_by": "width and height", "height": 12}, (12, 18)),
        ({"size_by": "width and height", "width": 20, "height": 21}, (21, 20)),
        ({"size_by": "longest side", "longest_side": 45}, (30, 45)),
        ({"size_by": "longest side", "longest_side": 45, "width": 7, "scale": 2.0}, (30, 45)),
    ],
)
def test_result_size(pack: ModuleType, target: dict[str, Any], size: tuple[int, int]) -> None:
    assert pack.nodes.target.result_size(picture(6, 9), **TARGET | target) == size
    if target.get("size_by") == "longest side":
        assert pack.nodes.target.result_size(picture(9, 6), **TARGET | target) == size[::-1]


@pytest.mark.parametrize(
    ("image", "target", "said"),
    [
        (picture(4, 4), {"scale": 0.0}, "scale is 0"),
        (picture(4, 4), {"scale": math.nan}, "scale is nan"),
        (picture(4, 4), {"scale": 1e9}, "too large"),
        (picture(4, 4), {"size_by": "longest side", "longest_side": 131072}, "smaller scale"),
        (picture(4, 4), {"size_by": "width and height"}, "a width, a height or both"),
        (picture(4, 4), {"size_by": "width and height", "width": -3}, "at least 1 pixel"),
        (picture(4, 4), {"size_by": "area"}, "longest side"),
        (picture(4, 4) * math.nan, {}, "NaN"),
        (picture(4, 4) + math.inf, {}, "infinite"),
        (picture(4, 4)[:0], {}, r"\(0, 4, 4, 3\)"),
        (picture(4, 4)[:, :0], {}, r"\(1, 0, 4, 3\)"),
        (picture(4, 4, channels=5), {}, "1 to 4"),
        (picture(4, 4)[0], {}, "shape"),
    ],
)
def test_impossible_sizes_and_pictures(pack: ModuleType, image: Tensor, target: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        pack.nodes.target.result_size(image, **TARGET | target)
    assert "\n" not in str(caught.value)


# --- loading


def test_loader_offers_the_folder(pack: ModuleType, nodes: dict[str, Any], models: Path) -> None:
    for name in ("own.safetensors", "notes.txt"):
        (models / "infdit" / name).write_bytes(b"")
    try:
        (choice, precision) = nodes["InfDiTLoader"].define_schema().inputs
        assert choice.options == [SHIPPED, "own.safetensors"] and choice.default == SHIPPED
        assert pack.nodes.host.model_path("own.safetensors") == models / "infdit" / "own.safetensors"
        assert pack.nodes.host.model_path(SHIPPED) is None
        assert precision.options == ["auto", "bf16", "fp16", "fp32", "fp8"]
    finally:
        (models / "infdit" / "own.safetensors").unlink()


def test_loader_says_where_a_missing_file_belongs(nodes: dict[str, Any], models: Path) -> None:
    loader = nodes["InfDiTLoader"]
    assert loader.validate_inputs(model_name=SHIPPED) is True
    said = loader.validate_inputs(model_name="gone.pt")
    assert "gone.pt" in said and str(models / "infdit") in said and SHIPPED in said
    with pytest.raises(ValueError, match=r"gone\.pt"):
        loader.execute(model_name="gone.pt", precision="auto")
    assert loader.fingerprint_inputs(model_name="gone.pt", precision="auto") == "missing"


def test_loader_notices_a_file_that_changed(nodes: dict[str, Any], models: Path) -> None:
    path, loader = models / "infdit" / "changing.pt", nodes["InfDiTLoader"]
    seen = []
    for content in (b"1", b"22"):
        path.write_bytes(content)
        seen += [loader.fingerprint_inputs(model_name=path.name, precision="auto")] * 2
    path.unlink()
    assert seen[0] == seen[1] and len(set(seen)) == 2


def test_precisions(nodes: dict[str, Any]) -> None:
    def kinds(precision: str) -> set[torch.dtype]:
        (loaded,) = nodes["InfDiTLoader"].execute(model_name=SHIPPED, precision=precision).args
        return {parameter.dtype for parameter in loaded.model.diffusion_model.parameters()}

    assert kinds("auto") == kinds("fp32") == {torch.float32}
    assert kinds("bf16") == {torch.bfloat16} and kinds("fp16") == {torch.float16}
    assert torch.float8_e4m3fn in kinds("fp8")
    with pytest.raises(ValueError, match="must be one of auto, bf16"):
        kinds("int4")


@pytest.mark.parametrize("other", [None, SimpleNamespace(model=SimpleNamespace(diffusion_model=torch.nn.Identity()))])
@pytest.mark.parametrize("name", ["InfDiTUpscaleTiled", "InfDiTConditioning", "InfDiTSchedule"])
def test_another_model_is_refused(nodes: dict[str, Any], name: str, other: Any) -> None:
    inputs: dict[str, Any] = {"steps": 3, "start": 0.0}
    if name != "InfDiTSchedule":
        inputs = {"image": picture(4, 4)} | TARGET
    if name == "InfDiTUpscaleTiled":
        inputs |= {"preset": "balanced", "seed": 0, "tile": 0, "colour": "none"}
    with pytest.raises(ValueError, match="connect the output of 'Load Inf-DiT'"):
        nodes[name].execute(model=other, **inputs)


# --- the streaming path


def test_one_node_gives_what_the_library_gives(pack: ModuleType, nodes: dict[str, Any], model: Any) -> None:
    image = picture(5, 9, channels=4, batch=2)
    (found,) = nodes["InfDiTUpscale"].execute(image=image, scale=3.0, preset="faithful").args
    expected = pack.infdit_core.upscale(image, model=model.model.diffusion_model, scale=3.0, preset="faithful")
    assert found.shape == (2, 15, 27, 4) and torch.allclose(found, expected, atol=1e-6)


def test_tiled_hands_every_choice_on(
    pack: ModuleType, nodes: dict[str, Any], model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}

    def upscale(image: Tensor, **settings: Any) -> Tensor:
        given.update(settings)
        return image

    monkeypatch.setattr(pack.nodes.host, "upscale_pictures", upscale)
    image, sigmas, semantic = picture(6, 9), torch.tensor([1.0, 0.0]), torch.zeros(1, 768)
    choices = {"preset": "detailed", "seed": 7, "tile": 3, "colour": "mean", "sigmas": sigmas, "semantic": semantic}
    nodes["InfDiTUpscaleTiled"].execute(model=model, image=image, **TARGET | {"scale": 2.0}, **choices)
    progress = given.pop("on_progress")
    assert callable(progress)
    assert given == {"model": model.model.diffusion_model, "size": (12, 18)} | choices
    nodes["InfDiTUpscaleTiled"].execute(model=model, image=image, **TARGET, **choices | {"tile": 0}, sampler=object())
    assert given["tile"] == "auto" and callable(given["sampler"])


def test_interrupt_ends_the_work(nodes: dict[str, Any], pack: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = 0

    class Interrupted(Exception):
        pass

    def interrupt() -> None:
        nonlocal tiles
        tiles += 1
        if tiles == 2:
            raise Interrupted

    monkeypatch.setattr(pack.nodes.host.management, "throw_exception_if_processing_interrupted", interrupt)
    with pytest.raises(Interrupted):
        nodes["InfDiTUpscale"].execute(image=picture(4, 4), scale=4.0, preset="balanced")
    assert tiles == 2


def test_progress_shows_the_picture(pack: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[tuple[int, int, Any]] = []
    progress = pack.nodes.host._Progress()
    monkeypatch.setattr(progress.bar, "update_absolute", lambda *update: shown.append(update))
    estimate = torch.full((1, 3, 700, 1500), 1.2)
    estimate[:, 2] = -1
    for fraction in (0.25, 1.0):
        progress(core(pack, "upscale").UpscaleProgress(fraction, estimate))
    assert [value / total for value, total, _ in shown] == [0.25, 1.0]
    kind, image, side = shown[0][2]
    assert kind == "JPEG" and max(image.size) <= side == 512 and image.getpixel((0, 0)) == (255, 255, 0)
    assert shown[1][2] is None, "not more often than twice a second"


# --- the native path


def test_conditioning_and_back_is_bicubic(pack: ModuleType, nodes: dict[str, Any], model: Any) -> None:
    """Without a sampler in between: the size is the one asked for, alpha comes back."""
    resize = core(pack, "images").resize
    for shape, scale in [((13, 22, 4), 4.0), ((8, 8, 3), 4.0), ((5, 5, 2), 7.0), ((19, 14, 1), 0.5), ((7, 9, 3), 3.3)]:
        image = picture(*shape, batch=2)
        settings = TARGET | {"scale": scale}
        _, latent = nodes["InfDiTConditioning"].execute(model=model, image=image, **settings).args
        (found,) = nodes["InfDiTToImage"].execute(samples=latent).args
        size = (round(shape[0] * scale), round(shape[1] * scale))
        colours, has_alpha = (3, True) if shape[2] in (2, 4) else (3, False)
        assert found.shape == (2, *size, colours + has_alpha), (shape, scale)
        planes = image.movedim(-1, 1)
        grey = shape[2] < 3
        own = planes[:, :1].expand(-1, 3, -1, -1) if grey else planes[:, :3]
        inner = (slice(None), slice(2, -2), slice(2, -2))
        expected = resize(own, size).movedim(1, -1)
        assert (found[..., :3] - expected)[inner].abs().max() < 0.05, (shape, scale)
        if has_alpha:
            assert torch.allclose(found[..., 3], resize(planes[:, -1:], size).clamp(0, 1)[:, 0], atol=1e-6)


def test_conditioning_carries_the_picture(
    pack: ModuleType, nodes: dict[str, Any], model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, host = model.model.diffusion_model.config, pack.nodes.host
    monkeypatch.setattr(pack.infdit_core.InfDiT, "uses_semantics", property(lambda _: True))
    image, semantic = picture(9, 20, batch=2), torch.rand(2, config.semantic_size)
    conditioning, latent = (
        nodes["InfDiTConditioning"].execute(model=model, image=image, semantic=semantic, **TARGET).args
    )
    ((tokens, entries),) = conditioning
    assert tokens.shape == (2, 1, 1), "the host's nodes for CONDITIONING take its size"
    assert set(entries) == {host.LOW_RES, host.SEMANTIC} and entries[host.SEMANTIC] is semantic
    low_res, samples = entries[host.LOW_RES], latent["samples"]
    assert samples.shape == (2, 3, 9 * config.scale, 20 * config.scale)
    assert torch.allclose(low_res, image.movedim(-1, 1) * 2 - 1)
    with pytest.raises(ValueError, match="one vector, or 2"):
        nodes["InfDiTConditioning"].execute(model=model, image=image, semantic=torch.rand(3, 8), **TARGET)
    without = nodes["InfDiTConditioning"].execute(model=model, image=image, **TARGET).args[0]
    assert set(without[0][1]) == {host.LOW_RES}


def test_to_image_resizes_and_restores_alpha(pack: ModuleType, nodes: dict[str, Any]) -> None:
    x = torch.tensor([0.0, 1.0, 3.0]).view(3, 1, 1).expand(4, 3, 10, 12)  # the last out of range
    alpha = torch.tensor([0.25, 0.75]).view(2, 1, 1, 1).expand(2, 1, 3, 3)
    key = pack.nodes.native.RESULT

    def image(size: tuple[int, int], alpha: Tensor | None) -> Tensor:
        samples = {"samples": x, key: {"size": size, "alpha": alpha}}
        found: Tensor = nodes["InfDiTToImage"].execute(samples=samples).args[0]
        return found

    as_it_is = image((10, 12), None)
    assert as_it_is.shape == (4, 10, 12, 3)
    assert torch.allclose(as_it_is, torch.tensor([0.5, 1.0, 1.0]).expand(4, 10, 12, 3))
    resized = image((5, 30), alpha)
    assert resized.shape == (4, 5, 30, 4)
    assert torch.allclose(
        resized[:, 2, 15], torch.tensor([[0.5, 1, 1, a] for a in (0.25, 0.75, 0.25, 0.75)]), atol=1e-4
    )
    plain = nodes["InfDiTToImage"].execute(samples={"samples": x}).args[0]
    assert plain.shape == (4, 10, 12, 3) and plain.min() == 0.5 and plain.max() == 1


@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (1, 16, 8, 8), (1, 3, 2, 8, 8), (3, 8, 8)])
def test_latents_of_other_models_are_refused(nodes: dict[str, Any], shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="VAE Decode") as caught:
        nodes["InfDiTToImage"].execute(samples={"samples": torch.zeros(shape)})
    assert str(shape) in str(caught.value)


def test_model_explains_wrong_connections(pack: ModuleType, nodes: dict[str, Any], model: Any) -> None:
    ((_, entries),), latent = nodes["InfDiTConditioning"].execute(model=model, image=picture(8, 8), **TARGET).args
    x, sigma = latent["samples"], torch.ones(1)
    assert model.model._apply_model(x, sigma, **entries).shape == x.shape
    with pytest.raises(ValueError, match="'Inf-DiT Conditioning' to the sampler, as negative too"):
        model.model._apply_model(x, sigma)
    with pytest.raises(ValueError, match="has 4 channels and 32 x 32 values"):
        model.model._apply_model(torch.zeros(1, 4, 32, 32), sigma, **entries)
    with pytest.raises(ValueError, match="3 channels and 32 x 32: connect the latent"):
        model.model._apply_model(x[:, :, :16], sigma, **entries)


def test_noise_is_not_scaled_up_at_the_largest_sigma(model: Any) -> None:
    scale = model.model.model_sampling.noise_scaling
    sigma, noise, image = torch.tensor(2.0), torch.ones(1, 3, 2, 2), torch.full((1, 3, 2, 2), 0.5)
    assert torch.equal(scale(sigma, noise, image, max_denoise=True), image + 2 * noise)


# --- sampler and schedule


def test_schedule(pack: ModuleType, nodes: dict[str, Any], model: Any) -> None:
    config, edm = model.model.diffusion_model.config, pack.infdit_core.diffusion.edm

    def sigmas(steps: int, start: float) -> Tensor:
        found: Tensor = nodes["InfDiTSchedule"].execute(model=model, steps=steps, start=start).args[0]
        return found

    assert torch.equal(sigmas(5, 0.0), edm.sigmas(5, config.sigma_min, config.sigma_max))
    assert torch.equal(sigmas(3, 0.15), edm.sigmas(3, config.sigma_min, 0.15))
    assert sigmas(1, 0.0).tolist() == pytest.approx([config.sigma_max, 0.0])
    assert torch.equal(sigmas(4, config.sigma_max), sigmas(4, 0.0))
    for start in (config.sigma_min, config.sigma_min / 2, config.sigma_max + 0.01, -1.0):
        with pytest.raises(ValueError, match=f"Start is {start:g}: these weights take 0") as caught:
            sigmas(3, start)
        assert f"{config.sigma_min:g}" in str(caught.value) and f"{config.sigma_max:g}" in str(caught.value)


def test_heun_sampler_is_the_library_s(pack: ModuleType, nodes: dict[str, Any]) -> None:
    heun = pack.infdit_core.diffusion.samplers.heun
    sigmas, x = torch.tensor([2.0, 1.0, 0.5, 0.0]), picture(4, 4).movedim(-1, 1)
    calls: list[tuple[int, ...]] = []

    def network(noisy: Tensor, sigma: Tensor, **_: Any) -> Tensor:
        calls.append(tuple(sigma.shape))
        return noisy / (1 + sigma.view(-1, 1, 1, 1) ** 2)

    def sampled(seed: int, **churn: float) -> Tensor:
        settings = {"s_churn": 0.0, "s_tmin": 0.0, "s_tmax": 1000.0, "s_noise": 1.0} | churn
        (sampler,) = nodes["InfDiTHeunSampler"].execute(**settings).args
        found: Tensor = sampler.sampler_function(network, x, sigmas, extra_args={"seed": seed})
        return found

    expected = heun(lambda noisy, sigma: noisy / (1 + sigma**2), x, sigmas)
    assert torch.allclose(sampled(1), expected, atol=1e-6)
    assert calls == [(1,)] * 5, "two a step, one in the last; a sigma for each picture"
    churned = sampled(1, s_churn=3.0)
    noise = core(pack, "upscale").noise_of(2)  # the initial noise is that of the seed itself
    again = heun(lambda noisy, sigma: noisy / (1 + sigma**2), x, sigmas, s_churn=3.0, noise=noise)
    assert torch.allclose(churned, again, atol=1e-6) and not torch.allclose(churned, sampled(2, s_churn=3.0))
    assert torch.equal(sampled(1, s_churn=3.0, s_tmin=5.0), sampled(1)), "no sigma in the range"
    assert torch.equal(sampled(1, s_churn=3.0, s_tmax=0.1), sampled(1))
    assert not torch.allclose(sampled(1, s_churn=3.0, s_noise=0.5), churned)


# --- CLIP


def test_clip_loader_offers_both_folders(pack: ModuleType, nodes: dict[str, Any], models: Path) -> None:
    (models / "clip_vision").mkdir()
    paths = [models / "infdit" / "own.safetensors", models / "clip_vision" / "other.safetensors"]
    for path in paths:
        path.write_bytes(b"")
    loader, host = nodes["InfDiTLoadCLIP"], pack.nodes.host
    try:
        (choice,) = loader.define_schema().inputs
        assert choice.options == [host.NO_CLIP, "own.safetensors", "clip_vision/other.safetensors", host.DOWNLOAD]
        assert [host.clip_path(name) for name in choice.options[1:]] == [*paths, None]
        before = [loader.fingerprint_inputs(clip_name=name) for name in choice.options[1:]]
        paths[0].with_name("open_clip_config.json").write_text("{}")
        after = [loader.fingerprint_inputs(clip_name=name) for name in choice.options[1:]]
        paths[0].with_name("open_clip_config.json").unlink()
        assert len(set(before)) == 3 and before[0] != after[0] and before[1:] == after[1:]
        assert "No CLIP is chosen" in loader.validate_inputs(clip_name=host.NO_CLIP)
        for node, linked in ((loader, {"clip_name": None}), (nodes["InfDiTLoader"], {"model_name": None})):
            assert node.validate_inputs(**linked) is True
        assert loader.fingerprint_inputs(clip_name=None) == "linked"
    finally:
        for path in paths:
            path.unlink()
    for name, folder in (("own.safetensors", "infdit"), ("clip_vision/other.safetensors", "clip_vision")):
        said = loader.validate_inputs(clip_name=name)
        assert name in said and str(models / folder) in said and host.DOWNLOAD in said
        assert loader.fingerprint_inputs(clip_name=name) == "missing"
        with pytest.raises(ValueError, match="There is no CLIP file"):
            loader.execute(clip_name=name)


def test_clip_without_open_clip(nodes: dict[str, Any], models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = models / "infdit" / "clip.safetensors"
    path.write_bytes(b"")
    monkeypatch.setitem(sys.modules, "open_clip", None)
    try:
        with pytest.raises(ValueError, match="pip install open_clip_torch"):
            nodes["InfDiTLoadCLIP"].execute(clip_name=path.name)
    finally:
        path.unlink()


def test_semantic_encode_takes_one_clip(nodes: dict[str, Any]) -> None:
    encode = nodes["InfDiTSemanticEncode"].execute
    for clips in ({}, {"clip": object(), "clip_vision": object()}):
        with pytest.raises(ValueError, match="Connect either clip"):
            encode(image=picture(4, 4), view="centre", **clips)
    with pytest.raises(ValueError, match=r"clip is str: connect the output of 'Load CLIP \(Inf-DiT\)'"):
        encode(image=picture(4, 4), view="centre", clip="sdxl")
    with pytest.raises(ValueError, match="NaN"):
        encode(image=picture(4, 4) * math.nan, view="centre", clip="sdxl")


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_clip_sees_colours_only(
    pack: ModuleType, nodes: dict[str, Any], monkeypatch: pytest.MonkeyPatch, channels: int
) -> None:
    seen: list[tuple[Any, Tensor, str]] = []

    def encode_image(clip: Any, x: Tensor, view: str) -> Tensor:
        seen.append((clip, x, view))
        return torch.zeros(len(x), 8)

    monkeypatch.setattr(pack.nodes.host, "encode_image", encode_image)
    image = picture(5, 7, channels, batch=2)
    (found,) = nodes["InfDiTSemanticEncode"].execute(image=image, view="pad", clip="ours").args
    ((clip, x, view),) = seen
    assert (clip, view) == ("ours", "pad") and found.shape == (2, 8)
    colours = image[..., : 1 if channels < 3 else 3].expand(-1, -1, -1, 3)
    assert torch.equal(x, colours.movedim(-1, 1) * 2 - 1)


def test_text_steering_shows_its_report(
    pack: ModuleType, nodes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    host, node, vectors = pack.nodes.host, nodes["InfDiTTextSteering"], torch.eye(3)[:1]
    shown: list[tuple[str, Any]] = []
    monkeypatch.setattr(host, "steer", lambda *given: (vectors * given[4], " ".join(given[2:4])))
    monkeypatch.setattr(host, "show_text", lambda *told: shown.append(told))
    inputs = {"semantic": vectors, "clip": object(), "positive": "sharp", "negative": "soft", "strength": 2.0}
    assert torch.equal(node.execute(**inputs).args[0], 2 * vectors)
    monkeypatch.setattr(node, "hidden", SimpleNamespace(unique_id="7"))
    node.execute(**inputs)
    assert shown == [("sharp soft", None), ("sharp soft", "7")]
