"""A mixture of experts in place of the feed-forward block.

Shape suffixes: T tokens, E hidden size, K experts of a token, N rows: a token at one expert.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from common.dist.dispatch.base import ExpertDispatch
from common.layers.routing import Router
from common.ops.linear import Product


class Experts:
    """Consecutive experts of a layer, each a feed-forward block; see `common.dist.dispatch.base.OwnedExperts`."""

    def __init__(self, first: int, blocks: Sequence[Product]) -> None:
        self.first = first
        self.count = len(blocks)
        self.blocks = blocks

    def __call__(self, x_NE: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """Each row through its expert; the first `counts[0]` rows are of expert `first`, and so on."""
        out_NE = torch.empty_like(x_NE)
        start = 0
        for block, count in zip(self.blocks, counts, strict=True):
            if count:
                out_NE[start : start + count] = block(x_NE[start : start + count])
                start += count
        return out_NE


class MixtureOfExperts:
    """`sum of the chosen experts, weighted + the shared expert`, where there is one."""

    def __init__(
        self, router: Router, experts: Experts, dispatch: ExpertDispatch, shared: Product | None = None
    ) -> None:
        self.router = router
        self.experts = experts
        self.dispatch = dispatch
        self.shared = shared

    def __call__(self, x_TE: torch.Tensor) -> torch.Tensor:
        expert_TK, weight_TK = self.router(x_TE)
        out_TE = self.dispatch(x_TE, expert_TK, weight_TK, self.experts)
        return out_TE if self.shared is None else out_TE.add_(self.shared(x_TE))
