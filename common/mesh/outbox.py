"""What waits to be sent on a stream: everything queued in one turn of the event loop goes in one message."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Generic, TypeVar

from common.errors.base import MeshError, Reason

T = TypeVar("T")

LIMIT = 100_000
# How long news that nobody waits for looks for company. A message on a stream costs both its ends some 100 µs,
# however little is in it.
LEISURE_S = 0.005


class Outbox(Generic[T]):
    """An ordered queue that is emptied in batches. For one event loop, any writers, one reader."""

    def __init__(self, limit: int = LIMIT) -> None:
        self._items: list[T] = []
        self._limit = limit
        self._news = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False
        self._error: Exception | None = None

    def __len__(self) -> int:
        return len(self._items)

    def put(self, item: T) -> None:
        """Queue `item`; after `close` it is dropped. A reader that stalls for too long ends its stream."""
        self._add(item)
        self._news.set()

    def put_at_leisure(self, item: T) -> None:
        """Queue `item`, in its turn, for the next batch that leaves, or for one within `LEISURE_S`."""
        self._add(item)
        if self._timer is None and not self._news.is_set():
            self._timer = asyncio.get_running_loop().call_later(LEISURE_S, self._wake)

    def _add(self, item: T) -> None:
        if self._closed:
            return
        self._items.append(item)
        if len(self._items) >= self._limit:
            self._items.clear()
            self.close(MeshError(Reason.OVERLOADED, f"{self._limit} events wait on a stream that is not read"))

    def close(self, error: Exception | None = None) -> None:
        """End `batches` after what is queued, by raising `error` if there is one. Idempotent."""
        if not self._closed:
            self._closed, self._error = True, error
            self._wake()

    def _wake(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None
        self._news.set()

    async def batches(self) -> AsyncIterator[list[T]]:
        """Batches of at least one item, in order, until closed."""
        while True:
            await self._news.wait()
            if self._items:
                batch, self._items = self._items, []
                if not self._closed:
                    self._news.clear()
                yield batch
            elif self._closed:
                if self._error:
                    raise self._error
                return
            else:
                self._news.clear()
