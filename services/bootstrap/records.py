"""Write-behind to the store: callers never wait; what changed meanwhile goes out in one commit."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from common.errors.base import MeshError
from common.obs.log import get_logger
from services.bootstrap import metrics
from services.bootstrap.store.base import ABSENT, MAX_WRITES, Entry, Outcome, Store, Write

log = get_logger(__name__)

FIRST_BACKOFF_S, LAST_BACKOFF_S = 0.1, 2.0

Make = Callable[[], bytes]


class Records:
    """Keeps keys of the store as this process last set them; of several changes of a key the last one is written.

    Each write is guarded by the key's revision as we know it: a record that another bootstrap has taken over is
    left to it. While the store is away, changes wait here.
    """

    def __init__(self, store: Store, known: list[Entry]) -> None:
        self._store = store
        self._revisions = {entry.key: entry.revision for entry in known}
        self._dirty: dict[str, Make | None] = {}
        self._writing: dict[str, Make | None] = {}
        self._news = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    def set(self, key: str, make: Make) -> None:
        """Write what `make` gives at the time of writing."""
        self._dirty[key] = make
        self._wake()

    def delete(self, key: str) -> None:
        """Remove a key; one that was never written is just forgotten."""
        if key in self._revisions or key in self._writing:
            self._dirty[key] = None
            self._wake()
        else:
            self._dirty.pop(key, None)

    async def flush(self) -> None:
        """Wait until all is written."""
        await self._idle.wait()

    async def run(self) -> None:
        """Write, for ever: one commit at a time, as many records in it as are waiting, up to MAX_WRITES."""
        backoff_s = FIRST_BACKOFF_S
        while True:
            await self._news.wait()
            try:
                await self._write_some()
                backoff_s = FIRST_BACKOFF_S
            except MeshError as error:
                metrics.STORE_FAILURES.inc()
                log.warning("cannot write to the store, will try again", error=error.message, pending=len(self._dirty))
                await asyncio.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, LAST_BACKOFF_S)

    async def _write_some(self) -> None:
        keys = list(self._dirty)[:MAX_WRITES]
        self._writing = {key: self._dirty.pop(key) for key in keys}
        writes = [
            Write(key, make() if make else None, self._revisions.get(key, ABSENT))
            for key, make in self._writing.items()
        ]
        try:
            with metrics.STORE_COMMIT_SECONDS.time():
                outcomes = await self._store.commit(writes) if writes else []
        except MeshError:
            self._dirty = {**self._writing, **self._dirty}
            raise
        finally:
            self._writing = {}
        for write, outcome in zip(writes, outcomes, strict=True):
            self._settle(write, outcome)
        metrics.STORE_WRITES.inc(len(writes))
        metrics.STORE_PENDING.set(len(self._dirty))
        if not self._dirty:
            self._news.clear()
            self._idle.set()

    def _settle(self, write: Write, outcome: Outcome) -> None:
        """Note the revision. A write that was left out may have got through before, in a commit that seemed to fail."""
        current = outcome.current
        if not outcome.applied and (current.value if current else None) != write.value:
            log.error("a record belongs to another bootstrap now", key=write.key)
        if current:
            self._revisions[write.key] = current.revision
        else:
            self._revisions.pop(write.key, None)

    def _wake(self) -> None:
        metrics.STORE_PENDING.set(len(self._dirty))
        self._idle.clear()
        self._news.set()
