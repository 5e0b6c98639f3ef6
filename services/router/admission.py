"""How many requests run at once, and how many wait."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from common.errors.base import MeshError, Reason
from services.router import metrics


class Admission:
    """A bounded queue, first in first out, in front of a bounded number of slots."""

    def __init__(self, max_running: int, max_queued: int, queue_timeout_s: float) -> None:
        self._slots = asyncio.Semaphore(max_running)
        self._max_queued = max_queued
        self._queue_timeout_s = queue_timeout_s
        self.queued = 0

    @asynccontextmanager
    async def slot(self, deadline: float) -> AsyncIterator[None]:
        """Hold a slot. `deadline` is in the event loop's time.

        Raises `MeshError`: OVERLOADED when the queue is full or the wait is too long, DEADLINE_EXCEEDED.
        """
        if self._slots.locked():
            await self._wait(deadline)
        else:
            await self._slots.acquire()
        try:
            yield
        finally:
            self._slots.release()

    async def _wait(self, deadline: float) -> None:
        if self.queued >= self._max_queued:
            raise MeshError(Reason.OVERLOADED, f"{self.queued} requests wait already", retry_after_s=1.0)
        patience = asyncio.get_running_loop().time() + self._queue_timeout_s
        self.queued += 1
        metrics.QUEUED.inc()
        try:
            async with asyncio.timeout_at(min(patience, deadline)):
                await self._slots.acquire()
        except TimeoutError:
            if deadline <= patience:
                raise MeshError(Reason.DEADLINE_EXCEEDED, "the deadline passed in the router's queue") from None
            message = f"no slot became free within {self._queue_timeout_s:g} s"
            raise MeshError(Reason.OVERLOADED, message, retry_after_s=1.0) from None
        finally:
            self.queued -= 1
            metrics.QUEUED.dec()
