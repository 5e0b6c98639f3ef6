"""The model runner: weights on one device, a KV pool attached, one forward pass per step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from common.engine.config import EngineConfig
from common.kvcache.layout import KvLayout
from common.kvcache.pool import KvPool


@dataclass(slots=True)
class Chunk:
    """What one sequence computes in a step.

    Attributes:
        start: Position in the sequence of `token_ids[0]`; the KV of all earlier positions is in `pages`.
        token_ids: Tokens to compute, at least one.
        pages: The sequence's pages in token order; they cover at least `start + len(token_ids)` tokens.
        sample: Whether the logits after the last token are wanted.
    """

    start: int
    token_ids: list[int]
    pages: list[int]
    sample: bool


class ModelRunner:
    """Weights and, once attached, a KV pool."""

    layout: KvLayout
    vocab_size: int
    context_length: int
    fingerprint: str
    eos_token_ids: tuple[int, ...]

    @classmethod
    def load(cls, config: EngineConfig) -> ModelRunner:
        raise NotImplementedError

    def attach_pool(self, pool: KvPool) -> None:
        raise NotImplementedError

    def run(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        raise NotImplementedError
