"""Alarms by key: one heap, one handle in the event loop."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class Timers(Generic[K]):
    """At most one alarm a key; setting it again moves it. `now` is any clock in seconds.

    `due` is plain data in, plain data out; `run` drives it in an event loop.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._when: dict[K, float] = {}
        self._heap: list[tuple[float, int, K]] = []  # holds outdated entries, dropped when they surface
        self._count = 0
        self._earlier = asyncio.Event()

    def __len__(self) -> int:
        return len(self._when)

    def set(self, key: K, when: float) -> None:
        if self._when.get(key) == when:
            return
        self._when[key] = when
        self._push(key, when)
        if self._heap[0][0] == when:
            self._earlier.set()
        if len(self._heap) > 2 * len(self._when) + 1024:
            self._heap = []
            for key, when in self._when.items():
                self._push(key, when)

    def cancel(self, key: K) -> None:
        self._when.pop(key, None)

    def due(self) -> list[K]:
        """Take the keys whose time has come, earliest first."""
        keys = []
        now = self._now()
        while self._heap and self._heap[0][0] <= now:
            when, _, key = heapq.heappop(self._heap)
            if self._when.get(key) == when:
                del self._when[key]
                keys.append(key)
        return keys

    async def run(self, fire: Callable[[K], None]) -> None:
        """Call `fire` for every alarm, for ever."""
        while True:
            self._earlier.clear()
            for key in self.due():
                fire(key)
            delay = max(0.0, self._heap[0][0] - self._now()) if self._heap else None
            try:
                async with asyncio.timeout(delay):
                    await self._earlier.wait()
            except TimeoutError:
                continue

    def _push(self, key: K, when: float) -> None:
        self._count += 1
        heapq.heappush(self._heap, (when, self._count, key))
