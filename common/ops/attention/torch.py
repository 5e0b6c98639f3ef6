"""Paged attention from torch's own operations, for every device; tuned for CPU.

Batched matrix products beat `scaled_dot_product_attention` here: for a single token by a factor of two, for
prompts because a block of queries computes no score beyond its own last key. What they read is gathered in rows
of one head of one page, which are contiguous both in the pool and in the product's operand.

Shape suffixes: T tokens of the step, B sequences, P pages of a sequence, S keys (P * page size), H query heads,
K key/value heads, G query heads per key/value head, N pairs of a sequence and a key/value head, D head dimension.
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
    rows: torch.Tensor  # page rows of the first layer, `[B * K * P]`
    mask_N1S: torch.Tensor  # -inf where a sequence has no key


@dataclass(slots=True)
class PrefillSpan:
    """A sequence that computes several tokens: rows `first .. first + span.length - 1` of the step."""

    first: int
    span: Span
    rows: torch.Tensor | None  # page rows of the first layer, `[K * P]`, where the sequence has earlier tokens


class TorchAttention:
    """Attention over one pool; see `common.ops.attention.base.AttentionBackend`."""

    def __init__(self, pool: KvPool, num_heads: int, scale: float) -> None:
        layout = pool.layout
        self.pool = pool
        self.layout = layout
        self.num_heads = num_heads
        self.scale = scale
        self.device = pool.tensor.device
        self.dtype = pool.tensor.dtype
        # The pool as rows of one token's head, and of one page's head. A page's rows of layer l lie a constant
        # behind those of layer 0, so that one index, computed once a step, serves all layers.
        self.token_rows = layer_views(pool, layout.head_dim)
        self.page_rows = layer_views(pool, layout.page_size * layout.head_dim)
        self.rows_per_page = layout.num_layers * 2 * layout.num_kv_heads
        self.heads_K = np.arange(layout.num_kv_heads)
        self.causal = torch.full((QUERY_BLOCK, QUERY_BLOCK), -torch.inf, dtype=self.dtype, device=self.device).triu_(1)
        self.zero = torch.zeros((1, 1, 1), dtype=self.dtype, device=self.device)
        self.gathered = torch.empty((2, 0, layout.page_size * layout.head_dim), dtype=self.dtype, device=self.device)

    def plan(self, spans: Sequence[Span]) -> TorchAttentionPlan:
        """Indices and masks of a step. Clears the pages that the step begins and does not fill."""
        for span in spans:
            if self.begins_page(span):
                self.pool.tensor[span.pages[span.end // self.layout.page_size]].zero_()
        decoding = sum(span.length == 1 for span in spans)
        groups = [self.decode_group(spans, first, last) for first, last in self.group(spans[:decoding])]
        prefills, row = [], decoding
        for span in spans[decoding:]:
            prefills.append(self.prefill_span(row, span))
            row += span.length
        return TorchAttentionPlan(self, self.slots(spans, decoding), groups, prefills)

    def begins_page(self, span: Span) -> bool:
        """Whether the sequence's last page gets its first token now, and is not filled."""
        into_page = span.end % self.layout.page_size
        return 0 < into_page <= span.length

    def slots(self, spans: Sequence[Span], decoding: int) -> torch.Tensor:
        """Token rows of the first layer where the step's tokens are stored, `[T, K]`."""
        size = self.layout.page_size
        pages = [np.array([span.pages[span.start // size] for span in spans[:decoding]], dtype=np.int64)]
        offsets = [np.array([span.start % size for span in spans[:decoding]], dtype=np.int64)]
        for span in spans[decoding:]:
            positions = np.arange(span.start, span.end)
            pages.append(np.array(span.pages, dtype=np.int64)[positions // size])
            offsets.append(positions % size)
        first_T = np.concatenate(pages) * (self.rows_per_page * size) + np.concatenate(offsets)
        return self.to_device(first_T[:, None] + self.heads_K * size)

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
        layout, members = self.layout, spans[first:last]
        longest = layout.pages_for(members[0].end)
        pages_BP = np.empty((len(members), longest), dtype=np.int64)
        for index, span in enumerate(members):
            used = layout.pages_for(span.end)
            pages_BP[index, :used] = span.pages[:used]
            pages_BP[index, used:] = span.pages[used - 1]  # nothing but a sequence's own pages is ever read
        rows_BKP = pages_BP[:, None, :] * self.rows_per_page + self.heads_K[:, None]
        ends_B1 = np.array([span.end for span in members])[:, None]
        hidden_BS = self.to_device(np.arange(longest * layout.page_size) >= ends_B1)
        mask_BS = torch.zeros(hidden_BS.shape, dtype=self.dtype, device=self.device).masked_fill_(hidden_BS, -torch.inf)
        mask_N1S = mask_BS.repeat_interleave(layout.num_kv_heads, 0)[:, None]
        return DecodeGroup(first, last, self.to_device(rows_BKP.reshape(-1)), mask_N1S)

    def prefill_span(self, row: int, span: Span) -> PrefillSpan:
        if span.start == 0:
            return PrefillSpan(row, span, None)
        pages_P = np.array(span.pages[: self.layout.pages_for(span.end)], dtype=np.int64)
        rows_KP = pages_P * self.rows_per_page + self.heads_K[:, None]
        return PrefillSpan(row, span, self.to_device(rows_KP.reshape(-1)))

    def gather(self, layer: int, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of page rows, `[rows, page size * D]` each, in memory that the next call uses again."""
        if len(rows) > self.gathered.shape[1]:
            self.gathered = self.gathered.new_empty((2, len(rows), self.gathered.shape[2]))
        keys, values = self.page_rows[layer]
        into_keys, into_values = self.gathered[:, : len(rows)]
        torch.index_select(keys, 0, rows, out=into_keys)
        torch.index_select(values, 0, rows, out=into_values)
        return into_keys, into_values

    def to_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)


class TorchAttentionPlan:
    """One step; see `common.ops.attention.base.AttentionPlan`."""

    def __init__(
        self,
        backend: TorchAttention,
        slots_TK: torch.Tensor,
        groups: list[DecodeGroup],
        prefills: list[PrefillSpan],
    ) -> None:
        self.backend = backend
        self.slots_TK = slots_TK
        self.groups = groups
        self.prefills = prefills

    def attend(self, layer: int, q_THD: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor) -> torch.Tensor:
        """Store, then attend; returns `[T, H * D]`."""
        backend = self.backend
        keys, values = backend.token_rows[layer]
        keys.index_put_((self.slots_TK,), k_TKD)
        values.index_put_((self.slots_TK,), v_TKD)
        parts = [self.decode(layer, group, q_THD[group.first : group.last]) for group in self.groups]
        for prefill in self.prefills:
            rows = slice(prefill.first, prefill.first + prefill.span.length)
            parts.append(self.prefill(layer, prefill, q_THD[rows], k_TKD[rows], v_TKD[rows]))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def decode(self, layer: int, group: DecodeGroup, q_BHD: torch.Tensor) -> torch.Tensor:
        backend = self.backend
        sequences, heads, head_dim = q_BHD.shape
        pairs = sequences * backend.layout.num_kv_heads
        k_NSD, v_NSD = (x.view(pairs, -1, head_dim) for x in backend.gather(layer, group.rows))
        q_NGD = q_BHD.reshape(pairs, -1, head_dim)
        scores_NGS = torch.baddbmm(group.mask_N1S, q_NGD, k_NSD.transpose(1, 2), alpha=backend.scale)
        return torch.bmm(torch.softmax(scores_NGS, -1), v_NSD).view(sequences, heads * head_dim)

    def prefill(
        self, layer: int, prefill: PrefillSpan, q_THD: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor
    ) -> torch.Tensor:
        backend, span = self.backend, prefill.span
        tokens, heads, head_dim = q_THD.shape
        kv_heads = backend.layout.num_kv_heads
        k_KSD, v_KSD = k_TKD.transpose(0, 1), v_TKD.transpose(0, 1)
        if prefill.rows is not None:
            k_KSD, v_KSD = (x.view(kv_heads, -1, head_dim) for x in backend.gather(layer, prefill.rows))
        q_KGTD = q_THD.view(tokens, kv_heads, -1, head_dim).permute(1, 2, 0, 3)
        out_THD = torch.empty((tokens, heads, head_dim), dtype=q_THD.dtype, device=q_THD.device)
        out_KGTD = out_THD.view(tokens, kv_heads, -1, head_dim).permute(1, 2, 0, 3)
        block = max(8, min(QUERY_BLOCK, MAX_SCORES // (heads * span.end)))
        for first in range(0, tokens, block):
            last = min(first + block, tokens)
            rows, end = last - first, span.start + last
            q_KXD = q_KGTD[:, :, first:last].reshape(kv_heads, -1, head_dim)  # X = G * rows
            scores_KXS = torch.baddbmm(backend.zero, q_KXD, k_KSD[:, :end].transpose(1, 2), beta=0, alpha=backend.scale)
            scores_KXS.view(kv_heads, -1, rows, end)[..., end - rows :].add_(backend.causal[:rows, :rows])
            out_KXD = torch.bmm(torch.softmax(scores_KXS, -1), v_KSD[:, :end])
            out_KGTD[:, :, first:last] = out_KXD.view(kv_heads, -1, rows, head_dim)
        return out_THD.view(tokens, heads * head_dim)


def layer_views(pool: KvPool, row: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For every layer, the pool as rows of `row` elements that begin at the layer's first key, and first value."""
    layout = pool.layout
    rows = pool.tensor.view(-1, row)
    step = layout.page_size * layout.num_kv_heads * layout.head_dim // row
    return [(rows[2 * layer * step :], rows[(2 * layer + 1) * step :]) for layer in range(layout.num_layers)]
