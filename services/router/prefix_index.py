"""What each worker's prefix cache has, by the chained hashes that workers tell (`common/kvcache/hashes.py`).

A hint, a moment old: what a worker then finds of a prompt is its own to say.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from common.kvcache.hashes import page_hashes
from common.obs.log import get_logger
from pdmesh.v1 import types_pb2

log = get_logger(__name__)


class CachedPrefixes:
    """The cached pages of one worker, in one life of the stream to it.

    Holds no more hashes than the worker has pages; one that tells more is not believed until it begins anew.
    """

    def __init__(self, most_pages: int) -> None:
        self._most_pages = most_pages
        self._pages: set[int] = set()
        self._believed = True

    def __len__(self) -> int:
        return len(self._pages)

    def apply(self, update: types_pb2.PrefixCacheUpdate) -> None:
        """What the worker tells, in order."""
        if update.reset:
            self.clear()
        if not self._believed:
            return
        self._pages.difference_update(update.removed)
        self._pages.update(update.stored)
        if len(self._pages) > self._most_pages:
            log.warning("a worker tells of more cached pages than it has", pages=self._most_pages)
            self._pages.clear()
            self._believed = False

    def clear(self) -> None:
        """Nothing is known: the stream is new, or broke."""
        self._pages.clear()
        self._believed = True

    def count(self, hashes: Sequence[int]) -> int:
        """How many of a prompt's pages, from the first, are cached. Takes the logarithm of their number."""
        low, high = 0, len(hashes)
        while low < high:  # a page is cached only with all before it, so that bisecting finds the last one
            middle = (low + high) // 2
            if hashes[middle] in self._pages:
                low = middle + 1
            else:
                high = middle
        return low


class Caching(Protocol):
    """A worker whose cache is followed."""

    @property
    def worker_id(self) -> str: ...

    @property
    def record(self) -> types_pb2.Worker: ...

    @property
    def prefixes(self) -> CachedPrefixes: ...


def held_tokens(workers: Iterable[Caching], token_ids: Sequence[int]) -> dict[str, int]:
    """How many of a prompt's tokens, from the first, each worker has cached, by its id."""
    hashes: dict[int, list[int]] = {}  # by page size
    held = {}
    for worker in workers:
        page_size = worker.record.kv_layout.page_size
        if not len(worker.prefixes) or not page_size:
            held[worker.worker_id] = 0
            continue
        if page_size not in hashes:
            hashes[page_size] = page_hashes(token_ids, page_size)
        held[worker.worker_id] = worker.prefixes.count(hashes[page_size]) * page_size
    return held
