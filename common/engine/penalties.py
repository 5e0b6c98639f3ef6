"""How often a sequence's tokens occurred, and what that takes off their logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray


class TokenCounts:
    """The distinct tokens of a prompt and its output, with how often each was generated; grows with the output."""

    def __init__(self, prompt_ids: Sequence[int]) -> None:
        distinct = list(dict.fromkeys(prompt_ids))
        self._slots = {token: slot for slot, token in enumerate(distinct)}
        self._ids = np.array(distinct, dtype=np.int64)
        self._counts = np.zeros(len(distinct), dtype=np.float32)
        self._seen = 0

    def update(self, output_ids: Sequence[int]) -> None:
        """Count the tokens of the output that are new since the last call."""
        for token in output_ids[self._seen :]:
            slot = self._slots.setdefault(token, len(self._slots))
            if slot == len(self._ids):  # double the arrays, so that growing stays cheap
                self._ids = np.concatenate([self._ids, np.zeros(max(16, slot), dtype=np.int64)])
                self._counts = np.concatenate([self._counts, np.zeros(max(16, slot), dtype=np.float32)])
            self._ids[slot] = token
            self._counts[slot] += 1
        self._seen = len(output_ids)

    @property
    def ids(self) -> NDArray[np.int64]:
        """Distinct tokens, prompt's first."""
        return self._ids[: len(self._slots)]

    @property
    def generated(self) -> NDArray[np.float32]:
        """How often each of `ids` was generated; 0 for those only in the prompt."""
        return self._counts[: len(self._slots)]


class Penalties(NamedTuple):
    """One row's counts and strengths; see `Sampling`."""

    row: int
    counts: TokenCounts
    repetition: float
    frequency: float
    presence: float


def apply_penalties(logits_SV: torch.Tensor, penalties: Sequence[Penalties]) -> None:
    """Penalise, in place, the tokens that occurred: repetition first, then frequency and presence.

    Repetition (Keskar et al. 2019, CTRL) divides positive and multiplies negative logits of all tokens seen in
    prompt or output; frequency and presence (OpenAI's API) are taken off by the output alone. Only the tokens
    that occurred are touched: the cost does not grow with the vocabulary.
    """
    vocab_size = logits_SV.shape[1]
    lengths = [len(penalty.counts.ids) for penalty in penalties]

    def spread(values: list[float]) -> torch.Tensor:
        return torch.from_numpy(np.repeat(np.array(values, dtype=np.float32), lengths)).to(logits_SV.device)

    flat = np.concatenate([penalty.counts.ids + penalty.row * vocab_size for penalty in penalties])
    index_N = torch.from_numpy(flat).to(logits_SV.device)
    counts_N = torch.from_numpy(np.concatenate([p.counts.generated for p in penalties])).to(logits_SV.device)
    repetition_N = spread([penalty.repetition for penalty in penalties])
    logits_N = logits_SV.view(-1)[index_N]
    logits_N = torch.where(logits_N > 0, logits_N / repetition_N, logits_N * repetition_N)
    logits_N -= spread([penalty.frequency for penalty in penalties]) * counts_N
    logits_N -= spread([penalty.presence for penalty in penalties]) * (counts_N > 0)
    logits_SV.view(-1)[index_N] = logits_N
