"""Who goes next: small ones pass a large one, up to a bound."""

from __future__ import annotations

import random

import pytest

from common.mesh.credit import Credit
from services.router.passing import Need, Next, next_to_go

pytestmark = pytest.mark.unit

PAGE = 16


def credit(pages: int, sequences: int = 8, limit: int = 100) -> Credit:
    return Credit(pages, sequences, limit, 512, PAGE)


def need(pages: int, group: str = "m", **more: object) -> Need:
    return Need(group, pages * PAGE, 1, **more)  # type: ignore[arg-type]


def go(
    waiting: list[Need], offers: dict[str, Credit | None], *, most_passes: int = 3, look_ahead: int = 99
) -> Next | None:
    return next_to_go(waiting, {"m": offers}, most_passes=most_passes, look_ahead=look_ahead)


def test_first_come_first_served_by_whom_it_fits() -> None:
    first, second = need(5), need(1)
    offers = {"a": credit(4), "b": credit(6), "c": credit(50, sequences=0)}
    assert go([first, second], offers) == Next(first, ["b"], [])


def test_a_small_one_passes_a_large_one() -> None:
    large, small = need(50), need(5)
    assert go([large, small], {"a": credit(20)}) == Next(small, ["a"], [large])
    assert go([large, small], {"a": credit(60)}) == Next(large, ["a"], [])


def test_after_its_bound_nobody_passes() -> None:
    large, small = need(50, passed=3), need(5)
    assert go([large, small], {"a": credit(20)}) is None
    assert go([large, small], {"a": credit(50)}) == Next(large, ["a"], [])


def test_groups_do_not_hold_each_other_up() -> None:
    large, other = need(50, passed=3), need(5, "other")
    offers = {"m": {"a": credit(20)}, "other": {"b": credit(20)}}
    assert next_to_go([large, other], offers, most_passes=3, look_ahead=99) == Next(other, ["b"], [])


def test_only_so_many_are_looked_at() -> None:
    waiting = [need(50) for _ in range(10)] + [need(1)]
    assert go(waiting, {"a": credit(20)}, look_ahead=10) is None
    assert go(waiting, {"a": credit(20)}, look_ahead=11) is not None


def test_workers_that_publish_nothing_take_what_they_get() -> None:
    large = need(500)
    assert go([large], {"a": credit(20), "b": None}) == Next(large, ["b"], [])


def test_avoided_workers_are_taken_only_when_there_are_no_others() -> None:
    one = need(5, avoid=frozenset({"a"}))
    assert go([one], {"a": credit(20), "b": credit(20)}) == Next(one, ["b"], [])
    assert go([one], {"a": credit(20), "b": credit(2)}) is None, "the other one will have room"
    assert go([one], {"a": credit(20)}) == Next(one, ["a"], [])


@pytest.mark.parametrize("seed", range(10))
def test_a_large_one_is_served_under_a_flood_of_small_ones(seed: int) -> None:
    """Every turn a small one comes and a running one ends; the pool would never be free by itself."""
    rng = random.Random(seed)
    limit, most_passes = 40, 16
    running = [15]
    large = need(30)
    waiting = [large]
    for turn in range(1000):
        waiting.append(need(rng.randint(1, 6)))
        while chosen := go(
            waiting, {"a": credit(limit - sum(running), 64, limit)}, most_passes=most_passes, look_ahead=64
        ):
            for passed in chosen.passes:
                passed.passed += 1
            waiting.remove(chosen.need)
            running.append(chosen.need.tokens // PAGE)
            if chosen.need is large:
                assert large.passed <= most_passes
                assert turn > 0
                return
        if running:
            running.pop(rng.randrange(len(running)))
    raise AssertionError("it starved")
