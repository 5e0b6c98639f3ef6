"""Prefixes whose KV is kept for later prompts: a radix tree over token ids, in whole pages.

The algorithm is SGLang's RadixAttention (Zheng et al., "SGLang: Efficient Execution of Structured Language Model
Programs", NeurIPS 2024). A prompt walks down the tree as far as its tokens agree and finds the pages of that prefix.
What somebody stands on is locked, with all that lies above it; of the rest, the least recently used leaves are
evicted first. Here an edge holds whole pages, a leaf is evicted from its end and only as far as needed, and the
pages belong to the tree: they are CACHED in the ledger, locked or not.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from common.kvcache.allocator import PageAllocator
from common.kvcache.hashes import TOKEN_BYTES, CacheChanges, chain, key_of
from common.kvcache.ledger import PageState

# Evicted at once, as a share of the pool, though less may be wanted: the allocator then has runs to choose from. In a
# simulation with a full pool runs of new pages were 7 pages long with this, 2 with a quarter of it and 1 without; the
# share of pages that were found fell from 54 to 53 %.
SLACK = 1 / 16


@dataclass(slots=True, eq=False)
class Node:
    """An edge of the tree and the pages along it.

    Attributes:
        key: Tokens of the pages, as `key_of` gives them.
        hashes: The pages' chained hashes.
        children: Edges that go on from here, by the key of their first page.
        locks: Who stands here or below.
        used: Logical time of the last use.
        queued: Whether the queue of leaves has an entry for it.
    """

    key: bytes
    pages: list[int]
    hashes: list[int]
    parent: Node | None
    children: dict[bytes, Node] = field(default_factory=dict)
    locks: int = 0
    used: int = 0
    queued: bool = False


@dataclass(frozen=True, slots=True)
class Prefix:
    """A path from the root: its last node, and all pages along it, in token order."""

    node: Node
    pages: list[int]


class RadixCache:
    """The prefix cache of one pool. Not thread-safe: one rank's loop owns it.

    The allocator evicts from it when it runs out of free pages. Looking a prompt up takes time in proportion to its
    length, whatever the cache holds.

    Attributes:
        evictable: Pages that nobody has locked.
    """

    def __init__(self, allocator: PageAllocator, page_size: int) -> None:
        self.root = Node(b"", [], [], None)
        self.evictable = 0
        self._allocator = allocator
        self._page_bytes = page_size * TOKEN_BYTES
        self._slack = int(allocator.num_pages * SLACK)
        self._clock = 0
        self._ties = itertools.count()
        self._leaves: list[tuple[int, int, Node]] = []  # a heap by last use; may name nodes that are none any more
        self._changes: dict[int, bool] = {}
        allocator.reclaim_from(self)

    @property
    def locked(self) -> int:
        """Pages that somebody stands on."""
        return self._allocator.ledger.count(PageState.CACHED) - self.evictable

    def nodes(self) -> Iterator[Node]:
        """All nodes but the root."""
        stack = list(self.root.children.values())
        while stack:
            yield (node := stack.pop())
            stack += node.children.values()

    def pages(self) -> list[int]:
        """All pages of the tree."""
        return [page for node in self.nodes() for page in node.pages]

    # --------------------------------------------------------------------------------- look up and hold

    def match(self, tokens: Sequence[int]) -> Prefix:
        """The longest cached prefix of `tokens` in whole pages. It is not locked: `lock` it before all else."""
        return self._descend(self.root, key_of(tokens))

    def lock(self, node: Node) -> None:
        """Keep a node and all above it until `unlock`."""
        self._clock += 1
        while node.parent:
            if not node.locks:
                self.evictable -= len(node.pages)
            node.locks += 1
            node.used = self._clock
            node = node.parent

    def unlock(self, node: Node) -> None:
        """Undo one `lock`."""
        self._clock += 1
        lowest = node
        while node.parent:
            if not node.locks:
                raise ValueError("a node is unlocked that nobody has locked")
            node.locks -= 1
            node.used = self._clock
            if not node.locks:
                self.evictable += len(node.pages)
            node = node.parent
        self._offer(lowest)

    # --------------------------------------------------------------------------------- come and go

    def insert(self, at: Node, tokens: Sequence[int], pages: Sequence[int]) -> Prefix:
        """Add full pages that are IN_USE and hold `tokens`, which follow those of `at`, a locked node or the root.

        Returns where they end, not locked, and the tree's pages for these tokens. Where those are others, because the
        tokens were there already, the caller keeps its own.
        """
        key = key_of(tokens)
        found = self._descend(at, key)
        node, have = found.node, len(found.pages)
        if new := list(pages[have:]):
            self._allocator.move(new, PageState.IN_USE, PageState.CACHED)
            rest = key[have * self._page_bytes :]
            hashes = chain(rest, self._page_bytes, node.hashes[-1] if node.hashes else 0)
            self._clock += 1
            child = Node(rest, new, hashes, node, used=self._clock)
            node.children[rest[: self._page_bytes]] = child
            self.evictable += len(new)
            for hashed in hashes:
                self._changes.pop(hashed, None)  # so that it stands behind those of the pages before it
                self._changes[hashed] = True
            node = child
            self._offer(child)
        return Prefix(node, found.pages + new)

    def evict(self, count: int) -> None:
        """Free at least `count` pages, and `SLACK`, or all that are not locked; the least recently used first."""
        count = min(self.evictable, max(count, self._slack))
        freed: list[int] = []
        while len(freed) < count:
            used, _, node = heapq.heappop(self._leaves)
            node.queued = False
            if node.used != used:
                self._offer(node)
            elif self._is_loose(node):
                freed += self._cut(node, min(len(node.pages), count - len(freed)))
        self._allocator.free(freed, PageState.CACHED)

    def discard(self, node: Node) -> None:
        """Evict a node that nobody has locked, and what then has no other use above it: its contents are in doubt."""
        while self._is_loose(node):
            assert node.parent
            node, doubtful = node.parent, node
            self._allocator.free(self._cut(doubtful, len(doubtful.pages)), PageState.CACHED)

    def take_changes(self) -> CacheChanges:
        """What came and went since the last call."""
        changes, self._changes = self._changes, {}
        return CacheChanges.net(changes)

    # --------------------------------------------------------------------------------- the tree

    def _descend(self, node: Node, key: bytes) -> Prefix:
        """Walk down from `node` as far as `key` agrees; the edge on which it ends is split there."""
        pages: list[int] = []
        start = 0
        while child := node.children.get(key[start : start + self._page_bytes]):
            common = self._common_pages(child.key, key[start : start + len(child.key)])
            node = child if common == len(child.pages) else self._split(child, common)
            pages += node.pages
            start += len(node.key)
            if node is not child:
                break
        return Prefix(node, pages)

    def _common_pages(self, key: bytes, other: bytes) -> int:
        if key == other:
            return len(key) // self._page_bytes
        size = self._page_bytes
        starts = range(0, min(len(key), len(other)) // size * size, size)
        return next((at // size for at in starts if key[at : at + size] != other[at : at + size]), len(starts))

    def _split(self, node: Node, count: int) -> Node:
        """Put a new node above `node` that takes its first `count` pages. Who stands on `node` stays there."""
        assert node.parent
        cut = count * self._page_bytes
        upper = Node(
            node.key[:cut], node.pages[:count], node.hashes[:count], node.parent, locks=node.locks, used=node.used
        )
        node.parent.children[node.key[: self._page_bytes]] = upper
        node.key, node.pages, node.hashes, node.parent = node.key[cut:], node.pages[count:], node.hashes[count:], upper
        upper.children[node.key[: self._page_bytes]] = node
        return upper

    def _cut(self, node: Node, count: int) -> list[int]:
        """Take the last `count` pages off a leaf, and the leaf off the tree if none is left. The pages stay CACHED."""
        assert node.parent
        kept = len(node.pages) - count
        pages, hashes = node.pages[kept:], node.hashes[kept:]
        self.evictable -= count
        self._changes |= dict.fromkeys(hashes, False)
        if kept:
            node.key, node.pages, node.hashes = (
                node.key[: kept * self._page_bytes],
                node.pages[:kept],
                node.hashes[:kept],
            )
            self._offer(node)
        else:
            del node.parent.children[node.key[: self._page_bytes]]
            self._offer(node.parent)
            node.pages = []
        return pages

    def _is_loose(self, node: Node) -> bool:
        """Whether it is a leaf that nobody has locked."""
        return bool(node.parent and node.pages and not node.children and not node.locks)

    def _offer(self, node: Node) -> None:
        """Queue a leaf for eviction, once."""
        if not node.queued and self._is_loose(node):
            node.queued = True
            heapq.heappush(self._leaves, (node.used, next(self._ties), node))
