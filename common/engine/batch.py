"""The tensors of one step, made from its chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch

from common.ops.attention.base import Span


@dataclass(slots=True)
class Chunk:
    """What one sequence computes in a step.

    Attributes:
        start: Position in the sequence of `token_ids[0]`; the KV of all earlier positions is in `pages`.
        token_ids: Tokens to compute, at least one.
        pages: The sequence's pages in token order; they cover at least `start + len(token_ids)` tokens.
        sample: Whether the logits after the last token are wanted.
    """

    start: int
    token_ids: list[int]
    pages: list[int]
    sample: bool


@dataclass(slots=True)
class Batch:
    """What the model computes: rows in the order that attention wants, and where the callers' logits are.

    Shape suffixes: T tokens of all chunks, S chunks whose logits are wanted.
    """

    token_ids_T: torch.Tensor
    positions_T: torch.Tensor
    spans: list[Span]
    wanted_S: torch.Tensor | None  # rows, in the order of the chunks; None when that is all rows as they are


def make_batch(chunks: Sequence[Chunk], device: torch.device) -> Batch:
    """Lay chunks out: those of one token first, the longest sequence first, then the others.

    There may be none, for a rank that only keeps others company.
    """
    order = sorted(range(len(chunks)), key=lambda index: layout_key(chunks[index]))
    laid = [chunks[index] for index in order]
    spans = [Span(chunk.start, len(chunk.token_ids), chunk.pages) for chunk in laid]
    token_ids = np.fromiter(chain.from_iterable(chunk.token_ids for chunk in laid), dtype=np.int64)
    starts = np.array([span.start for span in spans], dtype=np.int64)
    lengths = np.array([span.length for span in spans], dtype=np.int64)
    ends = lengths.cumsum()
    positions = np.arange(len(token_ids)) + (starts - ends + lengths).repeat(lengths)
    last_row = np.empty(len(chunks), dtype=np.int64)
    last_row[order] = ends - 1
    wanted = last_row[[chunk.sample for chunk in chunks]]
    whole = len(wanted) == len(token_ids) and bool((wanted == np.arange(len(wanted))).all())

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    return Batch(tensor(token_ids), tensor(positions), spans, None if whole else tensor(wanted))


def layout_key(chunk: Chunk) -> tuple[bool, int]:
    return (False, -chunk.start) if len(chunk.token_ids) == 1 else (True, 0)
