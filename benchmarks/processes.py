"""Starts services for a benchmark and learns where they listen."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common.rpc.announce import READY_FD, Listening, parse  # noqa: E402

# A benchmark that is told to end ends what it started: the blocks below are left in order.
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))

STOP_S = 15.0
TICKS = os.sysconf("SC_CLK_TCK")


@contextmanager
def service(command: str, *flags: str) -> Iterator[Listening]:
    """`pdmesh COMMAND FLAGS` until the block ends. Yields once it has announced itself."""
    reader, writer = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", "common.cli.main", command, "--log-level", "warning", *flags],
        cwd=ROOT,
        env={**os.environ, READY_FD: str(writer)},
        pass_fds=(writer,),
        start_new_session=True,
    )
    os.close(writer)
    try:
        with os.fdopen(reader) as file:
            if not (line := file.readline()):
                raise SystemExit(f"pdmesh {command} ended with {process.wait()}")
        yield parse(line)
    finally:
        process.send_signal(signal.SIGCONT)  # it may have been stopped
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def cpu_s(pid: int) -> float:
    """CPU seconds of a process so far, in ticks of 10 ms."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def resident_mib(pid: int) -> float:
    """Memory of a process."""
    (line,) = (line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


@contextmanager
def mesh(*flags: str) -> Iterator[str]:
    """`pdmesh up FLAGS` on free ports until the block ends. Yields the URL of its router."""
    with tempfile.TemporaryDirectory() as folder:
        status = Path(folder, "status.json")
        ports = ("--port", "0", "--grpc-port", "0", "--bootstrap-port", "0", "--status-file", str(status))
        command = [sys.executable, "-m", "common.cli.main", "up", "--log-level", "warning", *ports, *flags]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
        try:
            wait_until(lambda: status.exists() or process.poll() is not None, "the mesh did not come up")
            if not status.exists():
                raise SystemExit(f"pdmesh up ended with {process.returncode}")
            (router,) = (entry for entry in json.loads(status.read_text()) if entry["role"] == "router")
            yield f"http://{router['http']}"
        finally:
            process.send_signal(signal.SIGINT)
            process.wait()


@contextmanager
def peer(command: str, url: str) -> Iterator[str]:
    """Another system, started by a shell command, until the block ends. Yields `url` once it lists a model.

    The command stays in the foreground; all that it started is ended with it.
    """
    process = subprocess.Popen(["bash", "-c", command], stdout=subprocess.DEVNULL, start_new_session=True)

    def answers() -> bool:
        if process.poll() is not None:
            raise SystemExit(f"`{command}` ended with {process.returncode}")
        with suppress(OSError, ValueError, LookupError):
            return bool(first_model(url))
        return False

    try:
        wait_until(answers, f"no answer from {url}")
        yield url
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                process.wait(STOP_S)


def first_model(url: str) -> str:
    """The first model that a front door lists."""
    with urllib.request.urlopen(f"{url}/v1/models", timeout=10) as answer:
        return str(json.load(answer)["data"][0]["id"])


def wait_until(condition: Callable[[], bool], failure: str, timeout_s: float = 180.0) -> None:
    """Poll until `condition` holds. Raises `SystemExit` with `failure` after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(failure)
        time.sleep(0.1)
