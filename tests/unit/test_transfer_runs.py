"""Pages to runs, runs to batches."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.transfer import runs as module
from common.transfer.base import Run, TransferError
from common.transfer.runs import batches, checked, coalesce

pytestmark = pytest.mark.unit

PAGE = 4096


@pytest.fixture(params=[module.FEW, 0], ids=["few", "many"], autouse=True, scope="module")
def either_way(request: pytest.FixtureRequest) -> Iterator[None]:
    """Short lists and long ones take different ways; both are tested with all lists."""
    before, module.FEW = module.FEW, request.param
    yield
    module.FEW = before


def test_consecutive_pages_make_one_run() -> None:
    assert coalesce([4, 5, 6], [10, 11, 12], PAGE).tolist() == [[4 * PAGE, 10 * PAGE, 3 * PAGE]]


def test_a_break_on_either_side_ends_a_run() -> None:
    assert coalesce([1, 2, 4], [7, 8, 9], 1).tolist() == [[1, 7, 2], [4, 9, 1]]
    assert coalesce([1, 2, 3], [7, 9, 10], 1).tolist() == [[1, 7, 1], [2, 9, 2]]
    assert coalesce([3, 2], [3, 2], 1).tolist() == [[3, 3, 1], [2, 2, 1]]


def test_no_pages_make_no_runs() -> None:
    assert coalesce([], [], PAGE).shape == (0, 3)


def test_unequal_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="do not pair"):
        coalesce([1, 2], [1], PAGE)


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20))))
def test_runs_cover_exactly_the_pages_in_order(pairs: list[tuple[int, int]]) -> None:
    runs = coalesce([pair[0] for pair in pairs], [pair[1] for pair in pairs], 1).tolist()
    covered = [(src + i, dst + i) for src, dst, n in runs for i in range(n)]
    assert covered == pairs


@given(
    st.lists(st.tuples(st.integers(0, 100), st.integers(0, 100), st.integers(1, 50))),
    st.integers(1, 5),
    st.integers(1, 30),
)
def test_batches_keep_every_byte_and_their_bounds(
    rows: list[tuple[int, int, int]], max_pieces: int, max_bytes: int
) -> None:
    pieces = np.array(rows, dtype=np.int64).reshape(-1, 3)
    made = list(batches(pieces, max_pieces, max_bytes))
    assert all(0 < len(batch) <= max_pieces and batch[:, 2].sum() <= max_bytes for batch in made)
    moved = [(src + i, dst + i) for batch in made for src, dst, n in batch.tolist() for i in range(n)]
    assert moved == [(src + i, dst + i) for src, dst, n in rows for i in range(n)]


def test_runs_must_lie_inside_both_pools() -> None:
    assert checked([Run(0, 6, 4)], 4, 10).tolist() == [[0, 6, 4]]
    assert checked([], 4, 10).shape == (0, 3)
    for run in (Run(1, 0, 4), Run(0, 7, 4), Run(-1, 0, 1), Run(0, -1, 1), Run(0, 0, 0), Run(1 << 80, 0, 1)):
        with pytest.raises(TransferError, match="outside the pools"):
            checked([run], 4, 10)
