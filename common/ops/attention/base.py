"""The attention seam: paged, causal attention of a step's tokens, planned once and run for every layer.

Shape suffixes: T tokens of the step, H query heads, K key/value heads, D head dimension.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch

from common.kvcache.pool import KvPool

# By name, and by the kind of the pool's layout.
BACKENDS = {
    ("torch", "mha"): "common.ops.attention.torch:TorchAttention",
    ("torch", "mla"): "common.ops.attention.torch_latent:TorchLatentAttention",
}


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
    """One step's attention over keys and values (a pool of kind "mha"); valid until the next plan is made."""

    def attend(self, layer: int, q_THD: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor) -> torch.Tensor:
        """Store the new keys and values in the pages, then attend causally to everything up to each token.

        Returns `[T, H * D]`. Head `h` reads key/value head `h // (H / K)`.
        """
        ...


class LatentPlan(Protocol):
    """One step's attention over latents (a pool of kind "mla"); valid until the next plan is made.

    Shape suffixes: N dimension of a key without its rotated part, R of the rotated part, V of a value, X = N + V,
    C dimension of the latent, L = C + R.
    """

    def attend_latent(
        self,
        layer: int,
        q_THN: torch.Tensor,
        q_THR: torch.Tensor,
        latent_TL: torch.Tensor,
        expand_HXC: torch.Tensor,
    ) -> torch.Tensor:
        """Store the new latents in the pages, then attend causally to everything up to each token.

        A token's latent is `[c, r]`; head `h` has the key `[expand[h, :N] @ c, r]` and the value
        `expand[h, N:] @ c`. Returns `[T, H * V]`.
        """
        ...


Plan = Any  # an `AttentionPlan` or a `LatentPlan`, as the pool is: a model asks for the one that its layout needs


class AttentionBackend(Protocol):
    """Attention over one pool."""

    def plan(self, spans: Sequence[Span]) -> Plan:
        """Prepare a step. The rows of the step's tensors follow `spans`: first those of one token, the longest
        sequence first, then the others."""
        ...


class AttentionBackendFactory(Protocol):
    """How a backend is made; its class is one."""

    def __call__(self, pool: KvPool, num_heads: int, scale: float) -> AttentionBackend: ...


def make_attention(name: str, pool: KvPool, num_heads: int, scale: float) -> AttentionBackend:
    """The backend `name` for the kind of `pool`, with `num_heads` query heads and scores multiplied by `scale`."""
    module, _, attribute = BACKENDS[name, pool.layout.kind].partition(":")
    factory = cast(AttentionBackendFactory, getattr(importlib.import_module(module), attribute))
    return factory(pool, num_heads, scale)
