"""The set-up step that fetches Mooncake's system libraries: what it says where it cannot."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from common.transfer import mooncake

pytestmark = pytest.mark.unit


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    path = Path(__file__).parents[2] / "deploy" / "system_libraries.py"
    spec = importlib.util.spec_from_file_location("system_libraries", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "target_folder", lambda: tmp_path / "lib")
    return module


def test_it_fetches_what_the_backend_preloads(step: ModuleType) -> None:
    assert tuple(name for name, _ in step.LIBRARIES) == mooncake._LIBRARIES


def test_without_apt_it_says_so_and_succeeds(
    step: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(step.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(step, "missing_packages", lambda folder: ["libibverbs1"])
    monkeypatch.setenv("PATH", str(tmp_path))
    assert step.main() == 0
    said = capsys.readouterr().err
    assert "this system has no apt-get" in said
    assert "Install Debian's or Ubuntu's libibverbs1" in said


def test_a_failing_download_is_told_and_succeeds(
    step: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for tool in ("apt-get", "dpkg-deb"):
        (tmp_path / tool).write_text("#!/bin/sh\necho 'E: no network' >&2\nexit 100\n")
        (tmp_path / tool).chmod(0o755)
    monkeypatch.setattr(step.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(step, "missing_packages", lambda folder: ["libibverbs1"])
    monkeypatch.setenv("PATH", str(tmp_path))
    assert step.main() == 0
    assert "apt-get failed: E: no network" in capsys.readouterr().err
    assert not (tmp_path / "lib").exists()
