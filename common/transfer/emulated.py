"""Transfer that takes time and moves nothing: for emulated engines, whose pools have no memory.

A transfer ends `latency_s + bytes / bytes_per_s` after it was submitted; those to one peer share a wire, on which
their bytes follow one another while their latencies overlap. Everything else is real: the control channel, its
notices, peers that die, incarnations, deadlines and fencing. There are no threads that write: the channel's waits.
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Callable

from common.transfer.base import Capabilities, HandleState, TransferBackend, TransferConfig, TransferError, Wake
from common.transfer.channel import Link
from common.transfer.endpoint import Endpoint, Pool
from common.transfer.peers import Descriptor, Session
from common.transfer.sender import Transfer, Writer


def load() -> None:
    """Nothing to import."""


def create(config: TransferConfig, wake: Wake) -> TransferBackend:
    """An endpoint; `config` says how long transfers take."""
    return EmulatedEndpoint(config, wake)


class EmulatedEndpoint(Endpoint):
    """Endpoint of the emulated backend. `register` takes any address: the pool is never touched."""

    name = "emulated"
    capabilities = Capabilities(moves_bytes=False)
    settle_s = 0.0

    def __init__(self, config: TransferConfig, wake: Wake) -> None:
        super().__init__(config, wake)
        self._order = itertools.count()
        self._on_the_wire: list[tuple[float, int, Transfer]] = []  # a heap by arrival

    def send(self, transfer: Transfer, arrives_at: float) -> None:
        """End a transfer when its time has come."""
        if arrives_at <= time.monotonic():
            self._finish(transfer, HandleState.DONE, "")
            return
        with self._lock:
            heapq.heappush(self._on_the_wire, (arrives_at, next(self._order), transfer))
        _, channel, _ = self._begun()
        channel.poke()

    def on_tick(self) -> float | None:
        arrived: list[Transfer] = []
        now = time.monotonic()
        with self._lock:
            while self._on_the_wire and self._on_the_wire[0][0] <= now:
                arrived.append(heapq.heappop(self._on_the_wire)[2])
            next_s = self._on_the_wire[0][0] - now if self._on_the_wire else None
        for transfer in arrived:
            self._finish(transfer, HandleState.DONE, "")
        deadline_s = super().on_tick()
        return min((wait for wait in (next_s, deadline_s) if wait is not None), default=None)

    def make_way(self, descriptor: Descriptor, link: Link, session: Session) -> Wire:
        _, _, peers = self._begun()
        return Wire(self, lambda: peers.closed(session))

    def _start_engine(self, pool: Pool) -> None:
        return

    def _engine_info(self) -> bytes:
        return b""

    def _open_writer(self, pool: Pool, peer: Descriptor, link: Link) -> Writer:
        raise TransferError("nothing is written here")

    def _stop_engine(self) -> None:
        return


class Wire:
    """The way to one peer, in place of threads that write. Used under no lock, by whoever submits."""

    def __init__(self, endpoint: EmulatedEndpoint, on_closed: Callable[[], None]) -> None:
        self._endpoint = endpoint
        self._on_closed = on_closed
        self._free_at = 0.0

    def put(self, transfer: Transfer) -> None:
        """Send it after what was put before."""
        config = self._endpoint.config
        now = time.monotonic()
        bytes_s = transfer.nbytes / config.bytes_per_s if config.bytes_per_s else 0.0
        transfer.begun = max(self._free_at, now)
        self._free_at = transfer.begun + bytes_s
        self._endpoint.send(transfer, self._free_at + config.latency_s)

    def stop(self) -> None:
        """Nothing runs: whoever calls has ended the transfers."""
        self._on_closed()

    def is_writing(self, transfer: Transfer) -> bool:
        """Never."""
        return False
