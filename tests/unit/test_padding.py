"""The padding plan: properties that hold for all batches, and what it saves beside padding to everybody's sum."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.dist.padding import plan_padding

pytestmark = pytest.mark.unit

TOKENS = st.lists(st.integers(0, 300), min_size=1, max_size=16)
GRAPHS = st.lists(st.integers(1, 200), max_size=6, unique=True).map(sorted)


@given(TOKENS, st.booleans(), st.booleans(), st.sampled_from([1, 2, 4, 8]), GRAPHS)
def test_every_plan(tokens: list[int], gathers: bool, mixed: bool, align: int, graphs: list[int]) -> None:
    plan = plan_padding(tokens, gathers=gathers, mixed=mixed, align=align, graphs=graphs)
    assert plan.tokens == tuple(tokens)
    assert all(rows >= count for rows, count in zip(plan.rows, tokens, strict=True))
    assert all(rows % align == 0 or rows in graphs for rows in plan.rows)
    assert plan.gathered == (sum(plan.rows) if gathers else 0)
    if plan.even:
        assert len(set(plan.rows)) == 1
    if gathers:  # the ranks' own tokens are in the gathered tensor, apart from each other
        parts = [plan.part(rank) for rank in range(len(tokens))]
        taken = [row for part in parts for row in range(plan.gathered)[part]]
        assert [part.stop - part.start for part in parts] == tokens
        assert len(taken) == len(set(taken)) == sum(tokens)


@given(TOKENS, st.integers(0, 15), st.integers(0, 300))
def test_without_a_gather_a_rank_does_not_see_the_others(tokens: list[int], at: int, other: int) -> None:
    at %= len(tokens)
    changed = [*tokens]
    changed[at] = other
    before, after = (plan_padding(counts, gathers=False).rows for counts in (tokens, changed))
    assert before == tuple(tokens)
    assert [a == b for i, (a, b) in enumerate(zip(before, after, strict=True)) if i != at] == [True] * (len(tokens) - 1)


@given(TOKENS, GRAPHS)
def test_a_graph_is_the_smallest_that_fits(tokens: list[int], graphs: list[int]) -> None:
    for rows, count in zip(plan_padding(tokens, gathers=False, graphs=graphs).rows, tokens, strict=True):
        fitting = [size for size in graphs if size >= count]
        assert rows == (0 if not count else min(fitting, default=count))


def test_beside_the_old_plan() -> None:
    """Rows of all ranks, uneven batches: what exists, the most of a rank, and, as it was, everybody's sum."""
    tokens = [120, 3, 40, 0]
    old = len(tokens) * sum(tokens)
    assert sum(plan_padding(tokens, gathers=False).rows) == 163
    assert sum(plan_padding(tokens, gathers=True).rows) == 480
    assert sum(plan_padding(tokens, gathers=True, mixed=True).rows) == 163
    assert old == 652
