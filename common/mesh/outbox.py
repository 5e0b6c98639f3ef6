"""What waits to be sent on a stream: everything queued in one turn of the event loop goes in one message."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Generic, TypeVar

from common.errors.base import MeshError, Reason

T = TypeVar("T")

LIMIT = 100_000


class Outbox(Generic[T]):
    """An ordered queue that is emptied in batches. For one event loop, any writers, one reader."""

    def __init__(self, limit: int = LIMIT) -> None:
        self._items: list[T] = []
        self._limit = limit
        self._news = asyncio.Event()
        self._closed = False
        self._error: Exception | None = None

    def __len__(self) -> int:
        return len(self._items)

    def put(self, item: T) -> None:
        """Queue `item`; after `close` it is dropped. A reader that stalls for too long ends its stream."""
        if self._closed:
            return
        self._items.append(item)
        self._news.set()
        if len(self._items) >= self._limit:
            self._items.clear()
            self.close(MeshError(Reason.OVERLOADED, f"{self._limit} events wait on a stream that is not read"))

    def close(self, error: Exception | None = None) -> None:
        """End `batches` after what is queued, by raising `error` if there is one. Idempotent."""
        if not self._closed:
            self._closed, self._error = True, error
            self._news.set()

    async def batches(self) -> AsyncIterator[list[T]]:
        """Batches of at least one item, in order, until closed."""
        while True:
            while not self._items:
                if self._error:
                    raise self._error
                if self._closed:
                    return
                self._news.clear()
                await self._news.wait()
            batch, self._items = self._items, []
            yield batch
