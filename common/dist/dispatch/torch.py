"""Dispatch over a group's all-to-all: gloo on CPU, NCCL on GPUs. See `base.ExpertBuffer`.

Shape suffixes: see `base`; R ranks, X experts of the whole layer, C = most tokens of a rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from common.dist.dispatch.base import Received, ReceivedFixed
from common.dist.group import Group

MAX_TOKENS, LIMIT_TOKENS = 128, 1024  # of a rank at once in low-latency mode: unless told otherwise, and at most


@dataclass
class Way:
    """How tokens went, for the way back.

    Attributes:
        tokens: Tokens of this rank.
        token_N: Which token each row that left was.
        sent: Rows that left for each rank.
        received: Rows that came from each rank.
    """

    tokens: int
    token_N: torch.Tensor
    sent: list[int]
    received: list[int]


@dataclass
class FixedWay:
    """The same in low-latency mode.

    Attributes:
        chosen_N: Which of each token's K experts are one.
        at_NP: Where in the buffer `[X, C]` those found it: expert and slot, rows token by token.
        filled_LRC: Which slots of the buffer that came hold a token.
    """

    chosen_N: torch.Tensor
    at_NP: torch.Tensor
    filled_LRC: torch.Tensor


class TorchBuffer:
    """Rows that travel are counted.

    Attributes:
        dispatched: Rows that left for other ranks so far, slots of a fixed shape that held no token not among them.
        combined: Rows that went back to other ranks so far.
    """

    def __init__(self, group: Group, num_experts: int, max_tokens: int = MAX_TOKENS) -> None:
        """`num_experts` of the whole layer, which the ranks own in equal parts."""
        if num_experts % group.size:
            raise ValueError(f"{group.size} ranks cannot own {num_experts} experts in equal parts")
        if not 1 <= max_tokens <= LIMIT_TOKENS:
            raise ValueError(f"{max_tokens} tokens of a rank at once is not between 1 and {LIMIT_TOKENS}")
        self.group = group
        self.num_experts = num_experts
        self.owned = num_experts // group.size
        self.max_tokens = max_tokens
        self.dispatched = 0
        self.combined = 0

    def dispatch(self, x_TE: torch.Tensor, expert_TK: torch.Tensor, weight_TK: torch.Tensor) -> Received:
        """See `base.ExpertBuffer.dispatch`."""
        group = self.group
        rank_TK = (expert_TK // self.owned).where(expert_TK >= 0, group.size)
        goes_TR = torch.zeros((len(x_TE), group.size + 1), dtype=torch.bool, device=x_TE.device)
        goes_TR = goes_TR.scatter_(1, rank_TK, True)[:, : group.size]
        sent_R = goes_TR.sum(0)
        one_each = [1] * group.size
        received = group.all_to_all(sent_R, one_each, one_each).tolist()
        way = Way(len(x_TE), goes_TR.T.nonzero()[:, 1], sent_R.tolist(), received)
        self.dispatched += self.travelling(way.sent)
        x_ME, expert_MK, weight_MK = (
            group.all_to_all(rows[way.token_N], way.sent, received) for rows in (x_TE, expert_TK, weight_TK)
        )
        return Received(x_ME, expert_MK, weight_MK, way)

    def combine(self, sums_ME: torch.Tensor, handle: Way) -> torch.Tensor:
        """See `base.ExpertBuffer.combine`."""
        self.combined += self.travelling(handle.received)
        sums_NE = self.group.all_to_all(sums_ME, handle.received, handle.sent)
        return sums_ME.new_zeros((handle.tokens, sums_ME.shape[1])).index_add_(0, handle.token_N, sums_NE)

    def dispatch_fixed(self, x_TE: torch.Tensor, expert_TK: torch.Tensor) -> ReceivedFixed:
        """See `base.ExpertBuffer.dispatch_fixed`."""
        if len(x_TE) > self.max_tokens:
            raise ValueError(f"{len(x_TE)} tokens, but the buffer takes {self.max_tokens} of a rank at once")
        group, most, top_k = self.group, self.max_tokens, expert_TK.shape[1]
        chosen_N = expert_TK.flatten() >= 0
        expert_N = expert_TK.flatten()[chosen_N]
        count_X = expert_N.bincount(minlength=self.num_experts)
        at_NP = torch.stack((expert_N, place_among_equals(expert_N, count_X)), 1)
        x_XCE = x_TE.new_zeros((self.num_experts, most, x_TE.shape[1]))
        x_XCE[at_NP[:, 0], at_NP[:, 1]] = x_TE.repeat_interleave(top_k, 0)[chosen_N]
        each = [self.owned] * group.size
        count_RL = group.all_to_all(count_X, each, each).view(group.size, self.owned)
        x_LRCE = group.all_to_all(x_XCE, each, each).view(group.size, self.owned, most, -1).transpose(0, 1)
        self.dispatched += self.travelling(count_X.view(group.size, self.owned).sum(1).tolist())

        count_L = count_RL.sum(0)
        filled_LRC = torch.arange(most, device=x_TE.device) < count_RL.T[:, :, None]
        x_LSE = x_TE.new_zeros((self.owned, group.size * most, x_TE.shape[1]))
        x_LSE[first_slots(count_L, x_LSE.shape[1])] = x_LRCE[filled_LRC]
        return ReceivedFixed(x_LSE, count_L, FixedWay(chosen_N, at_NP, filled_LRC))

    def combine_fixed(
        self, y_LSE: torch.Tensor, expert_TK: torch.Tensor, weight_TK: torch.Tensor, handle: FixedWay
    ) -> torch.Tensor:
        """See `base.ExpertBuffer.combine_fixed`."""
        group, filled_LRC = self.group, handle.filled_LRC
        y_LRCE = y_LSE.new_zeros((*filled_LRC.shape, y_LSE.shape[2]))
        y_LRCE[filled_LRC] = y_LSE[first_slots(filled_LRC.sum((1, 2)), y_LSE.shape[1])]
        self.combined += self.travelling(filled_LRC.sum((0, 2)).tolist())
        each = [self.owned] * group.size
        y_RLCE = y_LRCE.transpose(0, 1).reshape(self.num_experts, *y_LRCE.shape[2:])
        y_XCE = group.all_to_all(y_RLCE, each, each)
        y_NE = y_LSE.new_zeros((expert_TK.numel(), y_LSE.shape[2]))
        y_NE[handle.chosen_N] = y_XCE[handle.at_NP[:, 0], handle.at_NP[:, 1]]
        y_TKE = y_NE.view(*expert_TK.shape, y_LSE.shape[2])
        return torch.bmm(weight_TK.to(y_TKE.dtype)[:, None], y_TKE)[:, 0]

    def travelling(self, rows: list[int]) -> int:
        """Rows for other ranks, of so many for each."""
        return sum(rows) - rows[self.group.rank]


def place_among_equals(value_N: torch.Tensor, count_X: torch.Tensor) -> torch.Tensor:
    """How many equal values stand before each; `count_X` is how often each value occurs."""
    order_N = value_N.argsort(stable=True)
    first_X = count_X.cumsum(0) - count_X
    place_N = torch.empty_like(value_N)
    place_N[order_N] = torch.arange(len(value_N), device=value_N.device) - first_X[value_N[order_N]]
    return place_N


def first_slots(count_L: torch.Tensor, slots: int) -> torch.Tensor:
    """The first `count_L[l]` of each expert's slots, `[L, S]` bool."""
    return torch.arange(slots, device=count_L.device) < count_L[:, None]
