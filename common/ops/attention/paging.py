"""Where a step's tokens are in the pool: indices and masks, computed once a step and used for every layer.

Shape suffixes: T tokens of the step, B sequences, P pages of a sequence, S keys (P * page size), K key/value heads,
N pairs of a sequence and a key/value head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from common.kvcache.pool import KvPool
from common.ops.attention.base import Span

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


@dataclass(slots=True)
class PagedStep:
    """A step's tokens: where they are stored, and what the sequences read."""

    slots_TK: torch.Tensor  # token rows of the first layer and plane
    groups: list[DecodeGroup]
    prefills: list[PrefillSpan]


class Paging:
    """The pool as rows of one token's head, and of one page's head.

    A page's rows of a layer and plane lie a constant behind those of the first, so one index serves them all:
    `token_views[layer]` and `page_views[layer]` hold, for every plane, the rows that begin there.
    """

    def __init__(self, pool: KvPool) -> None:
        layout = pool.layout
        self.pool = pool
        self.layout = layout
        self.device = pool.tensor.device
        self.dtype = pool.tensor.dtype
        self.token_views = layer_views(pool, layout.head_dim)
        self.page_views = layer_views(pool, layout.page_size * layout.head_dim)
        self.rows_per_page = layout.num_layers * layout.planes * layout.num_kv_heads
        self.heads_K = np.arange(layout.num_kv_heads)
        self.gathered = self.page_views[0][0].new_empty((layout.planes, 0, layout.page_size * layout.head_dim))

    def step(self, spans: Sequence[Span]) -> PagedStep:
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
        return PagedStep(self.slots(spans, decoding), groups, prefills)

    def store(self, layer: int, slots_TK: torch.Tensor, *planes_TKD: torch.Tensor) -> None:
        """Write the step's tokens, one tensor a plane."""
        for rows, x_TKD in zip(self.token_views[layer], planes_TKD, strict=True):
            rows.index_put_((slots_TK,), x_TKD)

    def gather(self, layer: int, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Page rows of every plane, `[rows, page size * D]` each, in memory that the next call uses again."""
        if len(rows) > self.gathered.shape[1]:
            self.gathered = self.gathered.new_empty((self.layout.planes, len(rows), self.gathered.shape[2]))
        into = self.gathered[:, : len(rows)].unbind()
        for plane, out in zip(self.page_views[layer], into, strict=True):
            torch.index_select(plane, 0, rows, out=out)
        return into

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

    def to_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)


def layer_views(pool: KvPool, row: int) -> list[tuple[torch.Tensor, ...]]:
    """For every layer and plane, the pool as rows of `row` elements that begin at the layer's first of that plane."""
    layout = pool.layout
    rows = pool.tensor.view(-1, row)
    step = layout.page_size * layout.num_kv_heads * layout.head_dim // row
    planes = range(layout.planes)
    return [
        tuple(rows[(layer * layout.planes + plane) * step :] for plane in planes) for layer in range(layout.num_layers)
    ]
