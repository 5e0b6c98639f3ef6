"""From the pages of one worker's ranks to those of another's, whatever the layouts: who sends which bytes to whom.

Nothing else knows how a cache is cut. A cache is cut by layers among pipeline stages, and by key/value heads among the
ranks that share attention; with fewer heads than ranks several ranks have the same head, and a latent is on all of
them. Data-parallel ranks have caches of their own: the functions here are about one on either side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from common.kvcache.layout import ELEMENT_BYTES, KvLayout


@dataclass(frozen=True)
class Shard:
    """What one rank's pages hold of a model's cache; ranges are half open and count in the whole model."""

    layers: tuple[int, int]
    heads: tuple[int, int]


@dataclass(frozen=True)
class Piece:
    """What one rank sends to another, of every page."""

    source: int
    target: int
    layers: tuple[int, int]
    heads: tuple[int, int]


@dataclass(frozen=True)
class PageRun:
    """Consecutive bytes of a page, at one place in the source's and another in the target's."""

    source: int
    target: int
    length: int


def cut(num_layers: int, num_kv_heads: int, stages: int, ranks: int) -> list[Shard]:
    """The shards of `stages` times `ranks` ranks, those of the first stage first.

    A latent counts as one head.

    Raises:
        ValueError: There is no even cut.
    """
    if num_kv_heads % ranks and ranks % num_kv_heads:
        raise ValueError(f"{num_kv_heads} key/value heads cannot be cut among {ranks} ranks")
    size = max(1, num_kv_heads // ranks)
    heads = [rank * num_kv_heads // ranks for rank in range(ranks)]
    return [Shard(layers, (first, first + size)) for layers in cut_layers(num_layers, stages) for first in heads]


def cut_layers(num_layers: int, stages: int) -> list[tuple[int, int]]:
    """The layers of each stage; with a remainder the first stages have one more.

    Raises:
        ValueError: There are fewer layers than stages.
    """
    if num_layers < stages:
        raise ValueError(f"{num_layers} layers cannot be cut among {stages} stages")
    each, more = divmod(num_layers, stages)
    firsts = [stage * each + min(stage, more) for stage in range(stages + 1)]
    return list(pairwise(firsts))


def reshard(source: Sequence[Shard], target: Sequence[Shard]) -> list[Piece]:
    """Everything that the target's ranks hold, each layer's head once to each rank that wants it.

    Of several ranks that have the same the senders are chosen in turn, so that none sends for all.

    Raises:
        ValueError: The source lacks something that the target holds.
    """
    pieces = []
    for number, wanted in enumerate(target):
        for layers in sorted({shard.layers for shard in source}):
            common = overlap(layers, wanted.layers)
            if common is None:
                continue
            owners: dict[tuple[int, int], list[int]] = {}
            for rank, shard in enumerate(source):
                if shard.layers == layers and overlap(shard.heads, wanted.heads):
                    owners.setdefault(shard.heads, []).append(rank)
            for heads, ranks in owners.items():
                part = overlap(heads, wanted.heads)
                assert part is not None
                pieces.append(Piece(ranks[number % len(ranks)], number, common, part))
    missing = sum(map(area, target)) - sum(area(Shard(piece.layers, piece.heads)) for piece in pieces)
    if missing:
        raise ValueError(f"the source lacks {missing} layers' heads that the target holds")
    return pieces


def page_runs(piece: Piece, source: Shard, target: Shard, layout: KvLayout) -> list[PageRun]:
    """Where a piece is in the pages of both ranks, in as few runs as may be.

    `layout` gives what both have in common: dtype, kind, page size and head dimension.
    """
    head_bytes = layout.page_size * layout.head_dim * ELEMENT_BYTES[layout.dtype]
    length = (piece.heads[1] - piece.heads[0]) * head_bytes
    runs = []
    for layer in range(*piece.layers):
        for plane in range(layout.planes):
            at = [rows_before(shard, layer, plane, piece.heads[0], layout) * head_bytes for shard in (source, target)]
            runs.append(PageRun(at[0], at[1], length))
    return joined(runs)


def rows_before(shard: Shard, layer: int, plane: int, head: int, layout: KvLayout) -> int:
    """Rows of one head's tokens that precede this one in a page of `shard`."""
    heads = shard.heads[1] - shard.heads[0]
    return ((layer - shard.layers[0]) * layout.planes + plane) * heads + head - shard.heads[0]


def joined(runs: Sequence[PageRun]) -> list[PageRun]:
    """Runs that follow one another on both sides, as one."""
    out: list[PageRun] = []
    for run in runs:
        last = out[-1] if out else None
        if last and (last.source + last.length, last.target + last.length) == (run.source, run.target):
            out[-1] = PageRun(last.source, last.target, last.length + run.length)
        else:
            out.append(run)
    return out


def overlap(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int] | None:
    """What two ranges have in common."""
    first, last = max(one[0], other[0]), min(one[1], other[1])
    return (first, last) if first < last else None


def area(shard: Shard) -> int:
    """Heads of all layers."""
    return (shard.layers[1] - shard.layers[0]) * (shard.heads[1] - shard.heads[0])
