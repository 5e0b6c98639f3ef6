"""The attention seam: paged, causal attention of a step's tokens, planned once and run for every layer.

Shape suffixes: T tokens of the step, H query heads, K key/value heads, D head dimension.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch

from common.kvcache.pool import KvPool

BACKENDS = {"torch": "common.ops.attention.torch:TorchAttention"}


@dataclass(slots=True)
class Span:
    """The consecutive tokens of one sequence in a step.

    Attributes:
        start: Position in the sequence of the first of them.
        length: How many they are, at least one.
        pages: The sequence's pages in token order; they cover `start + length` tokens.
    """

    start: int
    length: int
    pages: list[int]

    @property
    def end(self) -> int:
        """Tokens of the sequence after this step."""
        return self.start + self.length


class AttentionPlan(Protocol):
    """One step's attention; valid until the next plan is made."""

    def attend(self, layer: int, q_THD: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor) -> torch.Tensor:
        """Store the new keys and values in the pages, then attend causally to everything up to each token.

        Returns `[T, H * D]`. Head `h` reads key/value head `h // (H / K)`.
        """
        ...


class AttentionBackend(Protocol):
    """Attention over one pool."""

    def plan(self, spans: Sequence[Span]) -> AttentionPlan:
        """Prepare a step. The rows of the step's tensors follow `spans`: first those of one token, the longest
        sequence first, then the others."""
        ...


class AttentionBackendFactory(Protocol):
    """How a backend is made; its class is one."""

    def __call__(self, pool: KvPool, num_heads: int, scale: float) -> AttentionBackend: ...


def make_attention(name: str, pool: KvPool, num_heads: int, scale: float) -> AttentionBackend:
    """The backend `name` over `pool`, for `num_heads` query heads and scores multiplied by `scale`."""
    module, _, attribute = BACKENDS[name].partition(":")
    factory = cast(AttentionBackendFactory, getattr(importlib.import_module(module), attribute))
    return factory(pool, num_heads, scale)
