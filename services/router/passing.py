"""Who goes next: a pure function over plain data.

First come, first served, but a sequence that fits no worker at the moment does not hold up smaller ones behind it.
Each that passes is counted: after `most_passes` nobody passes any more until it has gone, so it cannot starve.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from common.mesh.credit import Credit

Offers = Mapping[str, Credit | None]  # by worker; None: it takes what it gets


@dataclass(slots=True, eq=False)
class Need:
    """A sequence that waits: `tokens` known, `remaining` to generate at most, by a worker of `group`.

    `passed` counts who went before it though they came later. Workers in `avoid` are taken only when no other
    serves its group.
    """

    group: str
    tokens: int
    remaining: int
    avoid: frozenset[str] = frozenset()
    passed: int = 0


class Next(NamedTuple):
    """Who goes, to one of which workers, and whom it passes."""

    need: Need
    workers: list[str]
    passes: list[Need]


def next_to_go(
    waiting: Iterable[Need], offers: Mapping[str, Offers], *, most_passes: int, look_ahead: int
) -> Next | None:
    """The first of `waiting`, in their order, who fits a worker of its group and passes nobody once too often.

    At most `look_ahead` who do not fit are looked at.
    """
    stuck: dict[str, list[Need]] = {}
    blocked: set[str] = set()
    for need in waiting:
        if need.group in blocked:
            continue
        if workers := fitting(need, offers.get(need.group, {})):
            return Next(need, workers, stuck.get(need.group, []))
        stuck.setdefault(need.group, []).append(need)
        if need.passed >= most_passes:
            blocked.add(need.group)
        look_ahead -= 1
        if not look_ahead:
            return None
    return None


def fitting(need: Need, offers: Offers) -> list[str]:
    """The workers that can take `need` now."""
    return [worker for worker, credit in wanted(need, offers).items() if credit is None or fits(need, credit)]


def wanted(need: Need, offers: Offers) -> Offers:
    """Without those to avoid, unless there are no others."""
    if not need.avoid:
        return offers
    return {worker: credit for worker, credit in offers.items() if worker not in need.avoid} or offers


def fits(need: Need, credit: Credit) -> bool:
    return credit.fits(credit.cost(need.tokens, need.remaining))
