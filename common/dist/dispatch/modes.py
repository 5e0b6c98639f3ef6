"""The two modes of dispatch between ranks that have tokens of their own, on any buffer; and tokens that several have.

Shape suffixes: see `base`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from common.dist.dispatch.base import ExpertBuffer, ExpertDispatch, OwnedExperts
from common.dist.dispatch.replicated import owned_sums
from common.dist.group import Group


class NormalDispatch:
    """Any number of tokens, in the shape that they have: for prefill. See `base.ExpertDispatch`."""

    def __init__(self, buffer: ExpertBuffer) -> None:
        self.buffer = buffer

    def __call__(
        self, x_TE: torch.Tensor, expert_TK: torch.Tensor, weight_TK: torch.Tensor, experts: OwnedExperts
    ) -> torch.Tensor:
        received = self.buffer.dispatch(x_TE, expert_TK, weight_TK)
        sums_ME = owned_sums(received.x_ME, received.expert_MK, received.weight_MK, experts)
        return self.buffer.combine(sums_ME, received.handle)

    def begin_step(self, most_tokens: int) -> None:
        """The ranks tell each other in every layer."""


class LowLatencyDispatch:
    """A fixed shape, whoever has how many tokens: for decode. See `base.ExpertDispatch`.

    A rank that has more tokens than the buffer takes at once makes several rounds, and so do all.

    Attributes:
        rounds: Rounds of each layer of this step; see `begin_step`.
    """

    def __init__(self, buffer: ExpertBuffer) -> None:
        self.buffer = buffer
        self.rounds = 1

    def begin_step(self, most_tokens: int) -> None:
        """See `base.ExpertDispatch.begin_step`."""
        self.rounds = max(1, -(-most_tokens // self.buffer.max_tokens))

    def __call__(
        self, x_TE: torch.Tensor, expert_TK: torch.Tensor, weight_TK: torch.Tensor, experts: OwnedExperts
    ) -> torch.Tensor:
        """Raises `ValueError` if there are more tokens than `begin_step` said."""
        size = self.buffer.max_tokens
        if len(x_TE) > self.rounds * size:
            raise ValueError(f"{len(x_TE)} tokens in {self.rounds} rounds of {size}")
        rounds = [slice(first * size, (first + 1) * size) for first in range(self.rounds)]
        parts = [self.round(x_TE[rows], expert_TK[rows], weight_TK[rows], experts) for rows in rounds]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def round(
        self, x_TE: torch.Tensor, expert_TK: torch.Tensor, weight_TK: torch.Tensor, experts: OwnedExperts
    ) -> torch.Tensor:
        received = self.buffer.dispatch_fixed(x_TE, expert_TK)
        x_LSE, count_L = received.x_LSE, received.count_L
        filled_LS = torch.arange(x_LSE.shape[1], device=x_LSE.device) < count_L[:, None]
        y_LSE = torch.zeros_like(x_LSE)
        y_LSE[filled_LS] = experts(x_LSE[filled_LS], count_L.tolist())
        return self.buffer.combine_fixed(y_LSE, expert_TK, weight_TK, received.handle)


class SplitDispatch:
    """For ranks that have the same tokens, because they share their attention: each dispatches a part of them.

    See `base.ExpertDispatch`.
    """

    def __init__(self, dispatch: ExpertDispatch, group: Group) -> None:
        """`dispatch` is between all ranks, `group` this rank's with the same tokens."""
        self.dispatch = dispatch
        self.group = group

    def begin_step(self, most_tokens: int) -> None:
        """See `base.ExpertDispatch.begin_step`."""
        self.dispatch.begin_step(-(-most_tokens // self.group.size))

    def __call__(
        self, x_TE: torch.Tensor, expert_TK: torch.Tensor, weight_TK: torch.Tensor, experts: OwnedExperts
    ) -> torch.Tensor:
        tokens, hidden = x_TE.shape
        most = -(-tokens // self.group.size)
        part = slice(self.group.rank * most, (self.group.rank + 1) * most)
        y_TE = self.dispatch(x_TE[part], expert_TK[part], weight_TK[part], experts)
        rows_TE = F.pad(y_TE, (0, 0, 0, most - len(y_TE)))
        return self.group.all_gather(rows_TE.flatten()[None]).view(most * self.group.size, hidden)[:tokens]
