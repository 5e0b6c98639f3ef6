"""Which experts a token goes to.

Shape suffixes: T tokens, E hidden size, X experts of the layer, G groups of experts, K experts of a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Routing:
    """How experts are chosen.

    Attributes:
        top_k: Experts of each token.
        sigmoid: Scores are sigmoids of the logits, each for itself; else their softmax.
        groups: The experts are so many groups of consecutive ones; 1 where there is no such limit.
        top_groups: Groups that a token's experts may be in: those with the best scores.
        best_of_group: A group's score is the sum of so many of its best.
        normalise: A token's weights are made to sum to one.
        scale: Weights are multiplied by it in the end.
    """

    top_k: int
    sigmoid: bool = False
    groups: int = 1
    top_groups: int = 1
    best_of_group: int = 1
    normalise: bool = False
    scale: float = 1.0


class Router:
    """Scores every expert and chooses the best, in float32: nearby scores decide where a token goes."""

    def __init__(self, weight_XE: torch.Tensor, routing: Routing, bias_X: torch.Tensor | None = None) -> None:
        """`bias_X` corrects the scores for the choice; the weights are the scores without it."""
        self.weight_XE = weight_XE
        self.routing = routing
        self.bias_X = bias_X

    def __call__(self, x_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Numbers and weights of each token's experts, `[T, K]` both; the order within a token means nothing."""
        logits_TX = F.linear(x_TE.float(), self.weight_XE)
        return choose_experts(logits_TX, self.routing, self.bias_X)


def choose_experts(
    logits_TX: torch.Tensor, routing: Routing, bias_X: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `Router`. Group-limited choice: DeepSeek-V2, https://arxiv.org/abs/2405.04434; the corrected sigmoid
    scores: DeepSeek-V3, https://arxiv.org/abs/2412.19437."""
    scores_TX = logits_TX.sigmoid() if routing.sigmoid else logits_TX.softmax(-1)
    choice_TX = scores_TX if bias_X is None else scores_TX + bias_X
    if routing.top_groups < routing.groups:
        choice_TX = best_groups_only(choice_TX, routing)
    expert_TK = choice_TX.topk(routing.top_k, -1, sorted=False).indices
    weight_TK = scores_TX.gather(1, expert_TK)
    if routing.normalise:
        weight_TK = weight_TK / (weight_TK.sum(-1, keepdim=True) + 1e-20)
    return expert_TK, weight_TK * routing.scale


def best_groups_only(choice_TX: torch.Tensor, routing: Routing) -> torch.Tensor:
    """-inf for the experts of all but each token's best groups."""
    choice_TGX = choice_TX.view(len(choice_TX), routing.groups, choice_TX.shape[1] // routing.groups)
    group_TG = choice_TGX.topk(routing.best_of_group, -1).values.sum(-1)
    best_TG = group_TG.topk(routing.top_groups, -1, sorted=False).indices
    closed_TG = torch.ones_like(group_TG, dtype=torch.bool).scatter_(1, best_TG, False)
    return choice_TGX.masked_fill(closed_TG[..., None], -torch.inf).view(choice_TX.shape)
