"""Temporary folders. What a killed process leaves of them is removed by the next that makes one of their kind."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path


def make_folder(prefix: str, parent: str | None = None) -> Path:
    """A new folder for this process alone, `<prefix><pid>-…`. Those of processes that have ended are removed."""
    remove_leftovers(prefix, parent)
    return Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-", dir=parent))


def remove_leftovers(prefix: str, parent: str | None = None) -> None:
    """Remove the folders of `prefix` whose process was killed before it could do so itself."""
    for folder in Path(parent or tempfile.gettempdir()).glob(f"{prefix}*-*"):
        pid = folder.name.removeprefix(prefix).split("-")[0]
        if pid.isdigit() and not is_alive(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)


def is_alive(pid: int) -> bool:
    """Whether there is a process of this id."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
