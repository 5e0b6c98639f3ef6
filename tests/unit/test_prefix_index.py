"""Cache events from a worker's pool to a router's index: exact at every moment, bounded, and begun anew when lost."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from common.kvcache.allocator import PageAllocator
from common.kvcache.hashes import CacheChanges, page_hashes
from common.kvcache.radix import RadixCache
from common.worker import cache_news
from common.worker.cache_news import CacheTeller
from common.worker.sessions import Session, Sessions
from pdmesh.v1 import types_pb2
from services.router.prefix_index import CachedPrefixes, Caching, held_tokens

pytestmark = pytest.mark.unit

PAGE = 4
Update = types_pb2.PrefixCacheUpdate


def worker(name: str, told: list[int], page_size: int = PAGE, pages: int = 100) -> Caching:
    prefixes = CachedPrefixes(pages)
    if told:
        prefixes.apply(Update(reset=True, stored=page_hashes(told, page_size)))
    record = types_pb2.Worker(kv_layout=types_pb2.KvLayout(page_size=page_size))
    return cast(Caching, SimpleNamespace(worker_id=name, record=record, prefixes=prefixes))


def test_it_says_how_many_tokens_each_worker_has() -> None:
    prompt = list(range(100, 121))
    workers = [
        worker("all", prompt),
        worker("half", prompt[:9]),
        worker("other", [1, *prompt[1:]]),
        worker("none", []),
        worker("wide", prompt, page_size=16),
    ]
    assert held_tokens(workers, prompt) == {"all": 20, "half": 8, "other": 0, "none": 0, "wide": 16}
    assert held_tokens(workers, prompt[:3]) == dict.fromkeys(["all", "half", "other", "none", "wide"], 0)


@pytest.mark.parametrize("length", range(12))
def test_counting_finds_the_end_of_every_prefix(length: int) -> None:
    hashes = page_hashes(list(range(11 * PAGE)), PAGE)
    prefixes = CachedPrefixes(100)
    prefixes.apply(Update(stored=hashes[:length]))
    assert prefixes.count(hashes) == length
    assert prefixes.count([]) == 0


def test_a_worker_that_tells_too_much_is_not_believed_until_it_begins_anew() -> None:
    prefixes = CachedPrefixes(3)
    prefixes.apply(Update(stored=[1, 2, 3]))
    prefixes.apply(Update(stored=[4]))
    assert len(prefixes) == 0
    prefixes.apply(Update(stored=[5]))
    assert len(prefixes) == 0
    prefixes.apply(Update(reset=True, stored=[5]))
    assert prefixes.count([5, 6]) == 1
    prefixes.clear()
    assert len(prefixes) == 0


class Reader:
    """A router at the other end of a session."""

    def __init__(self, sessions: Sessions[Any], teller: CacheTeller[Any]) -> None:
        self.session: Session[Any] = sessions.open()
        self.prefixes = CachedPrefixes(10_000)
        self.updates: list[Update] = []
        teller.opened(self.session)

    def read(self) -> CachedPrefixes:
        waiting, self.session.outbox._items = self.session.outbox._items, []
        for update in waiting:
            if isinstance(update, Update):
                self.updates.append(update)
                self.prefixes.apply(update)
        return self.prefixes


@pytest.fixture
def sessions() -> Sessions[Any]:
    return Sessions()


@pytest.fixture
def teller(sessions: Sessions[Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[CacheTeller[Any]]:
    monkeypatch.setattr(cache_news, "INTERVAL_S", 3600.0)  # the test says when
    teller = CacheTeller[Any](sessions, lambda update: update)
    yield teller
    teller.close()


async def test_a_router_knows_what_the_tree_has_at_every_moment(
    sessions: Sessions[Any], teller: CacheTeller[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random use of a real tree; routers come at any time, some read late, and events are cut small."""
    monkeypatch.setattr(cache_news, "MOST_HASHES", 8)
    monkeypatch.setattr(cache_news, "MOST_WAITING", 5)
    rng = random.Random(3)
    allocator = PageAllocator(40)
    cache = RadixCache(allocator, PAGE)
    readers = [Reader(sessions, teller)]
    for _ in range(600):
        tokens = [rng.randrange(2) for _ in range(PAGE * rng.randrange(10))]
        found = cache.match(tokens)
        cache.lock(found.node)
        own = allocator.allocate(len(tokens) // PAGE - len(found.pages))
        cache.insert(found.node, tokens[len(found.pages) * PAGE :], own)
        cache.unlock(found.node)
        if rng.random() < 0.2:
            cache.evict(rng.randrange(1, 20))
        if rng.random() < 0.7:
            teller.update(cache.take_changes())
        if rng.random() < 0.02:
            readers.append(Reader(sessions, teller))
        for reader in readers:
            if rng.random() < 0.3:
                for position in range(len(reader.read()) and 3):
                    hashes = page_hashes([position % 2] * 40, PAGE)
                    held = reader.prefixes.count(hashes)
                    assert all(hashed in reader.prefixes._pages for hashed in hashes[:held])
            elif rng.random() < 0.1:
                reader.session.outbox._items += ["tokens"] * 7  # it does not keep up
        teller._tell()
    teller.update(cache.take_changes())
    for _ in range(3):
        for reader in readers:
            reader.read()
        teller._tell()
    kept = {hashed for node in cache.nodes() for hashed in node.hashes}
    assert len(readers) > 5
    for reader in readers:
        assert reader.read()._pages == kept
        assert max(len(update.stored) for update in reader.updates) <= 8
    assert any(update.reset for update in readers[0].updates), "it lagged, and began anew"


async def test_who_has_no_cache_says_nothing(sessions: Sessions[Any], teller: CacheTeller[Any]) -> None:
    reader = Reader(sessions, teller)
    teller._tell()
    assert len(reader.session.outbox) == 0
    assert teller._timer is None


async def test_what_comes_and_goes_between_two_tellings_is_told_once(
    sessions: Sessions[Any], teller: CacheTeller[Any]
) -> None:
    reader = Reader(sessions, teller)
    teller.update(CacheChanges([1, 2], []))
    teller.update(CacheChanges([3], [2]))
    teller.update(CacheChanges([2], [1]))
    teller._tell()
    reader.read()
    (update,) = reader.updates
    assert (list(update.stored), list(update.removed)) == ([3, 2], [1])
    late = Reader(sessions, teller)
    assert late.read()._pages == reader.prefixes._pages == {2, 3}
    await asyncio.sleep(0)
