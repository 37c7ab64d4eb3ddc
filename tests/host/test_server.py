"""The pack in a running host, over its HTTP interface and its websocket, as the front end uses them."""

import io
import json
import shutil
import subprocess
from typing import Any

import numpy as np
import pytest
from conftest import DEFAULT_WEIGHTS, PACK, Host, Refused, Run, Server  # type: ignore[import-not-found]
from PIL import Image

Graph = dict[str, Any]
NODES = [
    "InfDiTUpscale",
    "InfDiTLoader",
    "InfDiTUpscaleTiled",
    "InfDiTConditioning",
    "InfDiTToImage",
    "InfDiTHeunSampler",
    "InfDiTSchedule",
    "InfDiTLoadCLIP",
    "InfDiTSemanticEncode",
    "InfDiTTextSteering",
]
TARGET = {"size_by": "scale", "scale": 4.0, "width": 0, "height": 0, "longest_side": 4096}
SHIPPED = "default (shipped)"


def node(kind: str, **inputs: Any) -> Graph:
    return {"class_type": kind, "inputs": inputs}


def source(width: int = 48, height: int = 32) -> Graph:
    """Nodes 1 and 2: the shipped photograph, made small."""
    scale = {"upscale_method": "lanczos", "width": width, "height": height, "crop": "center"}
    return {"1": node("LoadImage", image="osprey.png"), "2": node("ImageScale", image=["1", 0], **scale)}


def saved(image: str) -> Graph:
    return {"9": node("SaveImage", images=[image, 0], filename_prefix="test")}


def one_node(width: int = 48, height: int = 32, **settings: Any) -> Graph:
    inputs = {"image": ["2", 0], "scale": 4.0, "preset": "balanced"} | settings
    return source(width, height) | {"3": node("InfDiTUpscale", **inputs)} | saved("3")


def tiled(width: int = 48, height: int = 32, name: str = SHIPPED, **settings: Any) -> Graph:
    inputs = {"model": ["3", 0], "image": ["2", 0], "preset": "balanced", "seed": 1, "tile": 0, "colour": "none"}
    graph = {
        "3": node("InfDiTLoader", model_name=name, precision="auto"),
        "4": node("InfDiTHeunSampler", s_churn=0.0, s_tmin=0.0, s_tmax=1000.0, s_noise=1.0),
        "5": node("InfDiTSchedule", model=["3", 0], steps=2, start=0.2),
        "6": node("InfDiTUpscaleTiled", **TARGET | inputs | {"sampler": ["4", 0], "sigmas": ["5", 0]} | settings),
    }
    return source(width, height) | graph | saved("6")


def native(width: int = 48, height: int = 32, **settings: Any) -> Graph:
    inputs = {"seed": 1, "steps": 3, "cfg": 1.0, "sampler_name": "heun", "scheduler": "karras", "denoise": 1.0}
    conditioning = {"positive": ["4", 0], "negative": ["4", 0], "latent_image": ["4", 1]}
    graph = {
        "3": node("InfDiTLoader", model_name=SHIPPED, precision="auto"),
        "4": node("InfDiTConditioning", model=["3", 0], image=["2", 0], **TARGET),
        "5": node("KSampler", model=["3", 0], **conditioning | inputs | settings),
        "6": node("InfDiTToImage", samples=["5", 0]),
    }
    return source(width, height) | graph | saved("6")


def pixels(run: Run) -> Any:
    (picture,) = run.pictures
    return np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"), dtype=np.int32)


def test_nodes_are_announced(server: Server) -> None:
    known = server.json("/object_info")
    for name in NODES:
        info = known[name]
        assert info["display_name"] and info["description"] and info["category"].startswith("image/upscaling")
        assert info["output_name"] and not set(info["output_name"]) & {"IMAGE", "MODEL", "LATENT", "SIGMAS"}
        for kind in (info["input"].get("required", {}), info["input"].get("optional", {})):
            assert all(entry[1]["tooltip"] for entry in kind.values()), name
    (models, *_) = known["InfDiTLoader"]["input"]["required"]["model_name"]
    models = (
        models if isinstance(models, list) else known["InfDiTLoader"]["input"]["required"]["model_name"][1]["options"]
    )
    assert models[0] == SHIPPED


def test_help_translations_and_templates_are_served(server: Server) -> None:
    for name in NODES:
        assert server.get(f"/extensions/inf-dit/docs/{name}.md").startswith(b"# ")
    translations = server.json("/i18n")
    assert {"en", "zh", "ja", "ko", "de", "fr", "es"} <= {
        language for language, content in translations.items() if "InfDiTUpscale" in content.get("nodeDefs", {})
    }
    names = server.json("/workflow_templates")["inf-dit"]
    assert set(names) == {path.stem for path in (PACK / "workflows").glob("*.json")} and names
    for name in names:
        assert json.loads(server.get(f"/api/workflow_templates/inf-dit/{name}.json".replace(" ", "%20")))["nodes"]
        assert server.get(f"/api/workflow_templates/inf-dit/{name}.jpg".replace(" ", "%20"))[:2] == b"\xff\xd8"


@pytest.mark.parametrize("graph", [one_node(), tiled(), native()], ids=["one node", "tiled", "native"])
def test_graphs_run_to_a_picture(server: Server, graph: Graph) -> None:
    run = server.run(graph)
    assert run.outcome == "execution_success", run.of("execution_error")
    found = pixels(run)
    assert found.shape == (128, 192, 3)
    small = Image.open(PACK / "docs" / "osprey.png").convert("RGB")
    crop = np.asarray(small.crop((25, 0, 295, 180)).resize((192, 128)), dtype=np.int32)  # ImageScale's centre crop
    means = [x.reshape(8, 16, 12, 16, 3).mean((1, 3)) for x in (found, crop)]
    assert np.sqrt(np.square(means[0] - means[1]).mean()) < 5, "not the same picture"  # moved by an area: 23
    assert np.abs(means[0] - means[1]).max() < 12, "a blotch"


TOWER = """
import sys, open_clip, safetensors.torch
vision = {"image_size": 64, "layers": 1, "width": 64, "patch_size": 16}
clip = open_clip.CLIP(768, vision, {"width": 64, "heads": 1, "layers": 1})
safetensors.torch.save_file(dict(clip.state_dict()), sys.argv[1])
"""


def test_semantics_and_their_report(server: Server, host: Host) -> None:
    """With a CLIP of random weights, through a network that doesn't listen: the wiring, not the effect."""
    path = server.base / "models" / "infdit" / "tower.safetensors"
    if subprocess.run([host.python, "-c", TOWER, str(path)], capture_output=True, check=False).returncode:
        pytest.skip("open_clip is not installed beside this host")
    steering = {"positive": "clear", "negative": "noisy", "strength": 2.0}
    graph = tiled(seed=5, semantic=["12", 0]) | {
        "10": node("InfDiTLoadCLIP", clip_name=path.name),
        "11": node("InfDiTSemanticEncode", image=["2", 0], view="squares", clip=["10", 0]),
        "12": node("InfDiTTextSteering", semantic=["11", 0], clip=["10", 0], **steering),
    }
    run = server.run(graph)
    assert run.outcome == "execution_success", run.of("execution_error")
    (report,) = run.texts
    assert "positive: " in report and "negative: " in report and " -> " in report
    assert np.array_equal(pixels(run), pixels(server.run(tiled(seed=5))))
    assert "trained without semantics" in server.log.read_text()


def test_progress_and_previews_arrive(server: Server) -> None:
    run = server.run(tiled(160, 90, tile=1, seed=7))
    assert run.outcome == "execution_success"
    values = [event["value"] / event["max"] for event in run.of("progress") if event["node"] == "6"]
    assert values == sorted(values) and values[-1] == 1 and len(values) > 20
    assert len(run.previews) >= int(run.times["end"]) - 2, "at least once a second of work"
    sizes = {Image.open(io.BytesIO(preview)).size for preview in run.previews}
    assert all(max(size) <= 512 for size in sizes), sizes
    assert run.previews[0][:2] == b"\xff\xd8"


@pytest.mark.parametrize("graph", [one_node(320, 180), native(320, 180, seed=2, steps=20)], ids=["streaming", "native"])
def test_interrupt(server: Server, graph: Graph) -> None:
    interrupt = {"interrupt_after_previews": 2} if "KSampler" not in str(graph) else {"interrupt_after_steps": 1}
    run = server.run(graph, **interrupt)
    assert run.outcome == "execution_interrupted"
    assert run.times["end"] - run.times["interrupt"] < 2
    assert server.run(one_node()).outcome == "execution_success", "the host goes on"


@pytest.mark.parametrize(
    ("graph", "said"),
    [
        (one_node(scale=0), "0.05"),
        (tiled(seed=-1), "seed"),
        (one_node(preset="best"), "balanced"),
        (tiled(name="gone.safetensors"), "put it into"),
        (tiled(size_by="width and height"), "width"),
        (tiled(scale=100.0, width=0), None),
        (native() | {"3": node("UNETLoader", unet_name="none", weight_dtype="default")}, "unet_name"),
    ],
)
def test_bad_values_are_explained(server: Server, graph: Graph, said: str | None) -> None:
    if said is None:  # too large for this machine, and said so before any work
        graph["2"]["inputs"] |= {"width": 1024, "height": 1024}
        said = "smaller scale"
    try:
        run = server.run(graph)
    except Refused as refused:
        assert said in str(refused)
    else:
        assert run.outcome == "execution_error"
        assert said in run.error() and "\n" not in run.error()


def test_out_of_memory(server: Server) -> None:
    expected = pixels(server.run(tiled(64, 64, seed=11)))

    def short(blocks: int) -> Run:
        return server.run(
            tiled(64, 64, seed=11, image=["8", 0]) | {"8": node("OutOfMemory", image=["2", 0], blocks=blocks)}
        )

    try:
        run = short(1)
        assert run.outcome == "execution_success"
        assert np.abs(pixels(run) - expected).max() <= 1
        assert "out of memory: going on with tiles of 1 x 1 blocks" in server.log.read_text()
        run = short(0)
        assert run.outcome == "execution_error" and "smaller result" in run.error() and "\n" not in run.error()
    finally:
        short(-1)


def test_the_same_prompt_is_not_computed_twice(server: Server) -> None:
    first = server.run(tiled(seed=21))
    again = server.run(tiled(seed=21))
    assert {"3", "6"} <= set(again.of("execution_cached")[0]["nodes"])
    other = server.run(tiled(seed=22))
    assert "6" not in other.of("execution_cached")[0]["nodes"]
    assert np.abs(pixels(first) - pixels(other)).max() > 0


def test_seeds_are_reproducible(server: Server) -> None:
    graph = tiled(seed=31)
    first = pixels(server.run(graph))
    server.post("/free", {"unload_models": True, "free_memory": True})  # also empties the cache
    again = server.run(graph)
    assert "6" not in again.of("execution_cached")[0]["nodes"]
    assert np.array_equal(pixels(again), first)


def test_a_file_that_changes_or_goes(server: Server) -> None:
    path = server.base / "models" / "infdit" / "copy.safetensors"
    shutil.copyfile(DEFAULT_WEIGHTS, path)
    graph = tiled(name=path.name)
    first = server.run(graph)
    assert first.outcome == "execution_success"
    weights = bytearray(path.read_bytes())
    weights[-1000:] = bytes(1000)  # the end of the last tensor
    path.write_bytes(weights)
    second = server.run(graph)
    assert second.outcome == "execution_success"
    assert "3" not in second.of("execution_cached")[0]["nodes"]
    path.unlink()
    with pytest.raises(Refused, match="put it into"):
        server.run(graph)
