"""The expert dispatch seam: tokens go to the ranks that own their experts, and come back as weighted sums.

What a layer calls is an `ExpertDispatch`. Where ranks have tokens of their own it stands on an `ExpertBuffer`, which
moves them: the contract is that of DeepEP's `Buffer`, and every backend passes tests/contract/test_dispatch.py.

Shape suffixes: T tokens of this rank, K experts that each token goes to, E hidden size, N rows: a token at one expert,
M tokens received, L experts of this rank, S slots of an expert: ranks * most tokens of a rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

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

    def begin_step(self, most_tokens: int) -> None:
        """Say how many tokens the rank with the most has in the step that follows."""
        ...


@dataclass
class Received:
    """Tokens that came because this rank owns some of their experts.

    Attributes:
        x_ME: The tokens; one that has several experts here came once.
        expert_MK: Its experts, numbers in the whole layer; -1 or another rank's where it is no concern of this one.
        weight_MK: Their weights.
        handle: For `combine`.
    """

    x_ME: torch.Tensor
    expert_MK: torch.Tensor
    weight_MK: torch.Tensor
    handle: Any = None


@dataclass
class ReceivedFixed:
    """The same in a shape that does not depend on the tokens, as captured graphs need it.

    Attributes:
        x_LSE: For each expert its tokens, in the first `count_L` slots; what is in the others means nothing.
        count_L: Tokens of each expert.
        handle: For `combine_fixed`.
    """

    x_LSE: torch.Tensor
    count_L: torch.Tensor
    handle: Any = None


class ExpertBuffer(Protocol):
    """Moves tokens between the ranks of a group, which own equally many experts each, in order.

    All ranks make the same calls; one may have no tokens. An expert of -1 is none: what has only such does not travel,
    and becomes zero.

    Attributes:
        max_tokens: Most tokens of a rank in `dispatch_fixed`.
    """

    max_tokens: int

    def dispatch(self, x_TE: torch.Tensor, expert_TK: torch.Tensor, weight_TK: torch.Tensor) -> Received:
        """Normal mode: each token once to every rank that owns one of its experts."""
        ...

    def combine(self, sums_ME: torch.Tensor, handle: Any) -> torch.Tensor:
        """Back to the tokens' ranks, `[T, E]`: the sum of what the ranks made of each."""
        ...

    def dispatch_fixed(self, x_TE: torch.Tensor, expert_TK: torch.Tensor) -> ReceivedFixed:
        """Low-latency mode: each token to each of its experts. Raises `ValueError` for more than `max_tokens`."""
        ...

    def combine_fixed(
        self, y_LSE: torch.Tensor, expert_TK: torch.Tensor, weight_TK: torch.Tensor, handle: Any
    ) -> torch.Tensor:
        """Back to the tokens' ranks, `[T, E]`, weighted there."""
        ...
