"""Paged attention against the textbook formula, and how it groups sequences of different lengths."""

from __future__ import annotations

import random

import pytest
import torch

from common.kvcache.layout import KvLayout
from common.kvcache.pool import HUGE_PAGE_BYTES, KvPool, allocate_host
from common.ops.attention.base import Span, make_attention
from common.ops.attention.causal import QUERY_BLOCK
from common.ops.attention.paging import PADDING_FREE, Paging
from common.ops.linear import make_linear

pytestmark = pytest.mark.unit

HEADS, KV_HEADS, HEAD_DIM, LAYERS, PAGE = 6, 2, 16, 2, 4
LAYOUT = KvLayout("float32", LAYERS, KV_HEADS, HEAD_DIM, PAGE)
SCALE = HEAD_DIM**-0.5


def textbook(q_THD: torch.Tensor, k_SKD: torch.Tensor, v_SKD: torch.Tensor) -> torch.Tensor:
    """Causal attention of the last T of S tokens, `[T, H * D]`."""
    tokens, keys = len(q_THD), len(k_SKD)
    k_SHD, v_SHD = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k_SKD, v_SKD))
    scores_HTS = torch.einsum("thd,shd->hts", q_THD, k_SHD) * SCALE
    hidden = torch.ones(tokens, keys, dtype=torch.bool).triu(keys - tokens + 1)
    weights_HTS = scores_HTS.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("hts,shd->thd", weights_HTS, v_SHD).flatten(1)


@pytest.mark.parametrize("layer", range(LAYERS))
def test_equals_textbook(layer: int) -> None:
    """Single tokens, first chunks and later chunks in one step, over scattered pages full of others' numbers."""
    torch.manual_seed(layer)
    spans = [(600, 1), (91, 1), (37, 1), (12, 1), (0, 1), (0, 1), (0, 2), (0, 150), (50, 7), (101, 131)]
    pool = KvPool(LAYOUT, sum(LAYOUT.pages_for(start + length) for start, length in spans) + 5)
    pool.tensor.fill_(torch.nan)
    free = list(range(pool.num_pages))
    random.Random(0).shuffle(free)
    known, planned = [], []
    for start, length in spans:
        pages = [free.pop() for _ in range(LAYOUT.pages_for(start + length))]
        kv_2SKD = torch.randn(2, start + length, KV_HEADS, HEAD_DIM)
        if start % PAGE:  # as it was left by the step that began it
            pool.tensor[pages[start // PAGE]] = 0
        for position in range(start):
            pool.tensor[pages[position // PAGE], layer, :, :, position % PAGE] = kv_2SKD[:, position]
        known.append(kv_2SKD)
        planned.append(Span(start, length, [*pages, 0]))
    q_THD = torch.randn(sum(length for _, length in spans), HEADS, HEAD_DIM)
    new = torch.cat([kv_2SKD[:, span.start :] for kv_2SKD, span in zip(known, planned, strict=True)], 1)

    plan = make_attention("torch", pool, HEADS, SCALE).plan(planned)
    out = plan.attend(layer, q_THD, new[0], new[1])

    row = 0
    for (k_SKD, v_SKD), span in zip(known, planned, strict=True):
        rows = slice(row, row + span.length)
        torch.testing.assert_close(out[rows], textbook(q_THD[rows], k_SKD, v_SKD), atol=2e-6, rtol=1e-5)
        stored = pool.tensor[span.pages[(span.end - 1) // PAGE], layer, :, :, (span.end - 1) % PAGE]
        torch.testing.assert_close(stored, torch.stack((k_SKD[-1], v_SKD[-1])))
        row += span.length


def test_long_prompts_are_cut_into_blocks_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.ops.attention.causal.MAX_SCORES", 16 * HEADS * (3 * QUERY_BLOCK))
    torch.manual_seed(0)
    tokens = 3 * QUERY_BLOCK
    pool = KvPool(LAYOUT, LAYOUT.pages_for(tokens))
    q_THD, (k_TKD, v_TKD) = torch.randn(tokens, HEADS, HEAD_DIM), torch.randn(2, tokens, KV_HEADS, HEAD_DIM)
    plan = make_attention("torch", pool, HEADS, SCALE).plan([Span(0, tokens, list(range(pool.num_pages)))])
    torch.testing.assert_close(plan.attend(0, q_THD, k_TKD, v_TKD), textbook(q_THD, k_TKD, v_TKD))


def test_groups_waste_little(monkeypatch: pytest.MonkeyPatch) -> None:
    paging = Paging(KvPool(LAYOUT, 1))

    def groups(*ends: int) -> list[tuple[int, int]]:
        return paging.group([Span(end - 1, 1, []) for end in ends])

    assert groups() == []
    assert groups(*range(100, 60, -1)) == [(0, 40)]
    assert groups(9000, 100, 90) == [(0, 1), (1, 3)]
    assert groups(PADDING_FREE, 1, 1) == [(0, 2), (2, 3)]
    monkeypatch.setattr("common.ops.attention.paging.MAX_GATHER_BYTES", 250 * KV_HEADS * HEAD_DIM * 4)
    assert groups(100, 100, 100, 100, 100) == [(0, 2), (2, 4), (4, 5)]


def test_pool_memory() -> None:
    pool = KvPool(LAYOUT, 3)
    assert pool.nbytes == 3 * LAYOUT.page_bytes
    assert pool.address % HUGE_PAGE_BYTES == 0
    assert not pool.tensor.any()
    buffer = allocate_host(pool.nbytes)
    shared = KvPool(LAYOUT, 3, buffer=buffer)
    shared.tensor[1, 0, 0, 0, 0, 0] = 1.0
    assert bytes(buffer[LAYOUT.page_bytes : LAYOUT.page_bytes + 4]) == b"\x00\x00\x80\x3f"
    with pytest.raises(ValueError, match="cannot hold 4 pages"):
        KvPool(LAYOUT, 4, buffer=buffer)
    with pytest.raises(ValueError, match="host buffer"):
        KvPool(LAYOUT, 1, buffer=buffer, device="cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 7, 200])
def test_packed_products(dtype: torch.dtype, rows: int) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(rows, 48).to(dtype), torch.randn(80, 48).to(dtype), torch.randn(80).to(dtype)
    exact = x.double() @ weight.double().T
    rounding = torch.finfo(dtype).eps
    for product, wanted in ((make_linear(weight), exact), (make_linear(weight, bias), exact + bias.double())):
        torch.testing.assert_close(product(x).double(), wanted, atol=40 * rounding, rtol=2 * rounding)
