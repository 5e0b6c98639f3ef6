"""The prefix cache's tree: what it finds, what it keeps, what it gives up, and what it tells of it."""

from __future__ import annotations

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from common.kvcache.allocator import PageAllocator
from common.kvcache.hashes import page_hashes
from common.kvcache.ledger import PageState
from common.kvcache.radix import Node, RadixCache

pytestmark = pytest.mark.unit

PAGE = 2
POOL = 24


def make(num_pages: int = POOL) -> tuple[PageAllocator, RadixCache]:
    allocator = PageAllocator(num_pages)
    return allocator, RadixCache(allocator, PAGE)


def add(allocator: PageAllocator, cache: RadixCache, tokens: list[int]) -> list[int]:
    """Cache the whole pages of `tokens`, as one does who has computed all of them. Returns the tree's pages."""
    own = allocator.allocate(len(tokens) // PAGE)
    there = cache.insert(cache.root, tokens[: len(own) * PAGE], own)
    allocator.free([page for page in own if page not in there.pages])
    return there.pages


def check(cache: RadixCache, allocator: PageAllocator) -> None:
    """The tree in itself, and with the ledger."""
    pages, loose = [], 0
    for node in cache.nodes():
        assert node.parent
        assert len(node.pages) == len(node.hashes) == len(node.key) / 4 / PAGE > 0
        assert node.parent.children[node.key[: 4 * PAGE]] is node
        assert node.locks >= sum(child.locks for child in node.children.values())
        assert node.queued or node.locks or node.children, "a leaf that can be evicted is queued for it"
        pages += node.pages
        loose += 0 if node.locks else len(node.pages)
    assert sorted(pages) == sorted(set(pages))
    assert {allocator.ledger.state(page) for page in pages} <= {PageState.CACHED}
    assert allocator.ledger.count(PageState.CACHED) == len(pages)
    assert cache.evictable == loose
    assert cache.locked == len(pages) - loose
    assert allocator.num_available == allocator.num_free + loose


def test_the_longest_prefix_in_whole_pages_is_found() -> None:
    allocator, cache = make()
    pages = add(allocator, cache, [1, 2, 3, 4, 5, 6, 7])
    assert len(pages) == 3
    assert cache.match([1, 2, 3, 4, 5, 6, 7, 8]).pages == pages
    assert cache.match([1, 2, 3, 4, 5]).pages == pages[:2]
    assert cache.match([1, 2, 3, 9, 5, 6]).pages == pages[:1]
    assert cache.match([1]).pages == cache.match([2, 1]).pages == cache.match([]).pages == []
    check(cache, allocator)


def test_what_is_there_already_is_not_stored_again() -> None:
    allocator, cache = make()
    first = add(allocator, cache, [1, 2, 3, 4])
    own = allocator.allocate(3)
    there = cache.insert(cache.root, [1, 2, 3, 4, 5, 6], own)
    assert there.pages == [*first, own[2]]
    assert [allocator.ledger.state(page) for page in own] == [PageState.IN_USE, PageState.IN_USE, PageState.CACHED]
    branch = add(allocator, cache, [1, 2, 8, 8])
    assert branch[0] == first[0]
    allocator.free(own[:2])
    check(cache, allocator)


def test_the_least_recently_used_leaf_goes_first_and_from_its_end() -> None:
    allocator, cache = make(40)  # a slack of two pages
    old, young = add(allocator, cache, [1] * 20), add(allocator, cache, [2] * 20)
    cache.evict(3)
    assert cache.match([1] * 20).pages == old[:7]
    node = cache.match([1] * 20).node
    cache.lock(node)
    cache.unlock(node)  # used, so that the other one is older
    cache.evict(1)
    assert cache.match([2] * 20).pages == young[:8], "never less than the slack"
    cache.evict(8)
    assert cache.match([2] * 20).pages == []
    assert cache.match([1] * 20).pages == old[:7]
    check(cache, allocator)


def test_a_parent_is_evicted_after_its_children() -> None:
    allocator, cache = make()
    trunk = add(allocator, cache, [1, 1, 2, 2])
    add(allocator, cache, [1, 1, 2, 2, 3, 3])
    add(allocator, cache, [1, 1, 2, 2, 4, 4])
    cache.evict(2)
    assert cache.match([1, 1, 2, 2, 4, 4]).pages == trunk
    cache.evict(2)
    assert not cache.pages()
    check(cache, allocator)


def test_what_is_locked_stays_and_so_does_all_above_it() -> None:
    allocator, cache = make()
    pages = add(allocator, cache, [1, 1, 2, 2, 3, 3, 4, 4])
    node = cache.match([1, 1, 2, 2]).node
    cache.lock(node)
    cache.evict(POOL)
    assert cache.pages() == pages[:2]
    assert (cache.evictable, cache.locked) == (0, 2)
    allocator.allocate(allocator.num_available)
    assert cache.pages() == pages[:2]
    cache.unlock(node)
    with pytest.raises(ValueError, match="nobody has locked"):
        cache.unlock(node)
    check(cache, allocator)


def test_a_lock_outlives_a_split_above_it() -> None:
    allocator, cache = make()
    pages = add(allocator, cache, [1, 1, 2, 2, 3, 3])
    node = cache.match([1, 1, 2, 2, 3, 3]).node
    cache.lock(node)
    assert cache.match([1, 1, 9, 9]).pages == pages[:1]
    assert cache.locked == 3
    check(cache, allocator)
    cache.unlock(node)
    assert cache.locked == 0
    check(cache, allocator)


def test_an_allocation_evicts_no_more_than_it_must() -> None:
    allocator, cache = make()
    add(allocator, cache, [1] * 20)
    allocator.allocate(POOL - 10)
    assert (allocator.num_free, allocator.num_available) == (0, 10)
    assert len(allocator.allocate(4)) == 4
    assert len(cache.pages()) == 6


def test_what_is_in_doubt_goes_at_once_but_for_what_others_share() -> None:
    allocator, cache = make()
    shared = add(allocator, cache, [1, 1, 2, 2])
    add(allocator, cache, [1, 1, 3, 3, 4, 4])
    node = cache.match([1, 1, 3, 3, 4, 4]).node
    cache.lock(node)
    cache.discard(node)
    assert len(cache.pages()) == 4, "somebody stands on it"
    cache.unlock(node)
    cache.discard(node)
    assert sorted(cache.pages()) == sorted(shared)
    check(cache, allocator)
    cache.evict(POOL)
    assert allocator.num_free == POOL


def test_changes_are_told_once_by_their_chained_hashes() -> None:
    allocator, cache = make()
    add(allocator, cache, [1, 2, 3, 4])
    first, second = page_hashes([1, 2, 3, 4], PAGE)
    assert page_hashes([1, 2, 9, 9, 5], PAGE)[0] == first
    assert page_hashes([3, 4], PAGE) != [second]
    told = cache.take_changes()
    assert (told.stored, told.removed) == ([first, second], [])
    cache.evict(1)
    add(allocator, cache, [7, 7])
    told = cache.take_changes()
    assert (told.stored, told.removed) == (page_hashes([7, 7], PAGE), [second])
    add(allocator, cache, [8, 8])
    cache.evict(POOL)
    told = cache.take_changes()
    assert not told.stored
    assert set(told.removed) == {first, *page_hashes([7, 7], PAGE), *page_hashes([8, 8], PAGE)}
    told = cache.take_changes()
    assert not told.stored
    assert not told.removed


class Tree(RuleBasedStateMachine):
    """Random use, against a dictionary of all prefixes."""

    def __init__(self) -> None:
        super().__init__()
        self.allocator, self.cache = make()
        self.known: set[int] = set()  # hashes, as a router knows them
        self.held: list[tuple[Node, list[int]]] = []
        self.own: list[list[int]] = []

    prompts = st.lists(st.sampled_from([1, 2]), max_size=16)

    @rule(tokens=prompts, hold=st.booleans())
    def compute(self, tokens: list[int], hold: bool) -> None:
        """Find what is there, compute the rest, share it, and perhaps stay."""
        tokens = tokens[: len(tokens) // PAGE * PAGE]
        found = self.cache.match(tokens)
        self.cache.lock(found.node)
        missing = len(tokens) // PAGE - len(found.pages)
        if missing > self.allocator.num_available:
            self.cache.unlock(found.node)
            return
        own = self.allocator.allocate(missing)
        there = self.cache.insert(found.node, tokens[len(found.pages) * PAGE :], own)
        assert there.pages == own
        self.cache.lock(there.node)
        self.cache.unlock(found.node)
        self.held.append((there.node, found.pages + own))
        if not hold:
            self.leave(len(self.held) - 1)

    @precondition(lambda self: self.held)
    @rule(which=st.integers(min_value=0))
    def leave(self, which: int) -> None:
        node, _ = self.held.pop(which % len(self.held))
        self.cache.unlock(node)

    @precondition(lambda self: self.held)
    @rule(which=st.integers(min_value=0))
    def doubt(self, which: int) -> None:
        node, _ = self.held.pop(which % len(self.held))
        self.cache.unlock(node)
        self.cache.discard(node)

    @rule(count=st.integers(1, 8))
    def take(self, count: int) -> None:
        if count <= self.allocator.num_available:
            self.own.append(self.allocator.allocate(count))

    @precondition(lambda self: self.own)
    @rule()
    def free(self) -> None:
        self.allocator.free(self.own.pop())

    @rule(count=st.integers(1, POOL))
    def evict(self, count: int) -> None:
        wanted = min(count, self.cache.evictable)
        before = self.allocator.num_free
        self.cache.evict(count)
        assert self.allocator.num_free == before + wanted

    @invariant()
    def in_order(self) -> None:
        check(self.cache, self.allocator)
        cached = set(self.cache.pages())
        for _, pages in self.held:
            assert cached.issuperset(pages), "what somebody stands on is never evicted"
        in_use = sum(map(len, self.own))
        assert self.allocator.num_free + len(cached) + in_use == POOL

    @invariant()
    def told(self) -> None:
        changes = self.cache.take_changes()
        assert not set(changes.stored) & set(changes.removed)
        self.known |= set(changes.stored)
        self.known -= set(changes.removed)
        assert self.known == {hashed for node in self.cache.nodes() for hashed in node.hashes}


TestTree = Tree.TestCase
TestTree.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("seed", range(5))
def test_long_random_use_finds_exactly_what_is_kept(seed: int) -> None:
    """Against the plainest model: the set of cached prefixes, page by page."""
    rng = random.Random(seed)
    allocator, cache = make(64)
    kept: dict[tuple[int, ...], int] = {}
    for _ in range(600):
        tokens = [rng.randrange(3) for _ in range(PAGE * rng.randrange(12))]
        found = cache.match(tokens)
        longest = max(n for n in range(len(tokens) // PAGE + 1) if n == 0 or tuple(tokens[: n * PAGE]) in kept)
        assert found.pages == [kept[tuple(tokens[: n * PAGE])] for n in range(1, longest + 1)]
        cache.lock(found.node)
        own = allocator.allocate(len(tokens) // PAGE - longest)
        alive = set(cache.pages())
        kept = {prefix: page for prefix, page in kept.items() if page in alive}
        cache.insert(found.node, tokens[longest * PAGE :], own)
        cache.unlock(found.node)
        kept |= {tuple(tokens[: (longest + n + 1) * PAGE]): page for n, page in enumerate(own)}
        assert len(kept) == len(cache.pages())
    check(cache, allocator)
