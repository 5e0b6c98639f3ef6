"""Tokens of data-parallel ranks, brought together for layers that all ranks share out.

Shape suffixes: T tokens of this rank, G gathered rows, E hidden size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from common.dist.group import Group
from common.dist.padding import PaddingPlan

Product = Callable[[torch.Tensor], torch.Tensor]


class TokenGather:
    """Gathers by the step's plan.

    Attributes:
        plan: The plan of the step under way.
    """

    def __init__(self, peers: Group) -> None:
        """`peers` are one rank of each data-parallel rank: they have different tokens, and all of them together."""
        self.peers = peers
        self.plan: PaddingPlan | None = None

    def begin_step(self, plan: PaddingPlan) -> None:
        """Say how many tokens each rank has in the step that follows; `plan` was made with `gathers`."""
        self.plan = plan

    def gather(self, x_TE: torch.Tensor) -> torch.Tensor:
        """The rows of all ranks, in their order, `[G, E]`; padding is zero.

        Raises:
            ValueError: This rank has another number of tokens than the plan says.
        """
        plan, rank = self.plan, self.peers.rank
        if plan is None or plan.tokens[rank] != len(x_TE):
            raise ValueError(f"{len(x_TE)} tokens, but the plan is {plan}")
        rows_TE = F.pad(x_TE, (0, 0, 0, plan.rows[rank] - len(x_TE)))
        if plan.even:
            return self.peers.all_gather(rows_TE.flatten()[None]).view(plan.gathered, x_TE.shape[1])
        everywhere = rows_TE.repeat(self.peers.size, 1)
        return self.peers.all_to_all(everywhere, [len(rows_TE)] * self.peers.size, plan.rows)

    def own(self, y_GE: torch.Tensor) -> torch.Tensor:
        """The rows of this rank's tokens, `[T, E]`, in memory of their own."""
        assert self.plan is not None
        return y_GE[self.plan.part(self.peers.rank)].clone()

    def around(self, product: Product) -> Product:
        """`product`, which wants the tokens of all ranks, for this rank's."""
        return lambda x_TE: self.own(product(self.gather(x_TE)))
