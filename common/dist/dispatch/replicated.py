"""Dispatch among ranks that all have all the tokens, so that no token travels: only the sums do.

Shape suffixes: see `base`.
"""

from __future__ import annotations

import torch

from common.dist.dispatch.base import OwnedExperts
from common.dist.group import Group


class ReplicatedDispatch:
    """Every rank computes what it has of the experts, whole ones or a part of each; the group adds it up.

    See `common.dist.dispatch.base.ExpertDispatch`. A rank that is alone has everything.
    """

    def __init__(self, group: Group) -> None:
        self.group = group

    def __call__(
        self, x_TE: torch.Tensor, expert_TK: torch.Tensor, weight_TK: torch.Tensor, experts: OwnedExperts
    ) -> torch.Tensor:
        return self.group.all_reduce(owned_sums(x_TE, expert_TK, weight_TK, experts))

    def begin_step(self, most_tokens: int) -> None:
        """All ranks have the same tokens: there is nothing to agree on."""


def owned_sums(
    x_TE: torch.Tensor, expert_TK: torch.Tensor, weight_TK: torch.Tensor, experts: OwnedExperts
) -> torch.Tensor:
    """Each token's weighted sum over those of its experts that this rank owns, `[T, E]`."""
    tokens, top_k = expert_TK.shape
    expert_N = expert_TK.flatten() - experts.first
    expert_N = expert_N.where((expert_N >= 0) & (expert_N < experts.count), experts.count)
    counts = expert_N.bincount(minlength=experts.count)[: experts.count].tolist()
    order_N = expert_N.argsort(stable=True)[: sum(counts)]
    y_NE = experts(x_TE[order_N // top_k], counts)
    # Back in the order of the tokens, so that the sum's order does not depend on what else is in the batch.
    out_NE = x_TE.new_zeros((tokens * top_k, x_TE.shape[1])).index_copy_(0, order_N, y_NE)
    return torch.bmm(weight_TK.to(x_TE.dtype)[:, None], out_NE.view(tokens, top_k, x_TE.shape[1]))[:, 0]
