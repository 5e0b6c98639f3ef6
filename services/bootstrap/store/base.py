"""The store seam: a small ordered map of keys to bytes that outlives a bootstrap process, or does not.

Promises that every store keeps (tests/contract/test_store.py):
- `start` returns once the store is reached and may be called again after it raised; `close` is idempotent.
- Revisions grow with every commit. All writes of one commit are applied at one revision, none or all of them
  seen by others at any time; a write whose guard does not hold is left out without hindering the rest.
- A commit that raised may have been applied all the same. Repeating it is safe: a guarded write that got through
  the first time is then left out, and its outcome shows the own value as the current one.
- `watch` misses nothing: where the past is no longer known it gives a snapshot instead.
Whatever goes wrong is a `MeshError` with STORE_FAILED.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol

MAX_WRITES = 64
ABSENT = 0


@dataclass(frozen=True)
class Entry:
    """A key with its value and the revision of its last change."""

    key: str
    value: bytes
    revision: int


@dataclass(frozen=True)
class Guard:
    """A condition on a key that is not written itself: that its revision is this (ABSENT: that there is none)."""

    key: str
    revision: int


@dataclass(frozen=True)
class Write:
    """Set a key, or delete it (`value` None), if its revision is `expected` (ABSENT: there is no such key).

    With a `guard`, only if that holds as well.
    """

    key: str
    value: bytes | None
    expected: int | None = None
    guard: Guard | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a write; `current` is the key after it, None when there is none."""

    applied: bool
    current: Entry | None


@dataclass(frozen=True)
class Change:
    """A key that was written, or deleted (`value` None)."""

    key: str
    value: bytes | None
    revision: int


@dataclass(frozen=True)
class Changes:
    """What happened up to `revision`. With `snapshot`, the changes are all keys there are, and no others exist."""

    changes: tuple[Change, ...]
    revision: int
    snapshot: bool = False


class Store(Protocol):
    """A key-value store."""

    durable: bool  # keys are still there after a restart of this process
    in_touch: bool  # the last that was heard of the store was good; a lease in it is kept

    async def start(self) -> None:
        """Reach the store."""
        ...

    async def close(self) -> None:
        """Take back what was announced and let go of the store."""
        ...

    async def get(self, key: str) -> Entry | None:
        """The key as the latest commit left it."""
        ...

    async def scan(self, prefix: str) -> tuple[list[Entry], int]:
        """All keys that begin with `prefix`, in order, and the revision at which this was so."""
        ...

    async def commit(self, writes: Sequence[Write]) -> list[Outcome]:
        """Apply up to MAX_WRITES writes of different keys at once; one outcome for each."""
        ...

    def watch(self, prefix: str, after: int | None = None) -> AsyncIterator[Changes]:
        """Changes after the revision `after`, for ever; without it a snapshot first. Reconnects by itself."""
        ...

    async def announce(self, key: str, value: bytes) -> None:
        """Set a key that stands as long as this process lives and is in touch with the store."""
        ...


def check(writes: Sequence[Write]) -> None:
    """Raises ValueError for a commit that no store takes."""
    if len(writes) > MAX_WRITES:
        raise ValueError(f"{len(writes)} writes in one commit, at most {MAX_WRITES}")
    if len({write.key for write in writes}) < len(writes):
        raise ValueError("a key stands twice in one commit")
