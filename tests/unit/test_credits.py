"""Credit: what a sequence takes, and a router's account of a worker's, exact over delayed news."""

from __future__ import annotations

import random
from collections import deque

import pytest

from common.engine.reserve import MOST_CAUTION_TOKENS, Reserve
from common.mesh.credit import Credit, most_pages, promised_pages
from services.router.credits import CreditAccount, Spend

pytestmark = pytest.mark.unit

PAGE, RESERVED, LIMIT, PLACES = 16, 64, 40, 6


def credit(pages: int = LIMIT, sequences: int = PLACES, reserved: int = RESERVED) -> Credit:
    return Credit(pages, sequences, LIMIT, reserved, PAGE)


@pytest.mark.parametrize(
    ("tokens", "remaining", "reserved", "pages"),
    [
        (16, 1, 512, 1),  # the token that prefill samples needs no page
        (16, 2, 512, 2),
        (1, 16, 512, 1),
        (100, 512, 512, 39),
        (100, 5000, 512, 39),
        (100, 5000, 0, 7),
        (17, 0, 512, 2),
    ],
)
def test_pages_of_a_sequence(tokens: int, remaining: int, reserved: int, pages: int) -> None:
    assert promised_pages(tokens, remaining, reserved, PAGE) == pages


def test_the_reserve_is_bounded_by_what_is_asked_for() -> None:
    assert promised_pages(10, 20, RESERVED, PAGE) == most_pages(10, 20, PAGE) == 2
    assert promised_pages(10, 2000, RESERVED, PAGE) < most_pages(10, 2000, PAGE)


def test_a_sequence_beyond_the_mark_gets_a_worker_to_itself() -> None:
    assert credit().fits(LIMIT + 1)
    assert not credit(pages=LIMIT - 1).fits(LIMIT + 1)
    assert not credit(sequences=0).fits(1)
    assert not credit(pages=-2).fits(1)


def test_what_is_not_reflected_yet_is_taken_off() -> None:
    account = CreditAccount()
    account.publish(credit(), 0)
    first, second = account.spend(16, 1), account.spend(16, 17)
    assert account.credit == credit(LIMIT - 3, PLACES - 2)
    account.sent(first, 7)
    account.publish(credit(LIMIT - 1, PLACES - 1), 7)
    assert account.credit == credit(LIMIT - 3, PLACES - 2), "the first is in the figure, the second is not"
    account.give_back(second)
    account.give_back(second)
    assert account.credit == credit(LIMIT - 1, PLACES - 1)


def test_what_was_sent_is_given_back_by_the_worker_alone() -> None:
    account = CreditAccount()
    account.publish(credit(), 0)
    spend = account.spend(16, 1)
    account.sent(spend, 3)
    account.give_back(spend)  # the attempt is over, but the worker may not have heard of it
    assert account.credit == credit(LIMIT - 1, PLACES - 1)
    account.publish(credit(), 3)
    assert account.credit == credit()


def test_a_broken_stream_ends_what_was_sent() -> None:
    account = CreditAccount()
    account.publish(credit(), 0)
    account.sent(account.spend(16, 1), 3)
    waiting = account.spend(16, 1)
    account.forget()
    assert account.credit is None
    account.publish(credit(), 0)
    assert account.credit == credit(LIMIT - 1, PLACES - 1)
    account.give_back(waiting)
    assert account.credit == credit()


def test_a_worker_without_credit_takes_what_it_gets() -> None:
    account = CreditAccount()
    assert account.credit is None
    account.give_back(account.spend(10_000, 10_000))
    assert account.credit is None


class Worker:
    """A decode worker that counts as the real one does, with news that travel in order but late."""

    def __init__(self) -> None:
        self.held: dict[int, int] = {}
        self.inbox: deque[tuple[int, int, int]] = deque()
        self.outbox: deque[tuple[Credit, int]] = deque()
        self.last_start = 0

    def credit(self) -> Credit:
        return credit(LIMIT - sum(self.held.values()), PLACES - len(self.held))

    def take(self) -> None:
        number, tokens, remaining = self.inbox.popleft()
        self.last_start = number
        self.held[number] = self.credit().cost(tokens, remaining)

    def tell(self) -> None:
        self.outbox.append((self.credit(), self.last_start))


@pytest.mark.parametrize("seed", range(20))
def test_one_router_never_overspends_and_loses_nothing(seed: int) -> None:
    rng = random.Random(seed)
    worker, account = Worker(), CreditAccount()
    account.publish(worker.credit(), 0)
    unsent: list[tuple[Spend, int, int]] = []
    number = 0
    for _ in range(5000):
        match rng.randrange(6):
            case 0:
                tokens, remaining = rng.randint(1, 200), rng.randint(1, 300)
                left = account.credit
                assert left is not None
                if left.fits(left.cost(tokens, remaining)):
                    unsent.append((account.spend(tokens, remaining), tokens, remaining))
            case 1 if unsent:
                spend, tokens, remaining = unsent.pop(rng.randrange(len(unsent)))
                if rng.random() < 0.2:
                    account.give_back(spend)
                else:
                    number += 1
                    worker.inbox.append((number, tokens, remaining))
                    account.sent(spend, number)
            case 2 if worker.inbox:
                worker.take()
            case 3 if worker.held:
                del worker.held[rng.choice(list(worker.held))]
            case 4:
                worker.tell()
            case 5 if worker.outbox:
                account.publish(*worker.outbox.popleft())
        alone = len(worker.held) == 1  # it may be larger than the mark
        assert len(worker.held) <= PLACES
        assert sum(worker.held.values()) <= LIMIT or alone
    for spend, _, _ in unsent:
        account.give_back(spend)
    while worker.inbox:
        worker.take()
    worker.tell()
    for news in worker.outbox:
        account.publish(*news)
    assert account.credit == worker.credit()


def test_caution_after_a_retraction_doubles_and_fades() -> None:
    reserve = Reserve(0, PAGE)
    reserve.stepped(0)
    assert reserve.tokens == 0
    reserve.stepped(2)
    reserve.stepped(1)
    assert reserve.tokens == 4 * PAGE
    for _ in range(10):
        reserve.stepped(1)
    assert reserve.tokens == MOST_CAUTION_TOKENS
    for _ in range(MOST_CAUTION_TOKENS + 5):
        reserve.stepped(0)
    assert reserve.tokens == 0
