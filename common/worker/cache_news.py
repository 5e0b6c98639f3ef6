"""A front tells the routers what its worker's prefix cache has."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import islice
from typing import Generic, TypeVar

from common.kvcache.hashes import CacheChanges
from common.worker.sessions import Session, Sessions
from pdmesh.v1 import types_pb2 as pb

E = TypeVar("E")

INTERVAL_S = 0.05
MOST_HASHES = 16384  # in one event, 128 KiB
MOST_WAITING = 1000  # events that a session has not read yet: one with more is not told, and catches up later


class CacheTeller(Generic[E]):
    """Puts into the outbox of every session what came to the cache and what left it, batched.

    A new session is told all that is cached, and so is one that lagged behind, or that more has changed for than goes
    in an event. A worker without a cache never says a word.
    """

    def __init__(self, sessions: Sessions[E], to_event: Callable[[pb.PrefixCacheUpdate], E]) -> None:
        self._sessions = sessions
        self._to_event = to_event
        self._cached: dict[int, None] = {}  # in the order in which they came: a page stands behind those before it
        self._news: dict[int, bool] = {}
        self._timer: asyncio.TimerHandle | None = None

    def opened(self, session: Session[E]) -> None:
        """A new session: it is told at once."""
        if self._cached:
            self._tell_all_to(session)

    def update(self, changes: CacheChanges) -> None:
        """The rank says what changed."""
        for hashed in changes.removed:
            self._cached.pop(hashed, None)
            self._news[hashed] = False
        for hashed in changes.stored:
            self._cached[hashed] = None
            self._news.pop(hashed, None)
            self._news[hashed] = True
        if len(self._news) > MOST_HASHES:
            self._news.clear()
            for session in self._sessions:
                session.cache_unknown = True
        self._tell_soon()

    def close(self) -> None:
        """Tell no more."""
        if self._timer:
            self._timer.cancel()
            self._timer = None

    def _tell_soon(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(INTERVAL_S, self._tell)

    def _tell(self) -> None:
        self._timer = None
        news, self._news = CacheChanges.net(self._news), {}
        for session in self._sessions:
            if len(session.outbox) > MOST_WAITING:
                session.cache_unknown = True
            elif session.cache_unknown:
                self._tell_all_to(session)
            elif news.stored or news.removed:
                update = pb.PrefixCacheUpdate(stored=news.stored, removed=news.removed)
                session.outbox.put(self._to_event(update))
        if any(session.cache_unknown for session in self._sessions):
            self._tell_soon()

    def _tell_all_to(self, session: Session[E]) -> None:
        session.cache_unknown = False
        hashes = iter(self._cached)
        update = pb.PrefixCacheUpdate(reset=True, stored=islice(hashes, MOST_HASHES))
        while update.reset or update.stored:
            session.outbox.put(self._to_event(update))
            update = pb.PrefixCacheUpdate(stored=islice(hashes, MOST_HASHES))
