"""Checksums of pages: which pages are summed, how the sums travel, and what they say."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from common.engine.config import EngineConfig
from common.errors.base import MeshError
from common.mesh.ticket import Ticket
from common.transfer import notice
from common.transfer.base import no_wake
from common.transfer.channel import MAX_PAYLOAD_BYTES
from common.transfer.checksum import MAX_DIGESTS, SAMPLE_STEP, Hasher, OutgoingSums, PageSums
from common.transfer.notice import HandoverNotice
from common.worker.config import HandoverConfig, WorkerConfig

pytestmark = pytest.mark.unit

PAGE_BYTES = 64
TICKET = Ticket("room", 1, 7)


class Memory:
    """A pool of random pages, and who hashes them."""

    def __init__(self, pages: int) -> None:
        self.bytes = bytearray(random.Random(3).randbytes(pages * PAGE_BYTES))
        self.hasher = Hasher(self.read_page, no_wake)

    def read_page(self, page: int) -> memoryview:
        return memoryview(self.bytes)[page * PAGE_BYTES : (page + 1) * PAGE_BYTES]

    def sums(self, mode: str, pages: list[int], ticket: Ticket = TICKET, chunk: int = 7) -> PageSums:
        """As prefill makes them, of chunks of so many pages."""
        sums = OutgoingSums(self.hasher, mode, ticket, len(pages))
        for start in range(0, len(pages), chunk):
            sums.add(pages[start : start + chunk])
        return sums.result()

    def verdict(self, sums: PageSums, pages: list[int]) -> str:
        """As decode comes to it."""
        return sums.mismatch(self.hasher.digests(sums.of(pages)).result())


@pytest.fixture(scope="module")
def memory() -> Iterator[Memory]:
    made = Memory(3 * MAX_DIGESTS)
    yield made
    made.hasher.close()


@pytest.mark.parametrize("count", [1, 15, 16, 17, 100, MAX_DIGESTS, MAX_DIGESTS + 1, 3 * MAX_DIGESTS])
def test_a_flipped_bit_in_any_page_is_found(memory: Memory, count: int) -> None:
    pages = random.Random(count).sample(range(3 * MAX_DIGESTS), count)
    sums = memory.sums("full", pages)
    assert memory.verdict(sums, pages) == ""
    for index in {0, count // 2, count - 1}:
        page = memory.read_page(pages[index])
        page[PAGE_BYTES - 1] ^= 1
        assert "1 of" in memory.verdict(sums, pages)
        page[PAGE_BYTES - 1] ^= 1
    if count > 1:
        assert memory.verdict(sums, [*pages[2:], *pages[:2]] if count > 2 else pages[::-1]), "in another order"


def test_the_page_is_named(memory: Memory) -> None:
    pages = list(range(40))
    sums = memory.sums("full", pages)
    assert memory.verdict(sums, [*pages[:17], 99, *pages[18:]]) == (
        "1 of 40 checksums differ from prefill's, the first at page 17"
    )


def test_a_sample_takes_one_page_of_sixteen_by_the_ticket(memory: Memory) -> None:
    pages = list(range(160))
    seen = set()
    for attempt in range(1, 200):
        sums = memory.sums("sample", pages, Ticket("room", attempt, 1), chunk=attempt)
        assert len(sums.of(pages)) == 160 // SAMPLE_STEP
        assert memory.verdict(sums, pages) == ""
        assert sums == memory.sums("sample", pages, Ticket("room", attempt, 1), chunk=5)
        seen |= set(sums.of(pages))
    assert seen == set(pages), "over the rooms every page has its turn"
    assert len(memory.sums("sample", [5]).of([5])) == 1


@pytest.mark.parametrize("mode", ["sample", "full"])
def test_a_notice_for_many_small_pages_fits(memory: Memory, mode: str) -> None:
    """8,192 tokens on pages of one token, and beyond."""
    sums = PageSums(0, 1, bytes(8 * MAX_DIGESTS))
    assert len(memory.sums(mode, list(range(3 * MAX_DIGESTS))).digests) <= len(sums.digests)
    assert len(notice.encode(HandoverNotice(TICKET, 0, 1 << 40, 1 << 20, sums=sums))) < MAX_PAYLOAD_BYTES // 4


def test_sums_of_something_else_are_no_match(memory: Memory) -> None:
    pages = list(range(20))
    sums = memory.sums("full", pages)
    assert memory.verdict(sums, pages[:-1])
    assert memory.verdict(PageSums(20, 1, b""), pages), "sums of no page verify nothing"


def test_pages_without_bytes_are_refused() -> None:
    with pytest.raises(MeshError, match="--kv-checksum: full: the pages of an emulated engine have no bytes"):
        WorkerConfig(
            engine=EngineConfig(engine="emulated", model_path="adder"), handover=HandoverConfig(kv_checksum="full")
        )
