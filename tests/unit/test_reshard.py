"""Between any two layouts, what arrives is what a rank would have computed itself."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from common.kvcache.layout import KvLayout
from common.kvcache.reshard import Piece, Shard, cut, page_runs, reshard

pytestmark = pytest.mark.unit

LAYERS, HEADS, PAGE, DIM = 5, 4, 2, 3


def layout_of(kind: str, heads: int) -> KvLayout:
    return KvLayout("float32", LAYERS, heads, DIM, PAGE, kind=kind)


def page_of(shard: Shard, layout: KvLayout) -> NDArray[np.float32]:
    """A rank's page, full of numbers that say which layer, plane, head, slot and element they are."""
    shape = (LAYERS, layout.planes, layout.num_kv_heads, PAGE, DIM)
    whole = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    return np.ascontiguousarray(whole[slice(*shard.layers), :, slice(*shard.heads)])


def written(source: list[Shard], target: list[Shard], layout: KvLayout) -> list[NDArray[np.float32]]:
    """The target's pages after the hand-over; every byte must come once."""
    pages = [page_of(shard, layout).view(np.uint8).reshape(-1) for shard in source]
    out = [np.zeros(page_of(shard, layout).nbytes, dtype=np.uint8) for shard in target]
    times = [np.zeros(len(page), dtype=np.int64) for page in out]
    for piece in reshard(source, target):
        for run in page_runs(piece, source[piece.source], target[piece.target], layout):
            there = slice(run.target, run.target + run.length)
            out[piece.target][there] = pages[piece.source][run.source : run.source + run.length]
            times[piece.target][there] += 1
    assert all((count == 1).all() for count in times)
    return [page.view(np.float32) for page in out]


SIZES = st.tuples(st.sampled_from([1, 2, 3, 5]), st.sampled_from([1, 2, 4, 8]))  # stages, ranks


@settings(max_examples=150)
@given(SIZES, SIZES, st.sampled_from([("mha", 1), ("mha", 2), ("mha", HEADS), ("mla", 1)]))
def test_any_to_any(source: tuple[int, int], target: tuple[int, int], of: tuple[str, int]) -> None:
    kind, heads = of
    layout = layout_of(kind, heads)
    shards = [cut(LAYERS, heads, *sizes) for sizes in (source, target)]
    for page, shard in zip(written(*shards, layout), shards[1], strict=True):
        assert (page == page_of(shard, layout).reshape(-1)).all()


def test_equal_layouts_send_whole_pages() -> None:
    layout = layout_of("mha", HEADS)
    shards = cut(LAYERS, HEADS, 1, 2)
    pieces = reshard(shards, shards)
    assert pieces == [Piece(0, 0, (0, 5), (0, 2)), Piece(1, 1, (0, 5), (2, 4))]
    for piece in pieces:
        (run,) = page_runs(piece, shards[piece.source], shards[piece.target], layout)
        assert (run.source, run.target, run.length) == (0, 0, layout.page_bytes // 2)


def test_a_latent_travels_once_to_each_and_nobody_sends_for_all() -> None:
    pieces = reshard(cut(LAYERS, 1, 1, 4), cut(LAYERS, 1, 1, 2))
    assert pieces == [Piece(0, 0, (0, 5), (0, 1)), Piece(1, 1, (0, 5), (0, 1))]
    pieces = reshard(cut(LAYERS, 1, 1, 2), cut(LAYERS, 1, 1, 8))
    assert Counter(piece.source for piece in pieces) == {0: 4, 1: 4}


def test_stages_send_their_layers() -> None:
    pieces = reshard(cut(LAYERS, HEADS, 2, 1), cut(LAYERS, HEADS, 1, 2))
    assert pieces == [
        Piece(0, 0, (0, 3), (0, 2)),
        Piece(1, 0, (3, 5), (0, 2)),
        Piece(0, 1, (0, 3), (2, 4)),
        Piece(1, 1, (3, 5), (2, 4)),
    ]


def test_what_cannot_be_cut() -> None:
    with pytest.raises(ValueError, match="5 layers cannot be cut among 6"):
        cut(LAYERS, HEADS, 6, 1)
    with pytest.raises(ValueError, match="4 key/value heads cannot be cut among 3"):
        cut(LAYERS, HEADS, 1, 3)
    with pytest.raises(ValueError, match="lacks 10 layers' heads"):
        reshard(cut(LAYERS, HEADS, 1, 2)[:1], cut(LAYERS, HEADS, 1, 1))
