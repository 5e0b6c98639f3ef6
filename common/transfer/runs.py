"""Pages to runs, runs to batches: the fewest, longest pieces, which is what every engine is fastest with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from common.transfer.base import Run, TransferError

Pieces = NDArray[np.int64]
"""`[n, 3]`: local offset, remote offset, length, in bytes."""

LENGTH = 2


def coalesce(src_pages: Sequence[int], dst_pages: Sequence[int], page_bytes: int) -> list[Run]:
    """Pair `src_pages[i]` with `dst_pages[i]` and merge neighbours that are consecutive on both sides.

    Both hold page numbers, `[n]`; the order of the pieces is kept. Raises `ValueError` if their lengths differ.
    """
    source = np.asarray(src_pages, dtype=np.int64)
    target = np.asarray(dst_pages, dtype=np.int64)
    if source.shape != target.shape or source.ndim != 1:
        raise ValueError(f"{source.size} source pages do not pair with {target.size} destination pages")
    if source.size == 0:
        return []
    breaks = np.flatnonzero((np.diff(source) != 1) | (np.diff(target) != 1)) + 1
    starts = np.concatenate(([0], breaks))
    counts = np.diff(np.concatenate((starts, [source.size])))
    runs = zip(source[starts].tolist(), target[starts].tolist(), counts.tolist(), strict=True)
    return [Run(src * page_bytes, dst * page_bytes, count * page_bytes) for src, dst, count in runs]


def checked(runs: Sequence[Run], local_bytes: int, remote_bytes: int) -> Pieces:
    """Runs as pieces. Raises `TransferError` for one that is not inside both pools."""
    rows = [(run.local_offset, run.remote_offset, run.nbytes) for run in runs]
    for local, remote, nbytes in rows:
        if nbytes <= 0 or not 0 <= local <= local_bytes - nbytes or not 0 <= remote <= remote_bytes - nbytes:
            raise TransferError(
                f"a run of {nbytes} bytes from {local} to {remote} is outside the pools of {local_bytes} "
                f"and {remote_bytes} bytes"
            )
    return np.array(rows, dtype=np.int64).reshape(-1, 3)


def batches(pieces: Pieces, max_pieces: int, max_bytes: int) -> Iterator[Pieces]:
    """Cut into batches of at most `max_pieces` pieces and `max_bytes` bytes, so that an engine ends one soon."""
    pieces = _split(pieces, max_bytes)
    start = nbytes = 0
    for index, length in enumerate(pieces[:, LENGTH].tolist()):
        if index - start == max_pieces or nbytes + length > max_bytes:
            yield pieces[start:index]
            start, nbytes = index, 0
        nbytes += length
    if start < len(pieces):
        yield pieces[start:]


def _split(pieces: Pieces, max_bytes: int) -> Pieces:
    """Cut every piece that is longer than `max_bytes`."""
    parts = -(-pieces[:, LENGTH] // max_bytes)
    if np.all(parts == 1):
        return pieces
    ends = np.cumsum(parts)
    skipped = (np.arange(ends[-1]) - np.repeat(ends - parts, parts)) * max_bytes
    cut = np.repeat(pieces, parts, axis=0)
    cut[:, :LENGTH] += skipped[:, None]
    cut[:, LENGTH] = np.minimum(cut[:, LENGTH] - skipped, max_bytes)
    return cut
