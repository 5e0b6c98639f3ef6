"""A front tells the routers what its worker can still promise."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

from common.mesh.credit import Credit
from common.worker.sessions import Session, Sessions

E = TypeVar("E")

# Credit that became free is what requests wait for. Less of it, or none but news of what it reflects, can wait:
# a router has taken off what it sent itself.
FREED_INTERVAL_S = 0.005
OTHER_INTERVAL_S = 0.05


class CreditTeller(Generic[E]):
    """Puts an event into the outbox of every session whenever its router should know a new figure.

    Each says which of the session's sequences it reflects, so that the router takes off exactly the others.
    """

    def __init__(self, sessions: Sessions[E], to_event: Callable[[Credit, int], E]) -> None:
        self._sessions = sessions
        self._to_event = to_event
        self._credit: Credit | None = None
        self._told: Credit | None = None
        self._told_at = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0  # of the timer; uvloop's own does not tell when it is due within half a millisecond

    def opened(self, session: Session[E]) -> None:
        """A new session: it is told at once."""
        if self._credit:
            self._tell(session, self._credit)

    def update(self, credit: Credit, last_start: int) -> None:
        """The ranks' credit, and the worker's highest sequence id that it reflects."""
        for session in self._sessions:
            session.reflect(last_start)
        self._credit = credit
        told = self._told
        freed = told is None or credit.pages > told.pages or credit.sequences > told.sequences
        loop = asyncio.get_running_loop()
        due = self._told_at + (FREED_INTERVAL_S if freed else OTHER_INTERVAL_S)
        if due <= loop.time():
            self._tell_all()
        elif self._timer is None or due < self._due:
            self._cancel()
            self._timer, self._due = loop.call_at(due, self._tell_all), due

    def close(self) -> None:
        """Tell no more."""
        self._cancel()

    def _tell_all(self) -> None:
        self._cancel()
        if self._credit is None:
            return
        self._told, self._told_at = self._credit, asyncio.get_running_loop().time()
        for session in self._sessions:
            self._tell(session, self._credit)

    def _tell(self, session: Session[E], credit: Credit) -> None:
        news = credit, session.last_start
        if news != session.told_credit:
            session.told_credit = news
            session.outbox.put(self._to_event(*news))

    def _cancel(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None


class Throttle:
    """Calls a function when it is wanted, at most once an interval; a wish within it is kept for its end."""

    def __init__(self, call: Callable[[], None], interval_s: float) -> None:
        self._call = call
        self._interval_s = interval_s
        self._called_at = -interval_s
        self._timer: asyncio.TimerHandle | None = None

    def want(self) -> None:
        """Call now, or at the end of the interval."""
        loop = asyncio.get_running_loop()
        if self._timer is None:
            self._timer = loop.call_at(max(loop.time(), self._called_at + self._interval_s), self._fire)

    def close(self) -> None:
        """Call no more."""
        if self._timer:
            self._timer.cancel()
            self._timer = None

    def _fire(self) -> None:
        self._timer, self._called_at = None, asyncio.get_running_loop().time()
        self._call()
