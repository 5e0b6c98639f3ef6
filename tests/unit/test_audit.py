"""The ledger's audit: what it finds, what it does not hold against anybody, and that every worker runs it."""

from __future__ import annotations

import numpy as np
import pytest
from structlog.testing import capture_logs

from common.engine.messages import Sampling
from common.engine.request import Sequence
from common.kvcache.allocator import PageAllocator
from common.kvcache.audit import AUDIT_INTERVAL_S, Auditor, Claim, expand
from common.kvcache.ledger import Audit, PageState
from common.worker.loop import RankTurns
from tests.toys import toy_engine

pytestmark = pytest.mark.unit


class Pool:
    """An allocator with its auditor, and a clock."""

    def __init__(self, num_pages: int = 32) -> None:
        self.time = 100.0
        self.allocator = PageAllocator(num_pages)
        self.auditor = Auditor(self.allocator.ledger, lambda: self.time)

    def free(self) -> Claim:
        return Claim("the free list", PageState.FREE, expand(self.allocator.free_extents()))

    def wrong(self, *claims: Claim) -> tuple[int, int]:
        audit = self.auditor.run([self.free(), *claims])
        return audit.leaked_pages, audit.disputed_pages


def test_a_pool_in_order_has_nothing_to_show() -> None:
    pool = Pool()
    assert pool.wrong() == (0, 0)
    pages = pool.allocator.allocate(5)
    granted = pool.allocator.allocate(7, PageState.RESERVED)
    claims = Claim("a", PageState.IN_USE, pages), Claim("b", PageState.RESERVED, granted)
    assert pool.wrong(*claims) == (0, 0)
    assert pool.wrong(*claims, Claim("c", PageState.IN_USE, [])) == (0, 0)


def test_a_page_that_nobody_has_is_a_leak_and_is_named_once() -> None:
    pool = Pool()
    pool.allocator.allocate(3)
    pages = pool.allocator.allocate(2)
    with capture_logs() as logged:
        for _ in range(3):
            assert pool.wrong(Claim("a", PageState.IN_USE, pages)) == (3, 0)
    (record,) = logged
    assert record["log_level"] == "error"
    assert record["what"] == "nobody has pages 0-2 (IN_USE)"


def test_claims_that_do_not_fit_are_disputed() -> None:
    pool = Pool()
    pages = pool.allocator.allocate(4)
    mine = Claim("mine", PageState.IN_USE, pages)
    with capture_logs() as logged:
        assert pool.wrong(mine, Claim("theirs", PageState.IN_USE, pages[1:2])) == (0, 1)
    assert "theirs claims as IN_USE pages 1 (IN_USE)" in logged[0]["what"]
    assert pool.wrong(Claim("mine", PageState.RESERVED, pages)) == (0, 4)
    assert pool.wrong(mine, Claim("on the free list too", PageState.IN_USE, [30])) == (0, 1)
    assert pool.wrong(mine, Claim("out of the pool", PageState.IN_USE, [32, -1])) == (0, 2)
    assert pool.wrong(mine) == (0, 0)


def test_a_page_lost_by_the_free_list_is_a_leak() -> None:
    pool = Pool()
    pool.allocator._remove(0)
    assert pool.wrong() == (32, 0)


def test_quarantine_is_timed_by_owner() -> None:
    pool = Pool()
    pages = pool.allocator.allocate(4, PageState.RESERVED)
    pool.allocator.move(pages, PageState.RESERVED, PageState.QUARANTINED)
    claims = [pool.free(), Claim("room", PageState.QUARANTINED, pages)]
    assert pool.auditor.run(claims).oldest_quarantine_s == 0
    pool.time += 2
    audit = pool.auditor.run(claims)
    assert (audit.runs, audit.oldest_quarantine_s, audit.quarantine_page_seconds) == (2, 2.0, 8.0)
    pool.time += 1
    pool.allocator.free(pages, PageState.QUARANTINED)
    audit = pool.auditor.run([pool.free()])
    assert (audit.oldest_quarantine_s, audit.quarantine_page_seconds) == (0.0, 8.0)


def test_it_is_due_once_an_interval() -> None:
    pool = Pool()
    assert not pool.auditor.due
    pool.time += AUDIT_INTERVAL_S
    assert pool.auditor.due
    pool.wrong()
    assert not pool.auditor.due


def test_random_use_of_an_allocator_is_always_in_order() -> None:
    pool = Pool(200)
    draw = np.random.default_rng(5)
    held: list[Claim] = []
    for number in range(500):
        if held and (draw.random() < 0.5 or pool.allocator.num_free < 20):
            claim = held.pop(int(draw.integers(len(held))))
            pool.allocator.free(list(claim.pages), claim.state)
        else:
            state = PageState(int(draw.integers(1, 3)))
            held.append(Claim(f"{number}", state, pool.allocator.allocate(int(draw.integers(1, 20)), state)))
        assert pool.wrong(*held) == (0, 0)


class Turns(RankTurns):
    """A rank's turns, driven by hand."""

    def audits(self) -> list[Audit]:
        """Those of one turn whose audit is due."""
        self._auditor._at -= AUDIT_INTERVAL_S
        if self._engine.has_work:
            self._engine.step()
        batch = self._take()
        return [message for message in batch.messages if isinstance(message, Audit)] if batch else []


def test_a_rank_audits_itself_between_its_steps() -> None:
    engine = toy_engine(num_pages=16)
    turns = Turns(engine)
    for number in range(3):
        sampling = Sampling(max_new_tokens=6, temperature=0.0, ignore_eos=True)
        engine.add(Sequence(number, [1 + number] * 7, sampling, request_id=f"q{number}"))
    runs = 0
    while engine.has_work:
        [audit] = turns.audits()
        runs += 1
        assert audit == Audit(runs=runs), "nothing is wrong"
    assert runs > 5
    leaked = engine.allocator.allocate(2)
    assert [(audit.leaked_pages, audit.disputed_pages) for audit in turns.audits()] == [(2, 0)]
    engine.allocator.free(leaked)
    assert [audit.leaked_pages for audit in turns.audits()] == [0]
    assert turns._take() is None, "once an interval"
