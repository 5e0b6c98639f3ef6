"""One end of a transfer that `pdmesh doctor --transfer` measures: a process that does what its parent asks.

Each line of standard input is a command, a JSON array of a name and arguments; each line of standard output is its
answer, `["ok", value]` or `["error", sentence]`. What an engine prints goes to standard error. The process ends at
the end of its input.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from common.errors.base import MeshError
from common.transfer.base import HandleState, PeerId, Run, TransferBackend, TransferError
from common.transfer.registry import create
from common.worker.config import WorkerConfig
from common.worker.transfer import transfer_config

PAGE_BYTES, PAGES = 16 << 10, 4096
POOL_BYTES = PAGE_BYTES * PAGES
SMALL_BYTES = 4 << 10
TIMEOUT_S = 20.0
PAUSE_S = 0.002  # between small writes, so that each finds both sides at rest
# Pages in an order in which no two are neighbours: odd steps meet every page of a power of two once.
PAGE_ORDER = np.arange(PAGES)
SOURCE_PAGES, TARGET_PAGES = PAGE_ORDER * 2731 % PAGES, PAGE_ORDER * 1597 % PAGES
SHAPES = {
    "piece": [Run(0, 0, POOL_BYTES)],
    "pages": [
        Run(source * PAGE_BYTES, target * PAGE_BYTES, PAGE_BYTES)
        for source, target in zip(SOURCE_PAGES.tolist(), TARGET_PAGES.tolist(), strict=True)
    ],
}

Bytes = NDArray[np.uint8]


def pattern() -> Bytes:
    """What the writer's pool holds; the same in both processes."""
    return np.random.default_rng(1).integers(0, 2**63, POOL_BYTES // 8, dtype=np.int64).view(np.uint8)


class Probe:
    """An endpoint with a pool of 64 MiB. Every public method is a command."""

    def __init__(self) -> None:
        self._news = threading.Event()
        self._endpoint: TransferBackend
        self._pool: Bytes
        self._peer: PeerId
        self._payloads: list[bytes] = []

    def open(self, config: str, writer: bool) -> str:
        """Start the endpoint of a worker with this config; its descriptor."""
        worker = msgspec.json.decode(config, type=WorkerConfig)
        self._endpoint = create(worker.transfer_backend, transfer_config(worker), self._news.set)
        self._pool = np.frombuffer(self._endpoint.allocate(POOL_BYTES), dtype=np.uint8)
        self._pool[:] = pattern() if writer else 0
        return self._endpoint.export().hex()

    def connect(self, descriptor: str) -> None:
        self._peer = self._endpoint.connect(bytes.fromhex(descriptor))

    def write(self, shape: str, times: int) -> list[float]:
        """Seconds of each of so many writes."""
        return [self._write(SHAPES[shape]) for _ in range(times)]

    def verify(self, shape: str) -> bool:
        """Whether the pool holds what that write brings."""
        wanted = pattern()
        if shape == "piece":
            return bool(np.array_equal(self._pool, wanted))
        pages, sources = self._pool.reshape(PAGES, PAGE_BYTES), wanted.reshape(PAGES, PAGE_BYTES)
        return bool(np.array_equal(pages[TARGET_PAGES], sources[SOURCE_PAGES]))

    def send(self, count: int) -> list[float]:
        """Small writes, each with a notice after it; when each began, on the machine's monotonic clock."""
        began = []
        for number in range(count):
            began.append(time.monotonic())
            self._write([Run(0, 0, SMALL_BYTES)])
            self._endpoint.notify(self._peer, str(number).encode())
            time.sleep(PAUSE_S)
        return began

    def receive(self, count: int) -> list[float]:
        """When each of so many notices was here."""
        came: list[float] = []
        while len(came) < count:
            came += [time.monotonic()] * len(self._endpoint.received())
            if len(came) < count:
                self._wait()
        return came

    def memcpy(self, shape: str, times: int) -> list[float]:
        """Seconds that this process takes for the same copies within its own memory: the floor."""
        target = np.zeros(POOL_BYTES, dtype=np.uint8)
        from_address, to_address = self._pool.ctypes.data, target.ctypes.data
        seconds = []
        for _ in range(times):
            began = time.monotonic()
            for run in SHAPES[shape]:
                ctypes.memmove(to_address + run.remote_offset, from_address + run.local_offset, run.nbytes)
            seconds.append(time.monotonic() - began)
        return seconds

    def close(self) -> None:
        self._endpoint.close()

    def _write(self, runs: list[Run]) -> float:
        self._endpoint.submit(self._peer, runs, TIMEOUT_S)
        while not (ended := self._endpoint.poll()):
            self._wait()
        if ended[0].state is not HandleState.DONE:
            raise TransferError(ended[0].error)
        return ended[0].seconds

    def _wait(self) -> None:
        if not self._news.wait(TIMEOUT_S):
            raise TransferError(f"nothing came of it within {TIMEOUT_S:g} s")
        self._news.clear()


def main() -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    probe = Probe()
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        command: Callable[..., Any] = getattr(probe, name)
        try:
            answer = ["ok", command(*arguments)]
        except (TransferError, MeshError) as error:
            answer = ["error", str(error)]
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main()
