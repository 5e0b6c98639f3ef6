"""The ledger: which state each page of a pool is in."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import msgspec


class PageState(IntEnum):
    """What a page is used for."""

    FREE = 0
    RESERVED = 1  # promised to a hand-over; a peer may write to it
    IN_USE = 2  # holds KV of a sequence
    CACHED = 3  # holds KV that a later prompt may share
    QUARANTINED = 4  # of a failed hand-over: a peer may still read or write it


ALLOWED = frozenset(
    {
        (PageState.FREE, PageState.RESERVED),
        (PageState.FREE, PageState.IN_USE),
        (PageState.RESERVED, PageState.FREE),
        (PageState.RESERVED, PageState.IN_USE),
        (PageState.RESERVED, PageState.QUARANTINED),
        (PageState.IN_USE, PageState.FREE),
        (PageState.IN_USE, PageState.CACHED),
        (PageState.IN_USE, PageState.QUARANTINED),
        (PageState.CACHED, PageState.FREE),
        (PageState.CACHED, PageState.IN_USE),
        (PageState.QUARANTINED, PageState.FREE),
    }
)


class LedgerError(RuntimeError):
    """A page was moved that is not in the state its owner believes it to be in: a bug, such as a double free."""


class Audit(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The figures of all audits of a pool so far, and of the last one.

    Attributes:
        runs: Audits so far.
        leaked_pages: Pages that nobody claims: nobody will give them back.
        disputed_pages: Pages that are claimed twice, or are in another state than their owner believes.
        oldest_quarantine_s: How long the longest of the present quarantines lasts, in seconds.
        quarantine_page_seconds: Pages in quarantine, summed over time.
    """

    runs: int = 0
    leaked_pages: int = 0
    disputed_pages: int = 0
    oldest_quarantine_s: float = 0.0
    quarantine_page_seconds: float = 0.0


class PageLedger:
    """State of every page of a pool, and how many pages are in each state. The sum is the pool's size."""

    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise ValueError(f"a pool of {num_pages} pages")
        self.num_pages = num_pages
        self._states = bytearray(num_pages)  # FREE is 0
        self._counts = [0] * len(PageState)
        self._counts[PageState.FREE] = num_pages

    def count(self, state: PageState) -> int:
        """Pages in `state`."""
        return self._counts[state]

    def state(self, page: int) -> PageState:
        """State of one page."""
        return PageState(self._states[page])

    @property
    def states(self) -> memoryview:
        """State of every page, a byte each; not to be written to."""
        return memoryview(self._states).toreadonly()

    @property
    def at_rest(self) -> bool:
        """Whether nothing is reserved, in use or quarantined."""
        return self._counts[PageState.FREE] + self._counts[PageState.CACHED] == self.num_pages

    def move(self, pages: Sequence[int], source: PageState, target: PageState) -> None:
        """Move pages from one state to another, all or none.

        Raises:
            LedgerError: The transition is not allowed, or a page is unknown, named twice or not in `source`.
        """
        if (source, target) not in ALLOWED:
            raise LedgerError(f"no page goes from {source.name} to {target.name}")
        states = self._states
        for index, page in enumerate(pages):
            if not 0 <= page < self.num_pages or states[page] != source:
                for moved in pages[:index]:
                    states[moved] = source
                raise LedgerError(f"page {page} is not {source.name}, or named twice; cannot make it {target.name}")
            states[page] = target
        self._counts[source] -= len(pages)
        self._counts[target] += len(pages)
