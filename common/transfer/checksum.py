"""Checksums of KV pages: that what decode is about to read is what prefill had.

Each page is hashed by XXH3 (64 bits) in a thread of its own, which needs neither the GIL nor a copy and runs at about
the speed of memory. That finds what goes wrong by accident: a page that never came, came twice, from elsewhere or in
part. It is no protection against somebody who forges pages.

The sums travel in the hand-over notice, whose size is bounded: beyond `MAX_DIGESTS` pages one digest stands for
several neighbours. They say themselves which pages they are of, so prefill alone decides how many are checked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Annotated

import msgspec
import xxhash

from common.mesh.ticket import Ticket
from common.transfer.base import Wake

SAMPLE_STEP = 16
MAX_DIGESTS = 1024
DIGEST_BYTES = 8

ReadPage = Callable[[int], memoryview]
"""The bytes of a page, by its number in the pool."""


class PageSums(msgspec.Struct, frozen=True, array_like=True):
    """What the pages `skip`, `skip + step`, … of a hand-over hold; its first page is number 0.

    `digests` are of 8 bytes each: one a page, or one for as many neighbours as makes them fit.
    """

    skip: Annotated[int, msgspec.Meta(ge=0)]
    step: Annotated[int, msgspec.Meta(ge=1)]
    digests: bytes

    def of(self, pages: Sequence[int]) -> Sequence[int]:
        """Those of a hand-over's pages that were summed."""
        return pages[self.skip :: self.step]

    def mismatch(self, digests: bytes) -> str:
        """What is wrong with pages that have these digests, one a page; empty if nothing is."""
        if not digests:
            return "the checksums are of none of the pages that were granted"
        here = fold(digests)
        if here == self.digests:
            return ""
        if len(here) != len(self.digests):
            return f"checksums of {len(self.digests)} bytes came for pages that have {len(here)}"
        pairs = zip(split(here, DIGEST_BYTES), split(self.digests, DIGEST_BYTES), strict=True)
        wrong = [i for i, (ours, theirs) in enumerate(pairs) if ours != theirs]
        first = self.skip + self.step * group_size(len(digests) // DIGEST_BYTES) * wrong[0]
        return f"{len(wrong)} of {len(here) // DIGEST_BYTES} checksums differ from prefill's, the first at page {first}"


class Hasher:
    """Digests of a pool's pages, computed in a thread that lives from its first work to `close`."""

    def __init__(self, read: ReadPage, wake: Wake) -> None:
        self._read = read
        self._wake = wake
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checksum")

    def digests(self, pages: Sequence[int]) -> Future[bytes]:
        """8 bytes for each page, in order. The pages must not change until then; `wake` is called when it is done."""
        future = self._thread.submit(self._digests, list(pages))
        future.add_done_callback(lambda _: self._wake())
        return future

    def close(self) -> None:
        """End the thread after what it does now; the pool may be unmapped when this returns."""
        self._thread.shutdown(cancel_futures=True)

    def _digests(self, pages: list[int]) -> bytes:
        return b"".join(xxhash.xxh3_64_digest(self._read(page)) for page in pages)


class OutgoingSums:
    """The sums of one hand-over of `count` pages, which come to be as its pages are computed.

    `sample` takes every 16th page, from one on that depends on the ticket; `full` takes all.
    """

    def __init__(self, hasher: Hasher, mode: str, ticket: Ticket, count: int) -> None:
        self._hasher = hasher
        self._step = SAMPLE_STEP if mode == "sample" else 1
        self._skip = xxhash.xxh3_64_intdigest(str(ticket).encode()) % max(1, min(self._step, count))
        self._seen = 0
        self._digests: list[Future[bytes]] = []

    def add(self, pages: Sequence[int]) -> None:
        """The next pages, in order; they do not change any more."""
        wanted = [page for i, page in enumerate(pages, self._seen) if i % self._step == self._skip]
        self._seen += len(pages)
        if wanted:
            self._digests.append(self._hasher.digests(wanted))

    @property
    def done(self) -> bool:
        """Whether all that was added is summed."""
        return all(future.done() for future in self._digests)

    def result(self) -> PageSums:
        """The sums, once `done`."""
        return PageSums(self._skip, self._step, fold(b"".join(future.result() for future in self._digests)))


def group_size(count: int) -> int:
    """How many of `count` pages share a digest on the wire."""
    return max(1, -(-count // MAX_DIGESTS))


def fold(digests: bytes) -> bytes:
    """Digests of pages, as few as go on the wire: the digest of a group is that of its pages' digests."""
    group_bytes = group_size(len(digests) // DIGEST_BYTES) * DIGEST_BYTES
    if group_bytes == DIGEST_BYTES:
        return digests
    return b"".join(map(xxhash.xxh3_64_digest, split(digests, group_bytes)))


def split(data: bytes, nbytes: int) -> list[bytes]:
    """Pieces of `nbytes`."""
    return [data[i : i + nbytes] for i in range(0, len(data), nbytes)]
