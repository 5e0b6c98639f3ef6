"""A model without weights: its logits depend on every token of a sequence, as its pages hold them."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import torch

from common.engine.base import Sampled
from common.engine.config import EngineConfig
from common.engine.engine import Engine
from common.engine.runner import Chunk, run_and_sample
from common.engine.scheduler import Span
from common.kvcache.allocator import PageAllocator
from common.kvcache.layout import KvLayout

VOCAB_SIZE = 300
EOS = 7


class ToyRunner:
    """Writes token ids where a model would write keys and values, and hashes what the pages hold into logits.

    A page that is shared by mistake, lost or not yet written changes the output from there on.
    """

    def __init__(self, num_pages: int, page_size: int = 4, context_length: int = 256) -> None:
        self.layout = KvLayout("float32", 1, 1, 1, page_size)
        self.vocab_size = VOCAB_SIZE
        self.context_length = context_length
        self.fingerprint = self.model_path = "toy"
        self.eos_token_ids = (EOS,)
        self.slots = np.full((num_pages, page_size), -1)
        self.steps: list[list[Chunk]] = []
        self.fail_at: set[int] = set()  # numbers of steps that raise
        self.broken: set[int] = set()  # first tokens of sequences whose logits are NaN

    def step(self, spans: Seq[Span]) -> Sampled:
        return run_and_sample(self.run, spans)

    def run(self, chunks: Seq[Chunk]) -> torch.Tensor:
        self.steps.append(list(chunks))
        if len(self.steps) in self.fail_at:
            raise RuntimeError("the toy broke")
        rows = []
        for chunk in chunks:
            end = chunk.start + len(chunk.token_ids)
            for position, token in enumerate(chunk.token_ids, chunk.start):
                page, slot = divmod(position, self.layout.page_size)
                self.slots[chunk.pages[page], slot] = token
            if chunk.sample:
                held = self.slots[chunk.pages].reshape(-1)[:end].tolist()
                rows.append(toy_logits(held) if held[0] not in self.broken else np.full(VOCAB_SIZE, np.nan))
        return torch.from_numpy(np.array(rows, dtype=np.float32).reshape(-1, VOCAB_SIZE))


def toy_logits(token_ids: Seq[int]) -> np.ndarray:
    """Logits after `token_ids`."""
    return np.random.default_rng(token_ids).standard_normal(VOCAB_SIZE) * 3


def greedy(prompt_ids: Seq[int], count: int) -> list[int]:
    """What a toy engine generates greedily, the end of the sequence ignored."""
    ids = list(prompt_ids)
    for _ in range(count):
        ids.append(int(toy_logits(ids).astype(np.float32).argmax()))
    return ids[len(prompt_ids) :]


def toy_engine(num_pages: int = 64, page_size: int = 4, context_length: int = 256, **settings: int) -> Engine:
    runner = ToyRunner(num_pages, page_size, context_length)
    return Engine(runner, PageAllocator(num_pages), EngineConfig(page_size=page_size, **settings))
