"""Starts services for a benchmark and learns where they listen."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common.rpc.announce import READY_FD, Listening, parse  # noqa: E402

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
