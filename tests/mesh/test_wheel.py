"""The installed wheel, away from the checkout: its command starts a mesh that answers."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
import venv
from pathlib import Path

import pytest

from tests.mesh.harness import ROOT, running

pytestmark = [pytest.mark.mesh, pytest.mark.slow, pytest.mark.timeout(1200)]


def run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a fresh environment that holds the wheel and what it needs, nothing of the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT)
    (wheel,) = folder.glob("pdmesh-*.whl")
    venv.create(folder / "venv", with_pip=True)
    bin = folder / "venv" / "bin"
    pip = (bin / "python", "-m", "pip", "--disable-pip-version-check", "install", "--quiet")
    constraints = ("--constraint", ROOT / "deploy" / "constraints.txt")
    run(*pip, *constraints, "torch")
    run(*pip, *constraints, wheel)
    return bin


def test_up_from_the_wheel(installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    where = run(installed / "python", "-c", "import common, services, pdmesh; print(common.__file__)")
    assert str(ROOT) not in where
    assert run(installed / "pdmesh", "--version").startswith("pdmesh ")
    body = {"messages": [{"role": "user", "content": "What is 123 + 456?"}], "model": "adder", "temperature": 0}
    with running(command=(str(installed / "pdmesh"),)) as mesh:
        request = urllib.request.Request(
            f"{mesh.http}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            answer = json.load(response)
    assert answer["choices"][0]["message"]["content"] == "579"
