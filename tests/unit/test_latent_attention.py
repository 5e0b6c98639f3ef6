"""Paged latent attention against the textbook formula, both ways of computing it."""

from __future__ import annotations

import random

import pytest
import torch

from common.kvcache.layout import KvLayout
from common.kvcache.pool import KvPool
from common.ops.attention import torch_latent
from common.ops.attention.base import Span, make_attention

pytestmark = pytest.mark.unit

HEADS, KEY, ROPE, VALUE, LATENT, LAYERS, PAGE = 3, 10, 4, 6, 24, 2, 4
LAYOUT = KvLayout("float32", LAYERS, 1, LATENT + ROPE, PAGE, kind="mla")
SCALE = (KEY + ROPE) ** -0.5
SPANS = [(90, 1), (12, 1), (0, 1), (0, 70), (50, 7), (20, 131)]


def textbook(
    q_THN: torch.Tensor, q_THR: torch.Tensor, latent_SL: torch.Tensor, expand_HXC: torch.Tensor
) -> torch.Tensor:
    """Causal attention of the last T of S tokens with every head's own keys and values, `[T, H * V]`."""
    kv_SHX = torch.einsum("sc,hxc->shx", latent_SL[:, :LATENT], expand_HXC)
    scores_HTS = torch.einsum("thn,shn->hts", q_THN, kv_SHX[..., :KEY])
    scores_HTS = (scores_HTS + torch.einsum("thr,sr->hts", q_THR, latent_SL[:, LATENT:])) * SCALE
    hidden = torch.ones(len(q_THN), len(latent_SL), dtype=torch.bool).triu(len(latent_SL) - len(q_THN) + 1)
    weights_HTS = scores_HTS.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("hts,shv->thv", weights_HTS, kv_SHX[..., KEY:]).flatten(1)


@pytest.mark.parametrize("way", ["by rule", "absorbed", "expanded", "expanded, one head at a time"])
def test_equals_textbook(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Single tokens, first chunks and later chunks in one step, over scattered pages full of others' numbers."""
    if way != "by rule":
        monkeypatch.setattr(torch_latent, "absorbs", lambda *_: way == "absorbed")
    if way.endswith("time"):
        monkeypatch.setattr(torch_latent, "MAX_EXPANDED_BYTES", 1)
    torch.manual_seed(0)
    layer = 1
    pool = KvPool(LAYOUT, sum(LAYOUT.pages_for(start + length) for start, length in SPANS) + 5)
    pool.tensor.fill_(torch.nan)
    free = list(range(pool.num_pages))
    random.Random(0).shuffle(free)
    latents, planned = [], []
    for start, length in SPANS:
        pages = [free.pop() for _ in range(LAYOUT.pages_for(start + length))]
        latent_SL = torch.randn(start + length, LATENT + ROPE)
        if start % PAGE:  # as it was left by the step that began it
            pool.tensor[pages[start // PAGE]] = 0
        for position in range(start):
            pool.tensor[pages[position // PAGE], layer, 0, 0, position % PAGE] = latent_SL[position]
        latents.append(latent_SL)
        planned.append(Span(start, length, pages))
    tokens = sum(length for _, length in SPANS)
    q_THN, q_THR = torch.randn(tokens, HEADS, KEY), torch.randn(tokens, HEADS, ROPE)
    expand_HXC = torch.randn(HEADS, KEY + VALUE, LATENT) / 5
    new_TL = torch.cat([latent_SL[span.start :] for latent_SL, span in zip(latents, planned, strict=True)])

    plan = make_attention("torch", pool, HEADS, SCALE).plan(planned)
    out = plan.attend_latent(layer, q_THN, q_THR, new_TL, expand_HXC)

    row = 0
    for latent_SL, span in zip(latents, planned, strict=True):
        rows = slice(row, row + span.length)
        wanted = textbook(q_THN[rows], q_THR[rows], latent_SL, expand_HXC)
        torch.testing.assert_close(out[rows], wanted, atol=5e-6, rtol=1e-5)
        stored = pool.tensor[span.pages[(span.end - 1) // PAGE], layer, 0, 0, (span.end - 1) % PAGE]
        torch.testing.assert_close(stored, latent_SL[-1])
        row += span.length


def test_the_rule() -> None:
    """Single tokens are absorbed, prompts are not, and a chunk behind a cache only while it is short."""

    def deepseek_v3(start: int, length: int) -> bool:
        return torch_latent.absorbs(start, length, 512, 256)

    assert not deepseek_v3(0, 1)
    assert not deepseek_v3(0, 4096)
    assert deepseek_v3(4000, 1)
    assert deepseek_v3(100_000, 160)
    assert not deepseek_v3(100_000, 180)


def test_a_page_of_latents() -> None:
    """One latent a token and layer is all that is kept, and so all that a hand-over moves."""
    assert LAYOUT.page_bytes == LAYERS * PAGE * (LATENT + ROPE) * 4
    assert KvPool(LAYOUT, 3).tensor.shape == (3, LAYERS, 1, 1, PAGE, LATENT + ROPE)
