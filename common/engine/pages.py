"""The pages of sequences: what they take from the pool and the prefix cache, share, and give back."""

from __future__ import annotations

from collections.abc import Iterator

from common.engine.request import Sequence
from common.kvcache.allocator import PageAllocator
from common.kvcache.audit import Claim, expand
from common.kvcache.hashes import CacheChanges
from common.kvcache.ledger import PageState
from common.kvcache.radix import Node, Prefix, RadixCache


class SequencePages:
    """One pool, and its prefix cache if there is one.

    The first `shared` pages of a sequence belong to the cache, which keeps them as long as the sequence stands on
    `prefix`; the others are its own. Only full pages are cached, and only such as a successful step has computed or
    another worker has brought whole.
    """

    def __init__(self, allocator: PageAllocator, cache: RadixCache | None, page_size: int) -> None:
        self.allocator = allocator
        self.cache = cache
        self.page_size = page_size

    @property
    def num_available(self) -> int:
        """Pages that can be had: free ones, and cached ones that nobody stands on."""
        return self.allocator.num_available

    @property
    def num_shared(self) -> int:
        """Cached pages that somebody stands on, each counted once."""
        return self.cache.locked if self.cache else 0

    def find(self, sequence: Sequence, *, compute_last: bool = True) -> Prefix | None:
        """The longest cached prefix of a sequence's tokens; None if nothing is cached of it.

        With `compute_last` it ends before the last token: something must be computed to sample from. It is not
        locked.
        """
        if self.cache is None:
            return None
        tokens = sequence.num_tokens - compute_last
        prefix = self.cache.match(sequence.tokens(0, tokens - tokens % self.page_size))
        return prefix if prefix.pages else None

    def lock(self, node: Node | None) -> Node | None:
        """Stand on `node`, if it is one, until `unlock`: its pages and all before them stay as they are."""
        if self.cache and node:
            self.cache.lock(node)
        return node

    def unlock(self, node: Node | None) -> None:
        """Undo one `lock`."""
        if self.cache and node:
            self.cache.unlock(node)

    def start(self, sequence: Sequence, prefix: Prefix | None, leave: int) -> bool:
        """Give a sequence the pages of all its tokens, from `prefix` (see `find`) on new ones.

        False, and nothing happens, unless `leave` pages stay available.
        """
        found = prefix.pages if prefix else []
        # first of all: until it is locked, what was found counts as available, and could be evicted for the rest
        node = self.lock(prefix.node if prefix else None)
        needed = -(-sequence.num_tokens // self.page_size) - len(found)
        if self.num_available - needed < leave:
            self.unlock(node)
            return False
        sequence.pages = found + self.allocator.allocate(needed, after=found[-1] if found else None)
        sequence.prefix, sequence.shared = node, len(found)
        sequence.computed = len(found) * self.page_size
        if not sequence.output_ids:  # else it was told before, and now it may find what it has computed itself
            sequence.cached_tokens = sequence.computed
        return True

    def grow(self, sequence: Sequence) -> None:
        """Give a sequence one page more. Raises `OutOfPages`."""
        sequence.pages += self.allocator.allocate(1, after=sequence.pages[-1] if sequence.pages else None)

    def publish(self, sequence: Sequence) -> None:
        """Let others share the full pages of what is computed of a sequence.

        What the cache has already, because another one has computed the same meanwhile, the sequence uses from there.
        Its own copies are free then, unless a hand-over may be reading them: these it keeps to its end.
        """
        full = sequence.computed // self.page_size
        if self.cache is None or full <= sequence.shared:
            return
        tokens = sequence.tokens(sequence.shared * self.page_size, full * self.page_size)
        own = sequence.pages[sequence.shared : full]
        there = self.cache.insert(sequence.prefix or self.cache.root, tokens, own)
        self.cache.lock(there.node)
        self.unlock(sequence.prefix)
        sequence.pages[sequence.shared : full] = there.pages
        sequence.prefix, sequence.shared = there.node, full
        copies = [page for page, kept in zip(own, there.pages, strict=True) if page != kept]
        if sequence.prefill_only:
            sequence.copies += copies
        else:
            self.allocator.free(copies)

    def give_back(self, sequence: Sequence) -> None:
        """Take all pages of a sequence; the full ones that are computed stay cached, unless they are in doubt."""
        if not sequence.quarantined and not sequence.doubtful:
            self.publish(sequence)
        state = PageState.QUARANTINED if sequence.quarantined else PageState.IN_USE
        self.allocator.free(self.own(sequence), state)
        self.unlock(sequence.prefix)
        if self.cache and sequence.prefix and sequence.doubtful:
            self.cache.discard(sequence.prefix)
        sequence.pages, sequence.copies, sequence.prefix, sequence.shared = [], [], None, 0

    def quarantine(self, sequence: Sequence) -> None:
        """Its own pages may still be read by a hand-over, and so may the cached ones that it stands on."""
        self.allocator.move(self.own(sequence), PageState.IN_USE, PageState.QUARANTINED)
        sequence.quarantined = True

    def own(self, sequence: Sequence) -> list[int]:
        """The pages that are a sequence's own."""
        return sequence.pages[sequence.shared :] + sequence.copies

    def claims(self) -> Iterator[Claim]:
        """What the free list and the cache say they have."""
        yield Claim("the free list", PageState.FREE, expand(self.allocator.free_extents()))
        if self.cache:
            yield Claim("the prefix cache", PageState.CACHED, self.cache.pages())

    def take_changes(self) -> CacheChanges | None:
        """What came to the prefix cache and left it since the last call; None for nothing."""
        changes = self.cache.take_changes() if self.cache else None
        return changes if changes and (changes.stored or changes.removed) else None

    def awaited(self, sequence: Sequence, prefix: Prefix | None, others: list[Sequence]) -> bool:
        """Whether one of `others` is computing the page that `sequence` would begin with.

        So a prefix that several prompts bring at the same time is computed once, too.
        """
        start = len(prefix.pages) * self.page_size if prefix else 0
        stop = start + self.page_size
        if self.cache is None or stop >= sequence.num_tokens:
            return False
        wanted = sequence.tokens(start, stop)
        return any(
            other.pending > 1
            and other.tokens(start, stop) == wanted
            and other.tokens(0, start) == sequence.tokens(0, start)
            for other in others
        )
