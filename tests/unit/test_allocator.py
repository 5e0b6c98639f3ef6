"""The page allocator and its ledger."""

from __future__ import annotations

import random

import pytest

from common.kvcache.allocator import OutOfPages, PageAllocator
from common.kvcache.extents import from_extents, to_extents
from common.kvcache.ledger import LedgerError, PageLedger, PageState

pytestmark = pytest.mark.unit

FREE, RESERVED, IN_USE, CACHED, QUARANTINED = PageState


def test_extents_keep_the_order_of_a_page_list() -> None:
    pages = [4, 5, 6, 2, 3, 9, 8]
    assert to_extents(pages) == ((4, 3), (2, 2), (9, 1), (8, 1))
    assert from_extents(to_extents(pages)) == pages
    assert to_extents([]) == ()


def test_a_fresh_pool_gives_one_run() -> None:
    allocator = PageAllocator(16)
    assert to_extents(allocator.allocate(5)) == ((0, 5),)
    assert allocator.num_free == 11


def test_the_smallest_extent_that_fits_is_taken() -> None:
    allocator = PageAllocator(20)
    pages = allocator.allocate(20)
    allocator.free(pages[0:8])
    allocator.free(pages[10:13])
    allocator.free(pages[15:20])
    assert to_extents(allocator.allocate(3)) == ((10, 3),)
    assert to_extents(allocator.allocate(4)) == ((15, 4),)
    assert to_extents(allocator.allocate(9)) == ((0, 8), (19, 1))


def test_without_a_fitting_extent_the_largest_come_first() -> None:
    allocator = PageAllocator(12)
    pages = allocator.allocate(12)
    allocator.free([*pages[0:2], *pages[4:8], *pages[10:11]])
    assert to_extents(allocator.allocate(6)) == ((4, 4), (0, 2))


def test_freed_neighbours_merge() -> None:
    allocator = PageAllocator(9)
    pages = allocator.allocate(9)
    for third in (pages[0:3], pages[6:9], pages[3:6]):
        allocator.free(third)
    assert to_extents(allocator.allocate(9)) == ((0, 9),)


def test_growth_goes_on_behind_the_last_page() -> None:
    allocator = PageAllocator(8)
    pages = allocator.allocate(3)
    allocator.allocate(1)
    allocator.free([3])
    assert allocator.allocate(2, after=pages[-1]) == [3, 4]
    assert allocator.allocate(1, after=7) == [5]


def test_too_many_pages_allocate_none() -> None:
    allocator = PageAllocator(4)
    allocator.allocate(1)
    with pytest.raises(OutOfPages):
        allocator.allocate(4)
    assert allocator.num_free == 3


@pytest.mark.parametrize("pages", [[1, 1], [1, 3], [1, 9], [1, -1]])
def test_a_bad_free_raises_and_frees_nothing(pages: list[int]) -> None:
    allocator = PageAllocator(8)
    allocator.allocate(3)
    with pytest.raises(LedgerError):
        allocator.free(pages)
    assert allocator.num_free == 5
    assert allocator.ledger.state(1) is IN_USE


def test_a_double_free_raises() -> None:
    allocator = PageAllocator(8)
    pages = allocator.allocate(2)
    allocator.free(pages)
    with pytest.raises(LedgerError):
        allocator.free(pages)


def test_a_page_is_freed_from_the_state_it_is_in() -> None:
    allocator = PageAllocator(8)
    pages = allocator.allocate(2, RESERVED)
    with pytest.raises(LedgerError):
        allocator.free(pages)
    allocator.move(pages, RESERVED, QUARANTINED)
    allocator.free(pages, QUARANTINED)
    assert allocator.ledger.at_rest


def test_only_the_known_transitions_are_allowed() -> None:
    ledger = PageLedger(4)
    for source, target in [(FREE, CACHED), (FREE, QUARANTINED), (CACHED, QUARANTINED), (IN_USE, RESERVED)]:
        with pytest.raises(LedgerError):
            ledger.move([], source, target)
    ledger.move([0, 1], FREE, RESERVED)
    ledger.move([0], RESERVED, IN_USE)
    assert [ledger.count(state) for state in PageState] == [2, 1, 1, 0, 0]
    assert not ledger.at_rest


def test_move_neither_frees_nor_allocates() -> None:
    allocator = PageAllocator(4)
    with pytest.raises(ValueError, match="free and allocate"):
        allocator.move(allocator.allocate(1), IN_USE, FREE)


def test_a_pool_needs_a_page() -> None:
    with pytest.raises(ValueError, match="0 pages"):
        PageAllocator(0)


@pytest.mark.parametrize("seed", range(20))
def test_random_use_never_shares_or_loses_a_page(seed: int) -> None:
    rng = random.Random(seed)
    allocator = PageAllocator(97)
    held: list[list[int]] = []
    for _ in range(400):
        if held and rng.random() < 0.5:
            pages = held.pop(rng.randrange(len(held)))
            rng.shuffle(pages)
            allocator.free(pages)
        elif (count := rng.randint(1, 20)) <= allocator.num_free:
            after = rng.choice(held)[-1] if held and rng.random() < 0.3 else None
            held.append(allocator.allocate(count, after=after))
        taken = [page for pages in held for page in pages]
        assert len(set(taken)) == len(taken) == 97 - allocator.num_free
    for pages in held:
        allocator.free(pages)
    assert to_extents(allocator.allocate(97)) == ((0, 97),)
