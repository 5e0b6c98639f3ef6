"""Temporary folders and what killed processes leave of them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from common.config.temporary import make_folder

pytestmark = pytest.mark.unit


def test_folders_of_the_dead_are_removed(tmp_path: Path) -> None:
    dead, ours, other = (
        tmp_path / name for name in ("pdmesh-x-4194305-a", f"pdmesh-x-{os.getpid()}-a", "pdmesh-x-y-a")
    )
    for folder in (dead, ours, other):
        folder.mkdir()
        (folder / "socket").touch()
    made = make_folder("pdmesh-x-", str(tmp_path))
    assert sorted(tmp_path.iterdir()) == sorted([ours, other, made])
    assert made.stat().st_mode & 0o777 == 0o700
