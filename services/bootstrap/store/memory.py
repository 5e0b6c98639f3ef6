"""A store in this process: for one machine, and for whoever tests against bootstrap."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence

from services.bootstrap.store.base import ABSENT, Change, Changes, Entry, Outcome, Write, check


class MemoryStore:
    """Keys live as long as the object. `history` is the number of changes that a watch can look back."""

    durable = False
    in_touch = True

    def __init__(self, history: int = 1000) -> None:
        self._entries: dict[str, Entry] = {}
        self._revision = 1
        self._log: deque[Change] = deque()
        self._history = history
        self._forgotten = 0  # changes up to this revision are no longer in the log
        self._changed = asyncio.Condition()
        self._announced: set[str] = set()

    async def start(self) -> None:
        """Nothing to reach."""

    async def close(self) -> None:
        for key in self._announced & self._entries.keys():
            await self.commit([Write(key, None)])
        self._announced.clear()

    async def get(self, key: str) -> Entry | None:
        return self._entries.get(key)

    async def scan(self, prefix: str) -> tuple[list[Entry], int]:
        return [self._entries[key] for key in sorted(self._entries) if key.startswith(prefix)], self._revision

    async def commit(self, writes: Sequence[Write]) -> list[Outcome]:
        check(writes)
        revision = self._revision + 1
        outcomes = [self._apply(write, revision) for write in writes]
        if any(outcome.applied for outcome in outcomes):
            self._revision = revision
            async with self._changed:
                self._changed.notify_all()
        return outcomes

    async def announce(self, key: str, value: bytes) -> None:
        self._announced.add(key)
        await self.commit([Write(key, value)])

    async def watch(self, prefix: str, after: int | None = None) -> AsyncIterator[Changes]:
        while True:
            if after is None or after < self._forgotten:
                entries, after = await self.scan(prefix)
                snapshot = tuple(Change(entry.key, entry.value, entry.revision) for entry in entries)
                yield Changes(snapshot, after, snapshot=True)
            seen = after
            async with self._changed:
                await self._changed.wait_for(lambda seen=seen: self._revision > seen)  # type: ignore[misc]
            if seen < self._forgotten:
                continue
            after = self._revision
            changes = tuple(c for c in self._log if c.revision > seen and c.key.startswith(prefix))
            if changes:
                yield Changes(changes, after)

    def _apply(self, write: Write, revision: int) -> Outcome:
        entry = self._entries.get(write.key)
        if write.expected is not None and write.expected != revision_of(entry):
            return Outcome(False, entry)
        if write.guard and write.guard.revision != revision_of(self._entries.get(write.guard.key)):
            return Outcome(False, entry)
        if write.value is None:
            if entry is None:
                return Outcome(True, None)
            del self._entries[write.key]
            self._record(Change(write.key, None, revision))
            return Outcome(True, None)
        self._entries[write.key] = Entry(write.key, write.value, revision)
        self._record(Change(write.key, write.value, revision))
        return Outcome(True, self._entries[write.key])

    def _record(self, change: Change) -> None:
        self._log.append(change)
        while len(self._log) > self._history:
            self._forgotten = self._log.popleft().revision


def revision_of(entry: Entry | None) -> int:
    return entry.revision if entry else ABSENT
