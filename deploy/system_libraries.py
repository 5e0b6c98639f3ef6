"""Puts the system libraries that Mooncake's wheel needs beside the environment. `make setup` runs it.

    .venv/bin/python deploy/system_libraries.py

The wheel links libibverbs, which Linux images often lack, also where no RDMA device will ever be used. Where
Debian's packages can be fetched, they are unpacked into `{sys.prefix}/lib/pdmesh`, from where
`common/transfer/mooncake.py` loads them; nothing is installed system-wide and root is not needed. Where they
cannot, this says so and succeeds: only the `mooncake` transfer backend is missing then.

Standard library only. Idempotent: what already loads is left alone.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

# (file the loader asks for, Debian's package), each after what it needs itself
LIBRARIES = (
    ("libnl-3.so.200", "libnl-3-200"),
    ("libnl-route-3.so.200", "libnl-route-3-200"),
    ("libibverbs.so.1", "libibverbs1"),
)
BY_HAND = "Install Debian's or Ubuntu's libibverbs1, or your distribution's rdma-core, to use Mooncake."
COMMAND_TIMEOUT_S = 180


class FetchError(Exception):
    """The packages cannot be had here; the message says why."""


def target_folder() -> Path:
    return Path(sys.prefix) / "lib" / "pdmesh"


def loads(folder: Path, name: str) -> bool:
    """Whether `name` loads from the system or from `folder`; it stays loaded for those that need it."""
    for candidate in (name, str(folder / name)):
        try:
            ctypes.CDLL(candidate, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return True
    return False


def missing_packages(folder: Path) -> list[str]:
    return [package for name, package in LIBRARIES if not loads(folder, name)]


def command(arguments: list[str], folder: Path) -> None:
    """Run a tool in `folder`. Raises `FetchError` with the last line it said."""
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C"}
    try:
        done = subprocess.run(
            arguments, cwd=folder, env=environment, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        raise FetchError(f"{arguments[0]} took longer than {COMMAND_TIMEOUT_S} s") from None
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()[-1]
        raise FetchError(f"{arguments[0]} failed: {said}")


def download(packages: list[str], folder: Path) -> None:
    """Fetch packages into `folder`, with the system's package lists or, without usable ones, private lists."""
    apt = ["apt-get", "-q", "-o", "APT::Sandbox::User="]
    try:
        command([*apt, "download", *packages], folder)
    except FetchError:
        state = folder / "apt"
        for part in ("lists/partial", "cache/archives/partial"):
            (state / part).mkdir(parents=True)
        apt += ["-o", f"Dir::State::lists={state}/lists", "-o", f"Dir::Cache={state}/cache", "-o", "Debug::NoLocking=1"]
        command([*apt, "update"], folder)
        command([*apt, "download", *packages], folder)


def fetch(packages: list[str], destination: Path) -> None:
    """Put the packages' libraries into `destination`. Raises `FetchError`."""
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise FetchError(f"this system has no {tool}")
    with tempfile.TemporaryDirectory(prefix="pdmesh-setup-") as name:
        work = Path(name)
        download(packages, work)
        for archive in sorted(work.glob("*.deb")):
            command(["dpkg-deb", "-x", str(archive), "unpacked"], work)
        destination.mkdir(parents=True, exist_ok=True)
        for library, package in LIBRARIES:
            if package not in packages:
                continue
            found = next((work / "unpacked").rglob(library), None)
            if found is None:
                raise FetchError(f"Debian's {package} holds no {library}")
            shutil.copyfile(found.resolve(), destination / library)


def main() -> int:
    if importlib.util.find_spec("mooncake") is None:
        print("system libraries: Mooncake is not installed, nothing is needed")
        return 0
    folder = target_folder()
    packages = missing_packages(folder)
    if not packages:
        print("system libraries: all there")
        return 0
    try:
        fetch(packages, folder)
        if still := missing_packages(folder):
            raise FetchError(f"{', '.join(still)} does not load after it was unpacked")
    except (FetchError, OSError) as error:
        print(f"system libraries: {error}. The mooncake transfer backend will not load. {BY_HAND}", file=sys.stderr)
        return 0
    print(f"system libraries: {', '.join(packages)} unpacked into {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
