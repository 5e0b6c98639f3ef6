"""Paged attention from torch's own operations, for every device; tuned for CPU.

Batched matrix products beat `scaled_dot_product_attention` here: for a single token by a factor of two, for
prompts because a block of queries computes no score beyond its own last key. Gathers copy whole rows of a flat
view of the pool (a token's head, or a page); indexing that copies element by element is ten times slower.

Shape suffixes: T tokens of the step, B sequences, S keys, H query heads, K key/value heads, G query heads per
key/value head, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from common.kvcache.pool import KvPool
from common.ops.attention.base import Span

QUERY_BLOCK = 64  # prompt tokens whose scores are computed at once
MAX_SCORES = 2**24  # scores held at once, where a block can be made small enough
MAX_GATHER_BYTES = 2**26  # keys that a group of sequences gathers at once
PADDING_SHARE, PADDING_FREE = 0.25, 256  # key slots a group may waste: a share of its tokens, plus a few


@dataclass(slots=True)
class DecodeGroup:
    """Sequences of similar length that compute one token each: rows `first .. last - 1` of the step."""

    first: int
    last: int
    rows_BKS: torch.Tensor  # flat; rows of the pool's first layer, one per sequence, head and key
    mask_N1S: torch.Tensor  # N = B * K; -inf where a shorter sequence has no key
    keys: torch.Tensor  # what is gathered, layer after layer, into the same memory
    values: torch.Tensor


@dataclass(slots=True)
class PrefillSpan:
    """A sequence that computes several tokens: rows `first .. first + span.length - 1` of the step."""

    first: int
    span: Span
    page_rows: torch.Tensor | None  # the sequence's pages, where it has earlier tokens


class TorchAttention:
    """Attention over one pool; see `common.ops.attention.base.AttentionBackend`."""

    def __init__(self, pool: KvPool, num_heads: int, scale: float) -> None:
        layout = pool.layout
        self.layout = layout
        self.num_heads = num_heads
        self.scale = scale
        self.device = pool.tensor.device
        self.dtype = pool.tensor.dtype
        # One flat view per granularity and layer. A page's rows of layer l lie l * (rows of a layer) behind those
        # of layer 0, so that one index, computed once a step, serves all layers.
        token = layout.num_kv_heads * layout.head_dim
        self.tokens = layer_views(pool, token)
        self.heads = layer_views(pool, layout.head_dim)
        self.pages = layer_views(pool, layout.page_size * token)
        self.page_tokens = layout.num_layers * 2 * layout.page_size  # token rows from one page to the next
        self.heads_K1 = np.arange(layout.num_kv_heads)[:, None]
        self.causal = torch.full((QUERY_BLOCK, QUERY_BLOCK), -torch.inf, dtype=self.dtype, device=self.device).triu_(1)
        self.zero = torch.zeros((1, 1, 1), dtype=self.dtype, device=self.device)

    def plan(self, spans: Sequence[Span]) -> TorchAttentionPlan:
        """Indices and masks of a step."""
        decoding = sum(span.length == 1 for span in spans)
        groups = [self.decode_group(spans, first, last) for first, last in self.group(spans[:decoding])]
        prefills, row = [], decoding
        for span in spans[decoding:]:
            prefills.append(self.prefill_span(row, span))
            row += span.length
        return TorchAttentionPlan(self, self.to_device(self.slots(spans, decoding)), groups, prefills)

    def slots(self, spans: Sequence[Span], decoding: int) -> np.ndarray:
        """Token rows of the first layer where the step's tokens are stored."""
        size = self.layout.page_size
        parts = [np.array([span.pages[span.start // size] for span in spans[:decoding]], dtype=np.int64)]
        parts[0] *= self.page_tokens
        parts[0] += np.array([span.start % size for span in spans[:decoding]], dtype=np.int64)
        for span in spans[decoding:]:
            parts.append(self.token_rows(span, np.arange(span.start, span.end)))
        return np.concatenate(parts) if len(parts) > 1 else parts[0]

    def token_rows(self, span: Span, positions: np.ndarray) -> np.ndarray:
        """Token rows of the first layer of some of a sequence's positions."""
        pages = np.array(span.pages, dtype=np.int64)
        size = self.layout.page_size
        rows: np.ndarray = pages[positions // size] * self.page_tokens + positions % size
        return rows

    def group(self, spans: Sequence[Span]) -> list[tuple[int, int]]:
        """Cut sequences, longest first, into groups that waste little when padded to their longest."""
        most = MAX_GATHER_BYTES // (self.layout.num_kv_heads * self.layout.head_dim * self.dtype.itemsize)
        groups, first, tokens = [], 0, 0
        for index, span in enumerate(spans):
            padded = spans[first].end * (index + 1 - first)
            waste = padded - tokens - span.end
            if index > first and (waste > PADDING_FREE + PADDING_SHARE * tokens or padded > most):
                groups.append((first, index))
                first, tokens = index, 0
            tokens += span.end
        if spans:
            groups.append((first, len(spans)))
        return groups

    def decode_group(self, spans: Sequence[Span], first: int, last: int) -> DecodeGroup:
        heads, head_dim, size = self.layout.num_kv_heads, self.layout.head_dim, self.layout.page_size
        members = spans[first:last]
        longest = members[0].end
        ends_B1 = np.array([span.end for span in members])[:, None]
        pages_BP = np.zeros((len(members), self.layout.pages_for(longest)), dtype=np.int64)
        for index, span in enumerate(members):
            used = self.layout.pages_for(span.end)
            pages_BP[index, :used] = span.pages[:used]
        # Slots beyond a sequence's end repeat its last token: nothing but its own keys is ever read.
        positions_BS = np.minimum(np.arange(longest), ends_B1 - 1)
        tokens_BS = np.take_along_axis(pages_BP, positions_BS // size, 1) * self.page_tokens + positions_BS % size
        rows_BKS = tokens_BS[:, None, :] * heads + self.heads_K1
        mask_BS = np.where(np.arange(longest) < ends_B1, 0.0, -np.inf).astype(np.float32)
        mask_N1S = self.to_device(mask_BS).to(self.dtype).repeat_interleave(heads, 0)[:, None]
        gathered = torch.empty((2, rows_BKS.size, head_dim), dtype=self.dtype, device=self.device)
        return DecodeGroup(first, last, self.to_device(rows_BKS.reshape(-1)), mask_N1S, gathered[0], gathered[1])

    def prefill_span(self, row: int, span: Span) -> PrefillSpan:
        if span.start == 0:
            return PrefillSpan(row, span, None)
        pages = np.array(span.pages[: self.layout.pages_for(span.end)], dtype=np.int64)
        return PrefillSpan(row, span, self.to_device(pages * (self.layout.num_layers * 2)))

    def to_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)


class TorchAttentionPlan:
    """One step; see `common.ops.attention.base.AttentionPlan`."""

    def __init__(
        self,
        backend: TorchAttention,
        slots_T: torch.Tensor,
        groups: list[DecodeGroup],
        prefills: list[PrefillSpan],
    ) -> None:
        self.backend = backend
        self.slots_T = slots_T
        self.groups = groups
        self.prefills = prefills

    def attend(self, layer: int, q_THD: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor) -> torch.Tensor:
        """Store, then attend; returns `[T, H * D]`."""
        backend = self.backend
        keys, values = backend.tokens[layer]
        keys.index_put_((self.slots_T,), k_TKD.flatten(1))
        values.index_put_((self.slots_T,), v_TKD.flatten(1))
        parts = [self.decode(layer, group, q_THD[group.first : group.last]) for group in self.groups]
        for prefill in self.prefills:
            rows = slice(prefill.first, prefill.first + prefill.span.length)
            parts.append(self.prefill(layer, prefill, q_THD[rows], k_TKD[rows], v_TKD[rows]))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def decode(self, layer: int, group: DecodeGroup, q_BHD: torch.Tensor) -> torch.Tensor:
        backend = self.backend
        sequences, heads, head_dim = q_BHD.shape
        pairs = group.mask_N1S.shape[0]  # of a sequence and a key/value head
        keys, values = backend.heads[layer]
        k_NSD = torch.index_select(keys, 0, group.rows_BKS, out=group.keys).view(pairs, -1, head_dim)
        v_NSD = torch.index_select(values, 0, group.rows_BKS, out=group.values).view(pairs, -1, head_dim)
        q_NGD = q_BHD.reshape(pairs, -1, head_dim)
        scores_NGS = torch.baddbmm(group.mask_N1S, q_NGD, k_NSD.transpose(1, 2), alpha=backend.scale)
        return torch.bmm(torch.softmax(scores_NGS, -1), v_NSD).view(sequences, heads * head_dim)

    def prefill(
        self, layer: int, prefill: PrefillSpan, q_THD: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor
    ) -> torch.Tensor:
        backend, span = self.backend, prefill.span
        tokens, heads, head_dim = q_THD.shape
        kv_heads = backend.layout.num_kv_heads
        k_SKD, v_SKD = k_TKD, v_TKD
        if prefill.page_rows is not None:
            keys, values = backend.pages[layer]
            k_SKD = keys.index_select(0, prefill.page_rows).view(-1, kv_heads, head_dim)
            v_SKD = values.index_select(0, prefill.page_rows).view(-1, kv_heads, head_dim)
        q_KGTD = q_THD.view(tokens, kv_heads, -1, head_dim).permute(1, 2, 0, 3)
        k_KDS, v_KSD = k_SKD.permute(1, 2, 0), v_SKD.transpose(0, 1)
        out_THD = torch.empty((tokens, heads, head_dim), dtype=q_THD.dtype, device=q_THD.device)
        out_KGTD = out_THD.view(tokens, kv_heads, -1, head_dim).permute(1, 2, 0, 3)
        block = max(8, min(QUERY_BLOCK, MAX_SCORES // (heads * span.end)))
        for first in range(0, tokens, block):
            last = min(first + block, tokens)
            rows, end = last - first, span.start + last
            q_KND = q_KGTD[:, :, first:last].reshape(kv_heads, -1, head_dim)
            scores_KNS = torch.baddbmm(backend.zero, q_KND, k_KDS[..., :end], beta=0, alpha=backend.scale)
            scores_KNS.view(kv_heads, -1, rows, end)[..., end - rows :].add_(backend.causal[:rows, :rows])
            out_KND = torch.bmm(torch.softmax(scores_KNS, -1), v_KSD[:, :end])
            out_KGTD[:, :, first:last] = out_KND.view(kv_heads, -1, rows, head_dim)
        return out_THD.view(tokens, heads * head_dim)


def layer_views(pool: KvPool, row: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For every layer, the pool as rows of `row` elements that begin at the layer's first key, and first value."""
    layout = pool.layout
    rows = pool.tensor.view(-1, row)
    step = layout.page_size * layout.num_kv_heads * layout.head_dim // row
    return [(rows[2 * layer * step :], rows[(2 * layer + 1) * step :]) for layer in range(layout.num_layers)]
