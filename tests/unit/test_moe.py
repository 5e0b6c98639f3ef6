"""Choosing experts and running them, against plain loops. Whole models are compared in test_models.py."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from common.dist.dispatch.replicated import owned_sums
from common.errors.base import MeshError
from common.layers.mla import halves_from_pairs
from common.layers.moe import Experts
from common.layers.routing import Routing, choose_experts
from common.models.config import ModelConfig
from common.models.deepseek import moe_options
from common.models.moe import check_routing

pytestmark = pytest.mark.unit

TOKENS, EXPERTS, HIDDEN = 40, 12, 8


def chosen_by_loop(scores: list[float], choice: list[float], routing: Routing) -> dict[int, float]:
    """The experts and weights of one token, as one would say it."""
    size = len(scores) // routing.groups
    groups = [range(first, first + size) for first in range(0, len(scores), size)]

    def rating(group: range) -> float:
        return sum(sorted((choice[expert] for expert in group), reverse=True)[: routing.best_of_group])

    best = sorted(groups, key=rating, reverse=True)[: routing.top_groups]
    allowed = [expert for group in best for expert in group]
    top = sorted(allowed, key=lambda expert: choice[expert], reverse=True)[: routing.top_k]
    total = sum(scores[expert] for expert in top) if routing.normalise else 1.0
    return {expert: scores[expert] / total * routing.scale for expert in top}


@pytest.mark.parametrize(
    ("routing", "corrected"),
    [
        (Routing(top_k=1), False),
        (Routing(top_k=3, normalise=True), False),
        (Routing(top_k=3, groups=4, top_groups=2, scale=16.0), False),
        (Routing(top_k=4, sigmoid=True, groups=3, top_groups=1, best_of_group=2, normalise=True, scale=2.5), True),
        (Routing(top_k=12, sigmoid=True, groups=4, top_groups=4, best_of_group=2), True),
    ],
)
def test_choice(routing: Routing, corrected: bool) -> None:
    torch.manual_seed(0)
    logits_TX, bias_X = torch.randn(TOKENS, EXPERTS), torch.randn(EXPERTS)
    expert_TK, weight_TK = choose_experts(logits_TX, routing, bias_X if corrected else None)
    scores_TX = logits_TX.sigmoid() if routing.sigmoid else logits_TX.softmax(-1)
    choice_TX = scores_TX + bias_X if corrected else scores_TX
    for experts, weights, scores, choice in zip(expert_TK, weight_TK, scores_TX, choice_TX, strict=True):
        wanted = chosen_by_loop(scores.tolist(), choice.tolist(), routing)
        assert dict(zip(experts.tolist(), weights.tolist(), strict=True)) == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("tokens", [0, 1, TOKENS])
@pytest.mark.parametrize("cuts", [(0, 12), (0, 5, 12), (0, 4, 4, 8, 12)], ids=str)
def test_owners_of_experts_sum_to_the_whole(tokens: int, cuts: tuple[int, ...]) -> None:
    """However the experts are shared out, also with a rank that owns none."""
    torch.manual_seed(0)
    weight_XEE = torch.randn(EXPERTS, HIDDEN, HIDDEN)
    x_TE = torch.randn(tokens, HIDDEN)
    expert_TK = (
        torch.stack([torch.randperm(EXPERTS)[:3] for _ in range(tokens)]) if tokens else torch.empty(0, 3).long()
    )
    weight_TK = torch.rand(tokens, 3)
    wanted = torch.zeros(tokens, HIDDEN)
    for token in range(tokens):
        for expert, weight in zip(expert_TK[token], weight_TK[token], strict=True):
            wanted[token] += weight * (weight_XEE[expert] @ x_TE[token])

    total = torch.zeros(tokens, HIDDEN)
    for first, last in pairwise(cuts):
        owned = Experts(first, [lambda x, w=weight: x @ w.T for weight in weight_XEE[first:last]])
        total += owned_sums(x_TE, expert_TK, weight_TK, owned)
    torch.testing.assert_close(total, wanted, atol=1e-5, rtol=1e-5)


def test_a_token_does_not_depend_on_the_others() -> None:
    """Bit for bit: the order of a token's sum is its own."""
    torch.manual_seed(0)
    weight_XEE = torch.randn(EXPERTS, HIDDEN, HIDDEN)
    owned = Experts(0, [lambda x, w=weight: torch.stack([w @ row for row in x]) for weight in weight_XEE])
    x_TE, weight_TK = torch.randn(TOKENS, HIDDEN), torch.rand(TOKENS, 3)
    expert_TK = torch.rand(TOKENS, EXPERTS).argsort(1)[:, :3]
    together = owned_sums(x_TE, expert_TK, weight_TK, owned)
    for token in range(TOKENS):
        rows = slice(token, token + 1)
        assert owned_sums(x_TE[rows], expert_TK[rows], weight_TK[rows], owned).equal(together[rows])


@pytest.mark.parametrize(
    ("routing", "message"),
    [
        (Routing(top_k=1, groups=5, top_groups=5), "12 experts in 5 groups"),
        (Routing(top_k=1, groups=4, top_groups=5), "topk_group is 5 of 4"),
        (Routing(top_k=4, groups=4, top_groups=1), "num_experts_per_tok is 4 of 3"),
        (Routing(top_k=0), "num_experts_per_tok is 0"),
        (Routing(top_k=1, groups=12, top_groups=3, best_of_group=2), "groups of 1 experts"),
    ],
)
def test_impossible_routings_are_refused(routing: Routing, message: str) -> None:
    config = ModelConfig(**dict.fromkeys(SIZES, 8), n_routed_experts=EXPERTS)
    with pytest.raises(MeshError, match=message):
        check_routing(config, routing)


SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
V3 = {
    "model_type": "deepseek_v3",
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "moe_intermediate_size": 2048,
    "n_shared_experts": 1,
}
V3_ROUTING = Routing(8, sigmoid=True, groups=8, top_groups=4, best_of_group=2, normalise=True, scale=2.5)
V2 = {
    "model_type": "deepseek_v2",
    "n_routed_experts": 160,
    "num_experts_per_tok": 6,
    "n_group": 8,
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "routed_scaling_factor": 16.0,
    "moe_intermediate_size": 1536,
    "n_shared_experts": 2,
}


@pytest.mark.parametrize(
    ("config", "routing"),
    [
        (V3, V3_ROUTING),
        (V3 | {"topk_method": None, "scoring_func": None}, V3_ROUTING),  # as transformers writes it
        (V3 | {"model_type": "other", "architectures": ["DeepseekV3ForCausalLM"], "topk_method": None}, V3_ROUTING),
        (V2, Routing(6, groups=8, top_groups=3, scale=16.0)),
        (V2 | {"topk_method": "greedy", "n_group": 1, "topk_group": 1}, Routing(6, scale=16.0)),
        (V2 | {"norm_topk_prob": True}, Routing(6, groups=8, top_groups=3, normalise=True)),
    ],
)
def test_routing_of_deepseek(config: dict[str, Any], routing: Routing) -> None:
    """As the published checkpoints have it."""
    options = moe_options(ModelConfig(**dict.fromkeys(SIZES, 8), **config))
    assert options.routing == routing
    assert options.corrected == routing.sigmoid
    assert options.shared_size == config["n_shared_experts"] * options.expert_size


def test_unknown_routing_is_refused() -> None:
    with pytest.raises(MeshError, match="topk_method 'random'"):
        moe_options(ModelConfig(**dict.fromkeys(SIZES, 8), **V3 | {"topk_method": "random"}))


def test_pairs_become_halves() -> None:
    rows = torch.arange(2 * 7.0).view(2, 7, 1)  # of two heads, each 3 kept and 4 rotated
    assert halves_from_pairs(rows, 4).flatten(1).tolist() == [[0, 1, 2, 3, 5, 4, 6], [7, 8, 9, 10, 12, 11, 13]]
