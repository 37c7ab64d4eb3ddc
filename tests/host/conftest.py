"""Real hosts to test against: COMFYUI_PATH, several separated by os.pathsep, and COMFYUI_PYTHON, one or as many.

Without COMFYUI_PATH everything in this folder is skipped. The tests of the front end also need node, the npm package
playwright-core (PLAYWRIGHT_CORE names its folder, or NODE_PATH the one around it) and Chromium (CHROMIUM names the
program, if it isn't on the PATH as chromium or google-chrome); without these they are skipped.
"""

import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from PIL import Image

PACK = Path(__file__).parents[2]
DEFAULT_WEIGHTS = PACK / "infdit_core" / "default_weights" / "infdit_nano.safetensors"


class Host(NamedTuple):
    """A checkout of ComfyUI and the interpreter that has its requirements."""

    path: Path
    python: str


def _hosts() -> list[Host]:
    paths = [Path(p) for p in os.environ.get("COMFYUI_PATH", "").split(os.pathsep) if p]
    pythons = [p for p in os.environ.get("COMFYUI_PYTHON", "").split(os.pathsep) if p] or [sys.executable]
    if len(pythons) == 1:
        pythons *= len(paths)
    if len(pythons) != len(paths):
        raise pytest.UsageError("COMFYUI_PYTHON must name one interpreter, or as many as COMFYUI_PATH names hosts")
    return [Host(path, python) for path, python in zip(paths, pythons, strict=True)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every test once a host."""
    if "host" in metafunc.fixturenames:
        hosts = _hosts()
        skip = pytest.mark.skip(reason="COMFYUI_PATH is not set: no ComfyUI to test against")
        parameters = hosts or [pytest.param(None, marks=skip)]
        metafunc.parametrize(
            "host", parameters, ids=[host.path.name for host in hosts] or ["no host"], scope="session", indirect=True
        )


@pytest.fixture(scope="session")
def host(request: pytest.FixtureRequest) -> Host:
    """The host under test."""
    found: Host = request.param
    assert (found.path / "main.py").is_file(), f"COMFYUI_PATH: {found.path} is no ComfyUI"
    return found


def environment() -> dict[str, str]:
    """Small pictures: one thread is faster than two that wait for each other."""
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


class Run(NamedTuple):
    """What a prompt did."""

    outcome: str  # execution_success, execution_error or execution_interrupted
    events: list[dict[str, Any]]
    previews: list[bytes]  # encoded pictures
    texts: list[str]  # shown on nodes
    pictures: list[bytes]  # the files of the saving nodes
    times: dict[str, float]  # of the interrupt and the end, seconds since the prompt was queued

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event["data"] for event in self.events if event["type"] == kind]

    def error(self) -> str:
        (event,) = self.of("execution_error")
        return str(event["exception_message"]).strip()


class Refused(Exception):
    """The host refused a prompt; the message is its JSON."""


class Server:
    """A running host with the pack in it, and nothing else."""

    def __init__(self, host: Host, base: Path) -> None:
        self.base = base
        for folder in ("custom_nodes", "input", "output", "user", "models/infdit", "models/checkpoints"):
            (base / folder).mkdir(parents=True)
        self.pack = "inf-dit"
        (base / "custom_nodes" / self.pack).symlink_to(PACK)
        shutil.copy(Path(__file__).parent / "faults.py", base / "custom_nodes" / "faults.py")
        shutil.copy(PACK / "docs" / "osprey.png", base / "input")
        # The picture of the workflows, which every host has: here a small one, as CPUs are slow.
        with Image.open(PACK / "docs" / "osprey.png") as osprey:
            osprey.convert("RGB").crop((100, 20, 196, 84)).resize((48, 32)).save(base / "input" / "example.png")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = base / "server.log"
        arguments = ["--cpu", "--listen", "127.0.0.1", "--port", str(self.port), "--disable-auto-launch"]
        arguments += ["--disable-api-nodes", "--base-directory", str(base)]
        arguments += ["--database-url", f"sqlite:///{base / 'user' / 'comfyui.db'}"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [host.python, "main.py", *arguments],
                cwd=host.path,
                env=environment(),
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self._wait()

    def _wait(self) -> None:
        for _ in range(600):
            if self.process.poll() is not None:
                raise RuntimeError(f"the host ended:\n{self.log.read_text()[-4000:]}")
            try:
                self.get("/system_stats")
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.2)
            else:
                return
        raise RuntimeError(f"the host doesn't answer:\n{self.log.read_text()[-4000:]}")

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=30)

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            body: bytes = answer.read()
        return body

    def json(self, path: str) -> Any:
        return json.loads(self.get(path))

    def post(self, path: str, body: Any) -> Any:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            raise Refused(error.read().decode()) from None

    def run(
        self,
        prompt: dict[str, Any],
        *,
        interrupt_after_previews: int | None = None,
        interrupt_after_steps: int | None = None,
        timeout: float = 300,
    ) -> Run:
        """Queue an API-format prompt and follow it to its end, or interrupt it after so many previews or steps."""
        websocket = pytest.importorskip("websocket", reason="the tests of the server need websocket-client")
        client = uuid.uuid4().hex
        socket_ = websocket.create_connection(f"ws://127.0.0.1:{self.port}/ws?clientId={client}", timeout=timeout)
        events: list[dict[str, Any]] = []
        previews: list[bytes] = []
        texts: list[str] = []
        times: dict[str, float] = {}
        try:
            started = time.monotonic()
            prompt_id = self.post("/prompt", {"prompt": prompt, "client_id": client})["prompt_id"]

            def interrupt() -> None:
                times["interrupt"] = time.monotonic() - started
                self.post("/interrupt", {})

            while True:
                message = socket_.recv()
                if isinstance(message, bytes):
                    kind, second = struct.unpack(">II", message[:8])
                    if kind == 3:
                        texts.append(message[8 + second :].decode())
                        continue
                    previews.append(message[8:] if kind == 1 else message[8 + second :])  # 4: with metadata
                    if len(previews) == interrupt_after_previews:
                        interrupt()
                    continue
                event = json.loads(message)
                events.append(event)
                if event["type"] == "progress" and event["data"]["value"] == interrupt_after_steps:
                    interrupt()
                ends = ("execution_success", "execution_error", "execution_interrupted")
                if event["type"] in ends and event["data"].get("prompt_id") == prompt_id:
                    times["end"] = time.monotonic() - started
                    return Run(event["type"], events, previews, texts, self._pictures(prompt_id), times)
        finally:
            socket_.close()

    def _pictures(self, prompt_id: str) -> list[bytes]:
        for _ in range(50):  # the history is written after the last message
            found = self.json(f"/history/{prompt_id}")
            if prompt_id in found:
                files = [file for output in found[prompt_id]["outputs"].values() for file in output.get("images", [])]
                return [
                    self.get(f"/view?filename={f['filename']}&subfolder={f['subfolder']}&type={f['type']}")
                    for f in files
                ]
            time.sleep(0.1)
        return []


@pytest.fixture(scope="session")
def server(host: Host, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The host, running."""
    server = Server(host, tmp_path_factory.mktemp(host.path.name))
    yield server
    server.stop()
