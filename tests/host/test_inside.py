"""The pack in a host's own process: what `inside.py` checks, one test each."""

import ast
import json
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from conftest import PACK, Host, environment  # type: ignore[import-not-found]

SCRIPT = Path(__file__).parent / "inside.py"
CHECKS = [
    statement.name
    for statement in ast.parse(SCRIPT.read_text()).body
    if isinstance(statement, ast.FunctionDef)
    and any(isinstance(d, ast.Name) and d.id == "check" for d in statement.decorator_list)
]


@lru_cache
def _outcome(host: Host, folder: Path) -> dict[str, Any]:
    command = [host.python, str(SCRIPT), str(host.path), str(PACK), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment(), timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    outcome: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return outcome


@pytest.fixture(scope="session")
def outcome(host: Host, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What every check in this host came to."""
    return _outcome(host, tmp_path_factory.mktemp("inside"))


@pytest.mark.parametrize("name", CHECKS)
def test_inside(outcome: dict[str, Any], name: str) -> None:
    assert outcome["results"][name] is None, outcome["results"][name]


def test_the_pack_loads_quickly(outcome: dict[str, Any]) -> None:
    """Beyond torch, which the host has loaded before."""
    assert outcome["import_seconds"] < 0.3
