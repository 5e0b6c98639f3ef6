"""Dispatch for a rank that has its tokens and all their experts: no token travels.

Shape suffixes: see `base`.
"""

from __future__ import annotations

import torch

from common.dist.dispatch.base import OwnedExperts


def dispatch_local(
    x_TE: torch.Tensor, expert_TK: torch.Tensor, weight_TK: torch.Tensor, experts: OwnedExperts
) -> torch.Tensor:
    """See `ExpertDispatch`. Experts that this rank does not own add nothing: with tokens that are the same on every
    rank, the sum over the ranks is the whole."""
    tokens, top_k = expert_TK.shape
    expert_N = expert_TK.flatten() - experts.first
    expert_N = expert_N.where((expert_N >= 0) & (expert_N < experts.count), experts.count)
    counts = expert_N.bincount(minlength=experts.count)[: experts.count].tolist()
    order_N = expert_N.argsort(stable=True)[: sum(counts)]
    y_NE = experts(x_TE[order_N // top_k], counts)
    # Back in the order of the tokens, so that the sum's order does not depend on what else is in the batch.
    out_NE = x_TE.new_zeros((tokens * top_k, x_TE.shape[1])).index_copy_(0, order_N, y_NE)
    return torch.bmm(weight_TK.to(x_TE.dtype)[:, None], out_NE.view(tokens, top_k, x_TE.shape[1]))[:, 0]
