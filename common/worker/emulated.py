"""Emulated workers, one or many in a process: each a whole front, whose rank takes its turns on the same event loop.

A rank of its own process is there so that a model's steps and the network share no GIL. An emulated engine has no
such steps: between two turns it only waits.
"""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import AsyncIterator, Callable
from typing import TypeVar

from common.errors.base import MeshError, Reason
from common.obs.log import get_logger
from common.worker.config import WorkerConfig
from common.worker.front import Front, Role
from common.worker.loop import AUDIT_POLL_MS, PENDING_POLL_MS, RankTurns
from common.worker.messages import FromRank
from common.worker.process import Rank
from common.worker.ranks import ForRank
from common.worker.start import RankStart
from common.worker.waker import Waker

log = get_logger(__name__)

E = TypeVar("E")
Make = Callable[[RankStart, WorkerConfig, Waker], Rank]

# Steps without times come as fast as the processor goes, which many sequences share: told as one for longer, they
# leave it time for other things.
BURST_S = 0.005


class LocalRank(RankTurns):
    """A `RankLink` to a rank in this process. All of it belongs to the event loop that made it."""

    def __init__(self, make: Make, config: WorkerConfig) -> None:
        self._loop = asyncio.get_running_loop()
        rank = make(RankStart("", 0, 0, b""), config, LoopWaker(self._loop, self._soon))
        super().__init__(rank.engine)
        self._burst_s = BURST_S
        self.ready = rank.ready
        self._handover = rank.handover(self.emit)
        self._close = rank.close
        self._inbox: list[ForRank] = []
        self._batches: asyncio.Queue[FromRank | None] = asyncio.Queue()
        self._turn: asyncio.Handle | None = None
        self._turns_at_once = False
        self._ended = self._closed = False

    def send(self, message: ForRank) -> None:
        self._inbox.append(message)
        self._soon()

    async def batches(self) -> AsyncIterator[FromRank]:
        while (batch := await self._batches.get()) is not None:
            yield batch
        if not self._stopping:
            raise MeshError(Reason.WORKER_LOST, "the emulated rank failed; the log has the error")

    async def stop(self, timeout_s: float = 10.0) -> None:
        if self._closed:
            return
        self._stopping = self._closed = True
        self._end()
        await asyncio.to_thread(self._handover.close)
        self._close()

    def _soon(self) -> None:
        """Take a turn as soon as the loop has handled what is ready, once for all who ask until then."""
        if self._ended or (self._turn and self._turns_at_once):
            return
        if self._turn:
            self._turn.cancel()
        self._turn, self._turns_at_once = self._loop.call_soon(self._take_turn), True

    def _take_turn(self) -> None:
        self._turn, self._turns_at_once = None, False
        try:
            wait_s = self._one_turn()
        except Exception:
            log.exception("an emulated rank failed")
            self._end()
            return
        if wait_s == 0:
            self._soon()
        elif wait_s is None:
            wait_s = (PENDING_POLL_MS if self._handover.pending else AUDIT_POLL_MS) / 1000
        if wait_s and not self._turn:
            self._turn = self._loop.call_later(wait_s, self._take_turn)

    def _one_turn(self) -> float | None:
        inbox, self._inbox = self._inbox, []
        for message in inbox:
            self._apply(message)
        self._handover.poll()
        wait_s = self._step()
        if batch := self._take():
            self._batches.put_nowait(batch)
        return wait_s

    def _end(self) -> None:
        self._ended = True
        if self._turn:
            self._turn.cancel()
        self._batches.put_nowait(None)


class LoopWaker(Waker):
    """Wakes a turn on an event loop, from any thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop, soon: Callable[[], None]) -> None:
        self.fd = -1
        self._loop = loop
        self._soon = soon

    def wake(self) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._soon)


class LocalFront(Front[E]):
    """A front whose rank is a `LocalRank`. `registered` is set once bootstrap knows it."""

    def __init__(self, role: Role[E], config: WorkerConfig) -> None:
        super().__init__(role, config)
        self._make: Make = importlib.import_module(role.rank_module).make
        self.registered = asyncio.Event()

    async def _spawn_rank(self, stop: asyncio.Event) -> bool:
        self._rank = LocalRank(self._make, self.config)
        return True

    async def _register(self, stop: asyncio.Event) -> None:
        await super()._register(stop)
        self.registered.set()


def make_front(role: Role[E], config: WorkerConfig) -> Front[E]:
    """A worker: with a rank process for an engine that computes, without one for an emulated engine."""
    kind = LocalFront if config.engine.engine == "emulated" else Front
    return kind(role, config)
