"""Pages to runs, runs to batches: the fewest, longest pieces, which is what every engine is fastest with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from common.transfer.base import Pieces, Run, TransferError

LENGTH = 2
FEW = 32  # pages, for which NumPy's calls cost ten times what they save


def coalesce(src_pages: Sequence[int], dst_pages: Sequence[int], page_bytes: int) -> Pieces:
    """Pair `src_pages[i]` with `dst_pages[i]` and merge neighbours that are consecutive on both sides.

    Both hold page numbers, `[n]`; the order of the pieces is kept. Raises `ValueError` if their lengths differ.
    """
    if len(src_pages) != len(dst_pages):
        raise ValueError(f"{len(src_pages)} source pages do not pair with {len(dst_pages)} destination pages")
    if len(src_pages) <= FEW:
        return np.array(_runs(src_pages, dst_pages), dtype=np.int64).reshape(-1, 3) * page_bytes
    source = np.asarray(src_pages, dtype=np.int64)
    target = np.asarray(dst_pages, dtype=np.int64)
    begins = np.ones(source.size, dtype=np.bool_)
    begins[1:] = (np.diff(source) != 1) | (np.diff(target) != 1)
    starts = np.flatnonzero(begins)
    counts = np.diff(starts, append=source.size)
    return np.stack((source[starts], target[starts], counts), axis=1) * page_bytes


def _runs(src_pages: Sequence[int], dst_pages: Sequence[int]) -> list[list[int]]:
    """Source, destination and length of each run, in pages."""
    runs: list[list[int]] = []
    for source, target in zip(src_pages, dst_pages, strict=True):
        if runs and source - runs[-1][0] == target - runs[-1][1] == runs[-1][LENGTH]:
            runs[-1][LENGTH] += 1
        else:
            runs.append([source, target, 1])
    return runs


def checked(runs: Sequence[Run] | Pieces, local_bytes: int, remote_bytes: int) -> Pieces:
    """Runs as pieces. Raises `TransferError` for one that is not inside both pools."""
    try:
        pieces = np.asarray(runs, dtype=np.int64).reshape(-1, 3)
    except OverflowError:
        raise TransferError("a run is outside the pools: it does not fit 64 bits") from None
    limits = np.array((local_bytes, remote_bytes)) - pieces[:, LENGTH:]
    bad = (pieces[:, LENGTH] <= 0) | ((pieces[:, :LENGTH] < 0) | (pieces[:, :LENGTH] > limits)).any(axis=1)
    if bad.any():
        local, remote, nbytes = pieces[bad][0].tolist()
        raise TransferError(
            f"a run of {nbytes} bytes from {local} to {remote} is outside the pools of {local_bytes} "
            f"and {remote_bytes} bytes"
        )
    return pieces


def batches(pieces: Pieces, max_pieces: int, max_bytes: int) -> Iterator[Pieces]:
    """Cut into batches of at most `max_pieces` pieces and `max_bytes` bytes, so that an engine ends one soon."""
    pieces = _split(pieces, max_bytes)
    ends = np.cumsum(pieces[:, LENGTH])
    start = begun = 0
    while start < len(pieces):
        fit = int(np.searchsorted(ends, begun + max_bytes, side="right"))
        stop = min(fit, start + max_pieces)
        yield pieces[start:stop]
        start, begun = stop, int(ends[stop - 1])


def _split(pieces: Pieces, max_bytes: int) -> Pieces:
    """Cut every piece that is longer than `max_bytes`."""
    parts = -(-pieces[:, LENGTH] // max_bytes)
    if (parts == 1).all():
        return pieces
    ends = np.cumsum(parts)
    skipped = (np.arange(ends[-1]) - np.repeat(ends - parts, parts)) * max_bytes
    cut = np.repeat(pieces, parts, axis=0)
    cut[:, :LENGTH] += skipped[:, None]
    cut[:, LENGTH] = np.minimum(cut[:, LENGTH] - skipped, max_bytes)
    return cut
