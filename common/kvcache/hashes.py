"""Chained hashes of pages: the name of a prefix that workers and routers agree on without sending its tokens.

The hash of a page is that of its tokens, seeded with the hash of the page before it: equal hashes mean equal prefixes,
but for accidents, which a hint to a router may have. Who decides about pages compares tokens.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import msgspec
from xxhash import xxh3_64_intdigest

TOKEN_BYTES = 4


class CacheChanges(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Hashes of pages that came to a prefix cache and that left it; each is in one of the lists at most.

    Those of a prefix are in their order.
    """

    stored: list[int] = msgspec.field(default_factory=list)
    removed: list[int] = msgspec.field(default_factory=list)

    @staticmethod
    def net(present: dict[int, bool]) -> CacheChanges:
        """From hashes, and whether each of them is there now."""
        stored = [hashed for hashed, here in present.items() if here]
        return CacheChanges(stored, [hashed for hashed, here in present.items() if not here])


def key_of(tokens: Sequence[int]) -> bytes:
    """Token ids as bytes, `TOKEN_BYTES` each, which compare and hash fast."""
    return array("I", tokens).tobytes()


def chain(key: bytes, page_bytes: int, parent: int = 0) -> list[int]:
    """The hashes of the whole pages in `key`, of which each holds `page_bytes` of it; `parent` comes before them."""
    hashes = []
    for start in range(0, len(key) - page_bytes + 1, page_bytes):
        parent = xxh3_64_intdigest(key[start : start + page_bytes], parent)
        hashes.append(parent)
    return hashes


def page_hashes(tokens: Sequence[int], page_size: int) -> list[int]:
    """The hashes of the whole pages of a sequence of tokens, from its first one on."""
    return chain(key_of(tokens), page_size * TOKEN_BYTES)
