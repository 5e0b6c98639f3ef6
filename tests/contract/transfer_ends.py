"""Both ends of the transfer contract, and what a process holds."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.transfer import registry
from common.transfer.base import Completion, HandleState, PeerId, Run, TransferBackend, TransferConfig, TransferError

PAGE = 16 << 10
PAGES = 512
POOL = PAGE * PAGES
TIMEOUT_S = 20.0
BOUND_S = 60.0  # far beyond what anything here takes: only a hang gets there


WHOLE = [Run(0, 0, POOL)]


class Peer:
    """A running transfer_peer.py."""

    def __init__(self, backend: str, folder: Path) -> None:
        program = Path(__file__).with_name("transfer_peer.py")
        self.process = subprocess.Popen(
            [sys.executable, str(program), backend, str(POOL)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"TMPDIR": str(folder), "OMP_NUM_THREADS": "1"},
        )
        self.descriptor = bytes.fromhex(self.answer())

    def tell(self, *command: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()

    def ask(self, *command: Any) -> Any:
        self.tell(*command)
        return self.answer()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("@"):
                return json.loads(line[1:])
        raise EOFError("the peer ended")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """SIGSTOP, and wait until it is in force."""
        os.kill(self.process.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WNOWAIT)

    def resume(self) -> None:
        os.kill(self.process.pid, signal.SIGCONT)

    def cleanup(self) -> None:
        self.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


class Writer:
    """An endpoint in this process, with its pool as an array of random bytes."""

    def __init__(self, backend: str) -> None:
        self.news = threading.Event()
        self.endpoint: TransferBackend = registry.create(backend, TransferConfig(bytes_per_s=1e9), self.news.set)
        self.pool: NDArray[np.uint8] = np.frombuffer(self.endpoint.allocate(POOL), dtype=np.uint8)
        self.pool[:] = np.random.default_rng(7).integers(0, 256, POOL, dtype=np.uint8)

    def wait(self, count: int = 1) -> list[Completion]:
        """The next completions, as they come through `wake` and `poll`."""
        ended: list[Completion] = []
        while len(ended) < count:
            self.news.clear()
            ended += self.endpoint.poll()
            if len(ended) < count:
                assert self.news.wait(BOUND_S), "no handle ended"
        return ended

    def refusal(self, peer: PeerId) -> str:
        """What becomes of a write to a peer that is not there: it is refused, or it fails."""
        try:
            completion = self.write(peer, WHOLE)
        except TransferError as error:
            return str(error)
        assert completion.state == HandleState.FAILED
        return completion.error

    def write(self, peer: PeerId, runs: Sequence[Run], timeout_s: float = TIMEOUT_S) -> Completion:
        handle = self.endpoint.submit(peer, runs, timeout_s)
        (completion,) = self.wait()
        assert completion.handle == handle
        return completion

    def write_well(self, peer: PeerId, runs: Sequence[Run]) -> None:
        completion = self.write(peer, runs)
        assert completion.state == HandleState.DONE, completion.error


def digest(pool: NDArray[np.uint8]) -> str:
    return hashlib.blake2b(pool.tobytes()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Resources:
    """What a process holds."""

    threads: int
    descriptors: int

    def __le__(self, other: Resources) -> bool:
        return self.threads <= other.threads and self.descriptors <= other.descriptors


def resources() -> Resources:
    return Resources(len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd")))


def is_mapped(address: int) -> bool:
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(bound, 16) for bound in line.split(maxsplit=1)[0].split("-"))
        if first <= address < last:
            return True
    return False


def wait_until(condition: Callable[[], bool]) -> None:
    """Give the kernel a moment to take down what has ended."""
    deadline = time.monotonic() + BOUND_S
    while not condition():
        assert time.monotonic() < deadline
        select.select([], [], [], 0.01)


def listeners() -> list[tuple[int, str, str]]:
    """Inode, address and bound device of this process's listening internet sockets."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            link = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue
        if not link.startswith("socket:"):
            continue
        with socket.socket(fileno=os.dup(int(name))) as opened:
            internet = opened.family in (socket.AF_INET, socket.AF_INET6)
            if internet and opened.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                device = opened.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16).rstrip(b"\0").decode()
                found.append((os.fstat(opened.fileno()).st_ino, str(opened.getsockname()[0]), device))
    return found
