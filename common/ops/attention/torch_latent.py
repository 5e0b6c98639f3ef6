"""Paged multi-head latent attention (DeepSeek-V2, https://arxiv.org/abs/2405.04434) from torch's own operations.

The pool keeps of each token one latent `c` and one rotated key part `r` that all heads share. A head's key is
`[W_k c, r]` and its value `W_v c`. There are two ways to attend, equal but for rounding:

- expanded: make every head's keys and values of all the sequence's tokens, then attend as usual;
- absorbed: as `q (W_k c) = (q W_k) c`, turn the queries instead, attend to the latents themselves as one key/value
  head of all query heads, and turn the sums of latents into values.

`absorbs` says which of them multiplies less: single tokens are absorbed, long prompts expanded.

Shape suffixes: T tokens of the step, B sequences, S keys (pages * page size), H heads, N dimension of a head's key
without its rotated part, R of the rotated part, D = N + R, V of a head's value, X = N + V, C dimension of the latent,
L = C + R, Z heads at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from common.kvcache.pool import KvPool
from common.ops.attention.base import Span
from common.ops.attention.causal import CausalAttention
from common.ops.attention.paging import DecodeGroup, PagedStep, Paging, PrefillSpan

MAX_EXPANDED_BYTES = 2**28  # keys and values that are made at once, where one head's are not more already


class TorchLatentAttention:
    """Latent attention over one pool; see `common.ops.attention.base.LatentBackend`."""

    def __init__(self, pool: KvPool, num_heads: int, scale: float) -> None:
        self.paging = Paging(pool)
        self.causal = CausalAttention(pool.tensor.dtype, pool.tensor.device, scale)
        self.latent_dim = pool.layout.head_dim
        self.scale = scale

    def plan(self, spans: Sequence[Span]) -> TorchLatentPlan:
        """Indices and masks of a step. Clears the pages that the step begins and does not fill."""
        return TorchLatentPlan(self, self.paging.step(spans))


class TorchLatentPlan:
    """One step; see `common.ops.attention.base.LatentPlan`."""

    def __init__(self, backend: TorchLatentAttention, step: PagedStep) -> None:
        self.backend = backend
        self.step = step

    def attend_latent(
        self,
        layer: int,
        q_THN: torch.Tensor,
        q_THR: torch.Tensor,
        latent_TL: torch.Tensor,
        expand_HXC: torch.Tensor,
    ) -> torch.Tensor:
        """Store, then attend; returns `[T, H * V]`."""
        self.backend.paging.store(layer, self.step.slots_TK, latent_TL[:, None])
        parts = []
        for group in self.step.groups:
            rows = slice(group.first, group.last)
            parts.append(self.decode(layer, group, q_THN[rows], q_THR[rows], expand_HXC))
        for prefill in self.step.prefills:
            rows = slice(prefill.first, prefill.first + prefill.span.length)
            parts.append(self.prefill(layer, prefill, q_THN[rows], q_THR[rows], latent_TL[rows], expand_HXC))
        if len(parts) == 1:
            return parts[0]
        nothing = q_THN.new_empty((0, expand_HXC.shape[0] * (expand_HXC.shape[1] - q_THN.shape[2])))
        return torch.cat(parts) if parts else nothing

    def decode(
        self, layer: int, group: DecodeGroup, q_BHN: torch.Tensor, q_BHR: torch.Tensor, expand_HXC: torch.Tensor
    ) -> torch.Tensor:
        backend = self.backend
        (latent,) = backend.paging.gather(layer, group.rows)
        latent_BSL = latent.view(len(q_BHN), -1, backend.latent_dim)
        q_BHL = absorb(q_BHN, q_BHR, expand_HXC)
        scores_BHS = torch.baddbmm(group.mask_N1S, q_BHL, latent_BSL.transpose(1, 2), alpha=backend.scale)
        sums_BHC = torch.bmm(torch.softmax(scores_BHS, -1), latent_BSL[..., : expand_HXC.shape[-1]])
        return values_of(sums_BHC, expand_HXC, q_BHN.shape[-1])

    def prefill(
        self,
        layer: int,
        prefill: PrefillSpan,
        q_THN: torch.Tensor,
        q_THR: torch.Tensor,
        latent_TL: torch.Tensor,
        expand_HXC: torch.Tensor,
    ) -> torch.Tensor:
        span, latent_SL = prefill.span, latent_TL
        if prefill.rows is not None:
            (latent,) = self.backend.paging.gather(layer, prefill.rows)
            latent_SL = latent.view(-1, self.backend.latent_dim)[: span.end]
        _, both_dims, latent_dim = expand_HXC.shape
        if not absorbs(span.start, span.length, latent_dim, both_dims):
            return self.expanded(torch.cat((q_THN, q_THR), -1), latent_SL, expand_HXC, span.start)
        q_1HTL = absorb(q_THN, q_THR, expand_HXC).transpose(0, 1)[None]
        sums_THC = q_THN.new_empty((*q_THN.shape[:2], latent_dim))
        sums_1HTC = sums_THC.transpose(0, 1)[None]
        self.backend.causal(q_1HTL, latent_SL[None], latent_SL[None, :, :latent_dim], span.start, sums_1HTC)
        return values_of(sums_THC, expand_HXC, q_THN.shape[-1])

    def expanded(
        self, q_THD: torch.Tensor, latent_SL: torch.Tensor, expand_HXC: torch.Tensor, start: int
    ) -> torch.Tensor:
        """Attention with every head's keys and values, some heads at a time; returns `[T, H * V]`."""
        heads, both_dims, latent_dim = expand_HXC.shape
        c_SC, r_SR = latent_SL[:, :latent_dim], latent_SL[:, latent_dim:]
        key_dim = q_THD.shape[-1] - r_SR.shape[-1]
        out_THV = q_THD.new_empty((len(q_THD), heads, both_dims - key_dim))
        head_bytes = len(latent_SL) * (both_dims + q_THD.shape[-1]) * q_THD.itemsize
        step = max(1, MAX_EXPANDED_BYTES // head_bytes)
        for first in range(0, heads, step):
            some = slice(first, first + step)
            kv_ZSX = torch.matmul(c_SC, expand_HXC[some].transpose(1, 2))
            k_ZSD = torch.cat((kv_ZSX[..., :key_dim], r_SR.expand(len(kv_ZSX), -1, -1)), -1)
            q_Z1TD, out_Z1TV = (x_TH[:, some].transpose(0, 1)[:, None] for x_TH in (q_THD, out_THV))
            self.backend.causal(q_Z1TD, k_ZSD, kv_ZSX[..., key_dim:], start, out_Z1TV)
        return out_THV.flatten(1)


def absorbs(start: int, length: int, latent_dim: int, both_dims: int) -> bool:
    """Whether `length` tokens behind `start` others are attended to absorbed, because that multiplies less.

    Of each head, with P pairs of a query and a key: absorbed turns `length` queries and outputs, and a pair costs
    two products with a latent; expanded turns all `start + length` tokens, and a pair costs a key and a value.
    `both_dims` is X, the dimensions of a key and a value; the rotated part costs both the same. With a cache and
    DeepSeek-V3's dimensions the two are equal at about 170 tokens; without a cache expanded is always cheaper.
    """
    pairs = length * start + length * (length + 1) // 2
    return start * latent_dim * both_dims > pairs * (2 * latent_dim - both_dims)


def absorb(q_THN: torch.Tensor, q_THR: torch.Tensor, expand_HXC: torch.Tensor) -> torch.Tensor:
    """Queries for the latents themselves, `[T, H, L]`."""
    q_HTC = torch.bmm(q_THN.transpose(0, 1), expand_HXC[:, : q_THN.shape[-1]])
    return torch.cat((q_HTC.transpose(0, 1), q_THR), -1)


def values_of(sums_THC: torch.Tensor, expand_HXC: torch.Tensor, key_dim: int) -> torch.Tensor:
    """The heads' values of weighted sums of latents, `[T, H * V]`."""
    out_HTV = torch.bmm(sums_THC.transpose(0, 1), expand_HXC[:, key_dim:].transpose(1, 2))
    return out_HTV.transpose(0, 1).flatten(1)
