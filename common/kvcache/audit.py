"""The audit of a ledger: every page must be claimed exactly once, in the state that its owner believes it to be in."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.kvcache.extents import Extent, to_extents
from common.kvcache.ledger import Audit, PageLedger, PageState
from common.obs.log import get_logger

log = get_logger(__name__)

AUDIT_INTERVAL_S = 1.0


@dataclass(frozen=True)
class Claim:
    """What one owner says it has: a sequence, a room, a cache, or the list of free pages."""

    owner: str
    state: PageState
    pages: Sequence[int] | NDArray[np.int64]


class Auditor:
    """Audits one pool again and again, and logs what is wrong when that changes."""

    def __init__(self, ledger: PageLedger, now: Callable[[], float] = time.monotonic) -> None:
        self._ledger = ledger
        self._now = now
        self._at = now()
        self._last = Audit()
        self._wrong: tuple[str, ...] = ()
        self._quarantined_since: dict[str, float] = {}

    @property
    def due(self) -> bool:
        """Whether the last audit was an interval ago."""
        return self._now() - self._at >= AUDIT_INTERVAL_S

    def run(self, claims: Iterable[Claim]) -> Audit:
        """Compare the ledger with all claims. Takes about 1 ms for 100,000 pages."""
        claims = [claim for claim in claims if len(claim.pages)]
        states = np.frombuffer(self._ledger.states, dtype=np.uint8)
        pages = concatenate([np.asarray(claim.pages, dtype=np.int64) for claim in claims])
        claimed_states = np.repeat([claim.state for claim in claims], [len(claim.pages) for claim in claims])
        known = (pages >= 0) & (pages < len(states))
        counts = np.bincount(pages[known], minlength=len(states))
        believed = np.zeros(len(states), dtype=np.uint8)
        believed[pages[known]] = claimed_states[known]
        leaked = np.flatnonzero(counts == 0)
        disputed = np.flatnonzero((counts > 1) | ((counts == 1) & (believed != states)))
        unknown = int(np.count_nonzero(~known))
        self._tell(leaked, disputed, unknown, claims)
        self._last = self._figures(len(leaked), len(disputed) + unknown, claims)
        return self._last

    def _figures(self, leaked: int, disputed: int, claims: list[Claim]) -> Audit:
        now, before = self._now(), self._at
        self._at = now
        quarantined = {claim.owner for claim in claims if claim.state is PageState.QUARANTINED}
        since = {owner: self._quarantined_since.get(owner, now) for owner in quarantined}
        self._quarantined_since = since
        return Audit(
            runs=self._last.runs + 1,
            leaked_pages=leaked,
            disputed_pages=disputed,
            oldest_quarantine_s=now - min(since.values(), default=now),
            quarantine_page_seconds=self._last.quarantine_page_seconds
            + self._ledger.count(PageState.QUARANTINED) * (now - before),
        )

    def _tell(self, leaked: NDArray[np.int64], disputed: NDArray[np.int64], unknown: int, claims: list[Claim]) -> None:
        if not (len(leaked) or len(disputed) or unknown):
            self._wrong = ()
            return
        wrong = [f"nobody has {self._describe(leaked)}"] if len(leaked) else []
        for claim in claims:
            own = np.asarray(claim.pages, dtype=np.int64)
            if len(mine := own[np.isin(own, disputed)]):
                wrong.append(f"{claim.owner} claims as {claim.state.name} {self._describe(mine)}")
            if len(none := own[(own < 0) | (own >= self._ledger.num_pages)]):
                wrong.append(f"{claim.owner} claims pages that there are none of: {none.tolist()}")
        if tuple(wrong) != self._wrong:
            self._wrong = tuple(wrong)
            log.error(
                "the ledger is wrong", leaked=len(leaked), disputed=len(disputed) + unknown, what="; ".join(wrong)
            )

    def _describe(self, pages: NDArray[np.int64]) -> str:
        """Runs of pages, by the state that the ledger has them in."""
        states = [self._ledger.state(page) for page in pages.tolist()]
        described = []
        for state in sorted(set(states)):
            these = sorted(page for page, known in zip(pages.tolist(), states, strict=True) if known is state)
            runs = (f"{first}-{first + count - 1}" if count > 1 else f"{first}" for first, count in to_extents(these))
            described.append(f"pages {', '.join(runs)} ({state.name})")
        return " and ".join(described)


def expand(extents: Iterable[Extent]) -> NDArray[np.int64]:
    """The pages of extents."""
    return concatenate([np.arange(first, first + count) for first, count in extents])


def concatenate(parts: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
