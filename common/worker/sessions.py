"""The router sessions of a worker's front: many sequences on one stream, batched a step at a time."""

from __future__ import annotations

import asyncio
import itertools
from typing import Generic, TypeVar

E = TypeVar("E")


class Session(Generic[E]):
    """One router's stream. Events queue here between steps and leave as one batch."""

    def __init__(self) -> None:
        self._events: list[E] = []
        self._news = asyncio.Event()
        self.closed = False
        self.sequences: dict[int, int] = {}  # the router's number -> the worker's

    def push(self, event: E) -> None:
        self._events.append(event)
        self._news.set()

    def close(self) -> None:
        """End `batches` after what is queued."""
        self.closed = True
        self._news.set()

    async def next_batch(self) -> list[E]:
        """All that is queued, at least one event; empty once the session is closed."""
        while not self._events and not self.closed:
            self._news.clear()
            await self._news.wait()
        batch, self._events = self._events, []
        return batch


class Sessions(Generic[E]):
    """All sessions of a front, and which sequence belongs to which."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._owners: dict[int, tuple[Session[E], int]] = {}
        self._open: set[Session[E]] = set()

    def __len__(self) -> int:
        """Sequences that have not ended."""
        return len(self._owners)

    def open(self) -> Session[E]:
        session = Session[E]()
        self._open.add(session)
        return session

    def close_all(self) -> None:
        """End every stream; their handlers then leave."""
        for session in list(self._open):
            session.close()

    def add(self, session: Session[E], number: int) -> int:
        """Register the router's sequence `number`; returns the worker's own, unique id."""
        sequence_id = next(self._numbers)
        session.sequences[number] = sequence_id
        self._owners[sequence_id] = (session, number)
        return sequence_id

    def owner(self, sequence_id: int) -> tuple[Session[E], int] | None:
        """The session of a sequence and the router's number for it; None when it has ended."""
        return self._owners.get(sequence_id)

    def end(self, sequence_id: int) -> None:
        if entry := self._owners.pop(sequence_id, None):
            session, number = entry
            session.sequences.pop(number, None)

    def drop(self, session: Session[E]) -> list[int]:
        """Forget a broken session; returns the ids of the sequences that it leaves behind."""
        session.close()
        self._open.discard(session)
        left = list(session.sequences.values())
        for sequence_id in left:
            self.end(sequence_id)
        return left
