"""The router sessions of a worker's front: many sequences on one stream, batched a step at a time."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

from common.mesh.credit import Credit
from common.mesh.outbox import Outbox

E = TypeVar("E")


class Session(Generic[E]):
    """One router's stream: what leaves on it, and which of its sequences run.

    Attributes:
        last_start: The router's number of its last sequence that the ranks' load reflects.
        told_credit: What the router was told last.
        cache_unknown: What the router knows of the prefix cache is out of date.
    """

    def __init__(self) -> None:
        self.outbox: Outbox[E] = Outbox()
        self.sequences: dict[int, int] = {}  # the router's number -> the worker's
        self.last_start = 0
        self.told_credit: tuple[Credit, int] | None = None
        self.cache_unknown = False
        self._unreflected: deque[tuple[int, int]] = deque()  # the worker's id, the router's number

    def started(self, sequence_id: int, number: int) -> None:
        """A sequence was sent to the ranks."""
        self._unreflected.append((sequence_id, number))

    def reflect(self, sequence_id: int) -> None:
        """The ranks' load reflects every sequence up to the worker's `sequence_id`."""
        while self._unreflected and self._unreflected[0][0] <= sequence_id:
            self.last_start = self._unreflected.popleft()[1]


class Sessions(Generic[E]):
    """All sessions of a front, and which sequence belongs to which."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._owners: dict[int, tuple[Session[E], int]] = {}
        self._open: set[Session[E]] = set()

    def __len__(self) -> int:
        """Sequences that have not ended."""
        return len(self._owners)

    def __iter__(self) -> Iterator[Session[E]]:
        """The open sessions."""
        return iter(self._open)

    def open(self) -> Session[E]:
        session = Session[E]()
        self._open.add(session)
        return session

    def close_all(self) -> None:
        """End every stream; their handlers then leave."""
        for session in list(self._open):
            session.outbox.close()

    def add(self, session: Session[E], number: int) -> int:
        """Register the router's sequence `number`; returns the worker's own, unique id."""
        sequence_id = next(self._numbers)
        session.sequences[number] = sequence_id
        session.started(sequence_id, number)
        self._owners[sequence_id] = (session, number)
        return sequence_id

    def owner(self, sequence_id: int) -> tuple[Session[E], int] | None:
        """The session of a sequence and the router's number for it; None when it has ended."""
        return self._owners.get(sequence_id)

    def running(self) -> list[int]:
        """The ids of all sequences that have not ended."""
        return list(self._owners)

    def end(self, sequence_id: int) -> None:
        if entry := self._owners.pop(sequence_id, None):
            session, number = entry
            session.sequences.pop(number, None)

    def drop(self, session: Session[E]) -> list[int]:
        """Forget a broken session; returns the ids of the sequences that it leaves behind."""
        session.outbox.close()
        self._open.discard(session)
        left = list(session.sequences.values())
        for sequence_id in left:
            self.end(sequence_id)
        return left
