"""How a front tells credit: at once when some became free, to each router what its figure reflects."""

from __future__ import annotations

import asyncio

import pytest
import uvloop

from common.mesh.credit import Credit
from common.worker.credit import CreditTeller, Throttle
from common.worker.sessions import Session, Sessions

pytestmark = pytest.mark.unit

Told = tuple[int, int]  # pages, last start


def credit(pages: int) -> Credit:
    return Credit(pages, 4, 10, 512, 16)


def teller() -> tuple[Sessions[Told], CreditTeller[Told]]:
    sessions = Sessions[Told]()
    return sessions, CreditTeller(sessions, lambda credit, last_start: (credit.pages, last_start))


async def told(session: Session[Told]) -> list[Told]:
    async with asyncio.timeout(5):
        return await anext(session.outbox.batches())


async def test_a_new_session_is_told_at_once() -> None:
    sessions, told_by = teller()
    early = sessions.open()
    told_by.opened(early)
    assert not len(early.outbox)
    told_by.update(credit(7), 0)
    late = sessions.open()
    told_by.opened(late)
    assert await told(early) == await told(late) == [(7, 0)]
    told_by.close()


async def test_each_router_hears_which_of_its_sequences_are_reflected() -> None:
    sessions, told_by = teller()
    one, other = sessions.open(), sessions.open()
    numbers = [sessions.add(one, 70), sessions.add(other, 5), sessions.add(one, 71)]
    told_by.update(credit(6), numbers[1])
    assert await told(one) == [(6, 70)]
    assert await told(other) == [(6, 5)]
    told_by.update(credit(6), numbers[2])  # nothing is free, but one may forget a spend
    assert await told(one) == [(6, 71)]
    assert not len(other.outbox), "there is nothing new for it"
    told_by.close()


async def test_the_last_figure_is_always_told() -> None:
    sessions, told_by = teller()
    session = sessions.open()
    for pages in (9, 8, 3, 7, 2):
        told_by.update(credit(pages), 0)
    assert await told(session) == [(9, 0)]
    assert await told(session) == [(2, 0)]
    told_by.close()


async def test_a_throttle_keeps_a_wish_for_later() -> None:
    calls: list[float] = []
    called = asyncio.Event()

    def call() -> None:
        calls.append(asyncio.get_running_loop().time())
        called.set()

    throttle = Throttle(call, 0.02)
    for _ in range(2):
        called.clear()
        throttle.want()
        throttle.want()
        await asyncio.wait_for(called.wait(), 5)
    assert len(calls) == 2
    assert calls[1] - calls[0] >= 0.019
    throttle.want()
    throttle.close()


def test_news_that_are_due_within_half_a_millisecond(monkeypatch: pytest.MonkeyPatch) -> None:
    """uvloop keeps no time for such a timer."""
    monkeypatch.setattr("common.worker.credit.OTHER_INTERVAL_S", 0.0004)

    async def main() -> Told:
        sessions, told_by = teller()
        session = sessions.open()
        for pages in (9, 8, 7):
            told_by.update(credit(pages), 0)
        assert await told(session) == [(9, 0)]
        [last] = await told(session)
        told_by.close()
        return last

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(main()) == (7, 0)
