"""Hands out the pages of a pool in runs as long as possible, and keeps their ledger."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from typing import Protocol

from common.kvcache.extents import Extent, to_extents
from common.kvcache.ledger import PageLedger, PageState


class OutOfPages(Exception):
    """Fewer pages are available than were asked for; nothing was allocated."""


class Reclaimable(Protocol):
    """Holds pages that it can give up."""

    evictable: int

    def evict(self, count: int) -> None:
        """Free at least `count` pages, which are `evictable`."""
        ...


class PageAllocator:
    """Best fit over the free extents, which merge as pages return.

    Long runs matter because consecutive pages move as one piece in a hand-over. A cache may keep pages until they
    are wanted: they count as available, and are evicted when too few are free. Not thread-safe: one rank's loop owns
    it.
    """

    def __init__(self, num_pages: int) -> None:
        self.ledger = PageLedger(num_pages)
        self._by_size: list[tuple[int, int]] = []  # (page count, first page), sorted
        self._count_at: dict[int, int] = {}  # first page -> page count
        self._first_before: dict[int, int] = {}  # page after the extent's last -> first page
        self._cache: Reclaimable | None = None
        self._insert(0, num_pages)

    @property
    def num_pages(self) -> int:
        """Pages of the pool."""
        return self.ledger.num_pages

    @property
    def num_free(self) -> int:
        """Pages that nobody has."""
        return self.ledger.count(PageState.FREE)

    @property
    def num_available(self) -> int:
        """Pages that `allocate` can give: those that are free, and those that a cache can give up."""
        return self.num_free + (self._cache.evictable if self._cache else 0)

    def reclaim_from(self, cache: Reclaimable) -> None:
        """Evict from `cache` when too few pages are free."""
        self._cache = cache

    def free_extents(self) -> Iterable[Extent]:
        """The pages that nobody has, by its own account."""
        return self._count_at.items()

    def allocate(self, count: int, state: PageState = PageState.IN_USE, *, after: int | None = None) -> list[int]:
        """`count` pages, now in `state`; the run that follows page `after` is taken first, if it is free.

        Raises:
            OutOfPages: Fewer than `count` pages are available.
        """
        if count > self.num_available:
            raise OutOfPages(f"{count} pages wanted, {self.num_available} available")
        if self._cache and count > self.num_free:
            self._cache.evict(count - self.num_free)
        pages: list[int] = []
        if after is not None and (extent := self._count_at.get(after + 1)):
            pages += self._take(after + 1, min(extent, count))
        while missing := count - len(pages):
            fit = bisect_left(self._by_size, (missing, 0))
            size, first = self._by_size[min(fit, len(self._by_size) - 1)]
            pages += self._take(first, min(size, missing))
        self.ledger.move(pages, PageState.FREE, state)
        return pages

    def free(self, pages: Sequence[int], state: PageState = PageState.IN_USE) -> None:
        """Return pages that are in `state`. Raises `LedgerError` if one is not, and then frees none."""
        self.ledger.move(pages, state, PageState.FREE)
        for first, count in to_extents(sorted(pages)):
            if before := self._count_at.get(self._first_before.get(first, -1)):
                first, count = first - before, count + before
                self._remove(first)
            if behind := self._count_at.get(first + count):
                self._remove(first + count)
                count += behind
            self._insert(first, count)

    def move(self, pages: Sequence[int], source: PageState, target: PageState) -> None:
        """Change the state of pages that stay allocated. Raises `LedgerError`, see `PageLedger.move`."""
        if PageState.FREE in (source, target):
            raise ValueError("pages become free, or stop being so, through free and allocate")
        self.ledger.move(pages, source, target)

    def _take(self, first: int, count: int) -> range:
        """Cut `count` pages off the front of the free extent at `first`."""
        size = self._count_at[first]
        self._remove(first)
        if size > count:
            self._insert(first + count, size - count)
        return range(first, first + count)

    def _insert(self, first: int, count: int) -> None:
        self._count_at[first] = count
        self._first_before[first + count] = first
        insort(self._by_size, (count, first))

    def _remove(self, first: int) -> None:
        count = self._count_at.pop(first)
        del self._first_before[first + count]
        del self._by_size[bisect_left(self._by_size, (count, first))]
