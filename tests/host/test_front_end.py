"""The example workflows in the host's own front end: opened from its Templates browser, looked at, and run."""

import io
import itertools
import json
import os
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import PACK, Host, Refused, Server  # type: ignore[import-not-found]
from PIL import Image

WORKFLOWS = {path.stem: json.loads(path.read_text()) for path in sorted((PACK / "workflows").glob("*.json"))}
CHECKPOINT = "sd_xl_base_1.0.safetensors"
NEED_CHECKPOINT = [name for name, content in WORKFLOWS.items() if CHECKPOINT in json.dumps(content)]
RUN = [name for name in WORKFLOWS if name not in NEED_CHECKPOINT]
SCRIPT = Path(__file__).parent / "front_end.mjs"


@lru_cache(maxsize=1)
def _browser() -> dict[str, str]:
    """The environment to run the script in. Skips where something is missing."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    require = "require(process.env.PLAYWRIGHT_CORE || 'playwright-core')"
    if subprocess.run([node, "-e", require], capture_output=True, check=False, cwd=SCRIPT.parent).returncode:
        pytest.skip("PLAYWRIGHT_CORE or NODE_PATH must lead to the npm package playwright-core")
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("CHROMIUM must name a Chromium")
    return os.environ | {"CHROMIUM": chromium}


@pytest.fixture(scope="session")
def shown(server: Server) -> dict[str, Any]:
    """What the front end made of the workflows; screenshots are in the server's folder "front_end"."""
    environment = _browser()
    folder = server.base / "front_end"
    folder.mkdir()
    command = ["node", str(SCRIPT), server.url, str(folder), server.pack, *RUN]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    outcome: dict[str, Any] = json.loads(done.stdout)
    return outcome


def test_the_templates_browser_shows_them_with_thumbnails(shown: dict[str, Any]) -> None:
    assert sorted(template["name"] for template in shown["templates"]) == sorted(WORKFLOWS)
    for template in shown["templates"]:
        assert template["width"] == 512, template  # the front end's own placeholder is another size


def _check_apart(boxes: list[tuple[str, float, float, float, float]]) -> None:
    for (a, left, top, width, height), (b, x, y, w, h) in itertools.combinations(boxes, 2):
        apart = left + width <= x or x + w <= left or top + height <= y or y + h <= top
        assert apart, f"{a} and {b} overlap"


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_opens(shown: dict[str, Any], name: str) -> None:
    found = shown["workflows"][name]
    assert not found["missing"] and not found["errors"] and not found["dialogs"] and not found["toasts"], found
    missing = [["CheckpointLoaderSimple", "ckpt_name", CHECKPOINT]] if name in NEED_CHECKPOINT else []
    assert found["bad_values"] == missing
    _check_apart(found["boxes"])


def _meaning(workflow: dict[str, Any]) -> dict[str, Any]:
    """What a workflow says, without what a front end may put differently."""
    nodes = {node["id"]: (node["type"], node.get("widgets_values") or [], node["mode"]) for node in workflow["nodes"]}
    types = {
        link[0]: (link[1], node["inputs"][link[4]]["name"])
        for link in workflow["links"]
        for node in workflow["nodes"]
        if node["id"] == link[3]
    }
    return {"nodes": nodes, "links": types, "groups": [group["title"] for group in workflow["groups"]]}


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_is_what_the_front_end_exports(shown: dict[str, Any], name: str) -> None:
    """No value slipped into another widget, no link was dropped."""
    assert _meaning(shown["workflows"][name]["workflow"]) == _meaning(WORKFLOWS[name])


@pytest.mark.parametrize("name", RUN)
def test_a_workflow_runs_to_a_picture(shown: dict[str, Any], server: Server, name: str) -> None:
    ran = shown["workflows"][name]["ran"]
    assert ran["outcome"] == "execution_success", ran
    _check_apart(ran["boxes"])  # previews make nodes grow
    (file,) = [image for kind, data in ran["told"] if kind == "executed" for image in data["output"]["images"]]
    saved = server.get(f"/view?filename={file['filename']}&subfolder={file['subfolder']}&type={file['type']}")
    picture = Image.open(io.BytesIO(saved))
    small = Image.open(server.base / "input" / "example.png")
    assert picture.size == (4 * small.width, 4 * small.height)
    distance = np.asarray(picture.resize(small.size, Image.Resampling.BOX), float) - np.asarray(small, float)
    assert np.abs(distance).mean() < 6, "not the same picture"


@pytest.mark.parametrize("name", NEED_CHECKPOINT)
def test_nothing_but_the_checkpoint_is_missing(shown: dict[str, Any], server: Server, name: str) -> None:
    prompt = shown["workflows"][name]["prompt"]
    with pytest.raises(Refused) as refused:
        server.run(prompt)
    errors = {
        prompt[node]["class_type"]: [error["extra_info"]["input_name"] for error in content["errors"]]
        for node, content in json.loads(str(refused.value))["node_errors"].items()
    }
    assert errors == {"CheckpointLoaderSimple": ["ckpt_name"]}
    checkpoint = server.base / "models" / "checkpoints" / CHECKPOINT
    checkpoint.write_bytes(b"no checkpoint")
    try:
        (error,) = server.run(prompt).of("execution_error")  # so everything else was accepted
    finally:
        checkpoint.unlink()
    assert error["node_type"] == "CheckpointLoaderSimple"


def test_hosts_have_the_picture_of_the_workflows(host: Host) -> None:
    pictures = {
        node["widgets_values"][0]
        for workflow in WORKFLOWS.values()
        for node in workflow["nodes"]
        if node["type"] == "LoadImage"
    }
    assert all((host.path / "input" / picture).is_file() for picture in pictures), pictures


@pytest.mark.parametrize("name", WORKFLOWS)
def test_seeds_are_fixed_and_a_note_explains(name: str) -> None:
    nodes = WORKFLOWS[name]["nodes"]
    values = [value for node in nodes for value in node.get("widgets_values", [])]
    assert ("fixed" in values) == (name != "One-node upscale")  # which has no seed
    assert not {"randomize", "increment", "decrement"} & {v for v in values if isinstance(v, str)}
    assert [node["type"] for node in nodes].count("Note") == 1


@pytest.mark.parametrize("name", WORKFLOWS)
def test_thumbnails_are_small(name: str) -> None:
    path = PACK / "workflows" / f"{name}.jpg"
    with Image.open(path) as thumbnail:
        assert thumbnail.format == "JPEG" and thumbnail.size == (512, 512)
    assert path.stat().st_size < 60_000
