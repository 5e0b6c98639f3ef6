"""A model without weights whose keys and values are real bytes in a transfer backend's memory, checked at every step.

What a token's slot holds depends on every token up to it. Each step compares all pages of its sequences with what
must be there, byte by byte, before it computes: a page that never came, came from elsewhere or was written to later
fails the step with `WrongBytes`, which the sequence's failure tells by name.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
from numpy.typing import NDArray

from common.engine.base import Sampled
from common.engine.config import EngineConfig
from common.engine.engine import Engine
from common.engine.scheduler import Span
from common.kvcache.allocator import PageAllocator
from common.kvcache.layout import KvLayout
from common.transfer.base import TransferBackend

VOCAB_SIZE = 50_000
PAGE_SIZE = 16
WORD_BYTES = 8
WRONG = "WrongBytes"


class WrongBytes(Exception):
    """A page does not hold what was computed for it."""


class PagedToy:
    """A `Runner` over `memory`. A page is `PAGE_SIZE` slots of `slot_bytes`, zero where no token is yet."""

    def __init__(self, memory: memoryview, slot_bytes: int, context_length: int) -> None:
        self.layout = KvLayout("float32", 1, 1, slot_bytes // 8, PAGE_SIZE)
        assert self.layout.page_bytes == PAGE_SIZE * slot_bytes
        self.vocab_size = VOCAB_SIZE
        self.context_length = context_length
        self.fingerprint = self.model_path = "paged toy"
        self.eos_token_ids = ()
        self.pages_checked = 0
        self._memory = memory
        words = slot_bytes // WORD_BYTES
        self.slots: NDArray[np.uint64] = np.frombuffer(memory, dtype=np.uint64).reshape(-1, PAGE_SIZE, words)
        self._pattern = np.arange(1, 2 * words, 2, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)

    def step(self, spans: Seq[Span]) -> Sampled:
        return Sampled([token for span in spans for token in self._compute(span)], *self._nothing(spans))

    def read_page(self, page: int) -> memoryview:
        page_bytes = self.layout.page_bytes
        return self._memory[page * page_bytes : (page + 1) * page_bytes]

    def _nothing(self, spans: Seq[Span]) -> tuple[list[None], list[int]]:
        return [None] * sum(span.sample for span in spans), []

    def _compute(self, span: Span) -> list[int]:
        marks = marks_of(span.sequence.tokens(0, span.stop))
        pages = span.sequence.pages[: self.layout.pages_for(span.stop)]
        self._check(span, pages, marks)
        for position in range(span.start, span.stop):
            page, slot = divmod(position, PAGE_SIZE)
            if slot == 0:
                self.slots[pages[page]] = 0
            self.slots[pages[page], slot] = marks[position] * self._pattern
        return [next_token(int(marks[-1]))] if span.sample else []

    def _check(self, span: Span, pages: list[int], marks: NDArray[np.uint64]) -> None:
        """All pages that hold something already."""
        held = self.layout.pages_for(span.start)
        if not held:
            return
        wanted = np.zeros((held, *self.slots.shape[1:]), dtype=np.uint64)
        wanted.reshape(held * PAGE_SIZE, -1)[: span.start] = marks[: span.start, None] * self._pattern
        self.pages_checked += held
        if np.array_equal(self.slots[pages[:held]], wanted):
            return
        wrong = [i for i in range(held) if not np.array_equal(self.slots[pages[i]], wanted[i])]
        raise WrongBytes(f"pages {wrong} of {held} of {span.sequence.request_id}, in {[pages[i] for i in wrong]}")


def marks_of(token_ids: Seq[int]) -> NDArray[np.uint64]:
    """A number for each position that depends on all tokens up to it; never 0."""
    marks, mark = [], 0
    for token in token_ids:
        mark = (mark * 6364136223846793005 + 2 * token + 1) & 0xFFFFFFFFFFFFFFFF
        marks.append(mark | 1)
    return np.array(marks, dtype=np.uint64)


def next_token(mark: int) -> int:
    return (mark >> 20) % VOCAB_SIZE


def outputs_of(prompt_ids: Seq[int], count: int) -> list[int]:
    """What a sequence generates."""
    ids = list(prompt_ids)
    for _ in range(count):
        ids.append(next_token(int(marks_of(ids)[-1])))
    return ids[len(prompt_ids) :]


def paged_engine(
    backend: TransferBackend, num_pages: int, *, slot_bytes: int = 256, context_length: int = 1024, chunk: int = 64
) -> Engine:
    """An engine whose pool is the backend's."""
    memory = backend.allocate(num_pages * PAGE_SIZE * slot_bytes)
    config = EngineConfig(
        page_size=PAGE_SIZE, chunked_prefill_size=chunk, num_reserved_decode_tokens=16, decode_prealloc_high_water=1.0
    )
    return Engine(PagedToy(memory, slot_bytes, context_length), PageAllocator(num_pages), config)
