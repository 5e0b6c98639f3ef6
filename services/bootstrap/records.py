"""Write-behind to the store: callers never wait; what changed meanwhile goes out in one commit."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from itertools import chain

from common.errors.base import MeshError
from common.obs.log import get_logger
from services.bootstrap import metrics
from services.bootstrap.store.base import ABSENT, MAX_WRITES, Entry, Guard, Outcome, Store, Write

log = get_logger(__name__)

FIRST_BACKOFF_S, LAST_BACKOFF_S = 0.1, 2.0
# From the beginning of one commit to that of the next, unless there is more than one commit's worth: a record that
# changes several times within it is written once.
WINDOW_S = 0.02
# A commit that takes so long means that the store is away, though it may yet succeed.
LATE_S = 1.0

Make = Callable[[], bytes]
Change = tuple[Make | None, Guard | None]


class Records:
    """Keeps keys of the store as this process last set them; of several changes of a key the last one is written.

    Each write is guarded: by the shard that the record belongs to, or else by the key's own revision as we know it.
    A record that another bootstrap has taken over is left to it, and `on_fenced` hears of the guard that no longer
    holds. While the store is away, changes wait here; `on_away` hears for how many seconds it has been when that is
    noticed, `on_back` when something is written again.
    """

    def __init__(
        self,
        store: Store,
        known: Iterable[Entry],
        on_fenced: Callable[[Guard], None] | None = None,
        on_away: Callable[[float], None] = lambda seconds: None,
        on_back: Callable[[], None] = lambda: None,
    ) -> None:
        self._store = store
        self._on_fenced = on_fenced
        self._on_away, self._on_back = on_away, on_back
        self._away = False
        self._revisions = {entry.key: entry.revision for entry in known}
        self._dirty: dict[str, Change] = {}
        self._writing: dict[str, Change] = {}
        self._news = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._step = asyncio.Event()

    def know(self, entries: Iterable[Entry]) -> None:
        """Take note of records that were written by others and are ours now."""
        self._revisions.update((entry.key, entry.revision) for entry in entries)

    def set(self, key: str, make: Make, guard: Guard | None = None) -> None:
        """Write what `make` gives at the time of writing."""
        self._dirty[key] = make, guard
        self._wake()

    def delete(self, key: str, guard: Guard | None = None) -> None:
        """Remove a key; one that was never written is just forgotten."""
        if key in self._revisions or key in self._writing:
            self._dirty[key] = None, guard
            self._wake()
        else:
            self._dirty.pop(key, None)

    def drop(self, guard: Guard) -> None:
        """Forget what was to be written under a guard that no longer holds."""
        self._dirty = {key: change for key, change in self._dirty.items() if change[1] != guard}

    async def flush(self) -> None:
        """Wait until all is written."""
        await self._idle.wait()

    async def settled(self, guard: Guard) -> None:
        """Wait until all is written that was set under `guard`."""
        while any(change[1] == guard for change in chain(self._dirty.values(), self._writing.values())):
            await self._step.wait()

    async def run(self) -> None:
        """Write, for ever: one commit at a time, as many records in it as are waiting, up to MAX_WRITES."""
        backoff_s = FIRST_BACKOFF_S
        loop = asyncio.get_running_loop()
        now = loop.time
        while True:
            await self._news.wait()
            started = now()
            late = loop.call_later(LATE_S, self._late, LATE_S)
            try:
                await self._write_some()
                backoff_s = FIRST_BACKOFF_S
                if self._away:
                    self._away = False
                    self._on_back()
            except MeshError as error:
                metrics.STORE_FAILURES.inc()
                self._late(now() - started)
                log.warning("cannot write to the store, will try again", error=error.message, pending=len(self._dirty))
                await asyncio.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, LAST_BACKOFF_S)
                continue
            finally:
                late.cancel()
            if len(self._dirty) < MAX_WRITES:
                await asyncio.sleep(max(0.0, started + WINDOW_S - now()))

    def _late(self, seconds: float) -> None:
        if not self._away:
            self._away = True
            self._on_away(seconds)

    async def _write_some(self) -> None:
        keys = list(self._dirty)[:MAX_WRITES]
        self._writing = {key: self._dirty.pop(key) for key in keys}
        writes = [self._to_write(key, *change) for key, change in self._writing.items()]
        try:
            with metrics.STORE_COMMIT_SECONDS.time():
                outcomes = await self._store.commit(writes) if writes else []
        except MeshError:
            self._dirty = {**self._writing, **self._dirty}
            raise
        finally:
            self._writing = {}
            step, self._step = self._step, asyncio.Event()
            step.set()
        for write, outcome in zip(writes, outcomes, strict=True):
            self._settle(write, outcome)
        metrics.STORE_WRITES.inc(len(writes))
        metrics.STORE_PENDING.set(len(self._dirty))
        if not self._dirty:
            self._news.clear()
            self._idle.set()

    def _to_write(self, key: str, make: Make | None, guard: Guard | None) -> Write:
        expected = None if guard else self._revisions.get(key, ABSENT)
        return Write(key, make() if make else None, expected, guard)

    def _settle(self, write: Write, outcome: Outcome) -> None:
        """Note the revision. A write that was left out may have got through before, in a commit that seemed to fail."""
        current = outcome.current
        if not outcome.applied and (current.value if current else None) != write.value:
            log.warning("a record belongs to another bootstrap now", key=write.key)
            if write.guard and self._on_fenced:
                self._on_fenced(write.guard)
        if current:
            self._revisions[write.key] = current.revision
        else:
            self._revisions.pop(write.key, None)

    def _wake(self) -> None:
        metrics.STORE_PENDING.set(len(self._dirty))
        self._idle.clear()
        self._news.set()
