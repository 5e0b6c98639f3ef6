"""The expert dispatch seam: tokens go to the ranks that own their experts, and come back as weighted sums.

Shape suffixes: T tokens of this rank, K experts that each token goes to, E hidden size, N rows: a token at one expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch


class OwnedExperts(Protocol):
    """The experts `first .. first + count - 1` of a layer, which this rank owns."""

    @property
    def first(self) -> int: ...

    @property
    def count(self) -> int: ...

    def __call__(self, x_NE: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """Each row through its expert, `[N, E]`; the first `counts[0]` rows are of expert `first`, and so on."""
        ...


class ExpertDispatch(Protocol):
    """How a layer's tokens meet its experts."""

    def __call__(
        self, x_TE: torch.Tensor, expert_TK: torch.Tensor, weight_TK: torch.Tensor, experts: OwnedExperts
    ) -> torch.Tensor:
        """The sum over K of each token's experts, weighted, `[T, E]`; `expert_TK` are numbers in the whole layer.

        Every rank of the group calls it for every layer, also one without tokens.
        """
        ...
