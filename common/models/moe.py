"""Mixtures of experts made from a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from common.dist.dispatch.replicated import ReplicatedDispatch
from common.dist.group import ALONE
from common.dist.parallel import Sharing, share
from common.layers.moe import Experts, MixtureOfExperts
from common.layers.routing import Router, Routing
from common.models.config import ModelConfig, bad_checkpoint
from common.models.weights import Weights
from common.ops.linear import Product

LLAMA_NAMES = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class MoeOptions:
    """Where a family departs from the plain mixture.

    Attributes:
        prefix: What follows the layer's name in those of its tensors.
        names: The last part of the names of an expert's gate, up and down projections.
        expert_size: Size of one expert's feed-forward block.
        shared_size: Size of the block that every token goes through; 0 where there is none.
        corrected: The router has `e_score_correction_bias`.
    """

    routing: Routing
    expert_size: int
    prefix: str = "mlp"
    names: tuple[str, str, str] = LLAMA_NAMES
    shared_size: int = 0
    corrected: bool = False


def load_moe(config: ModelConfig, weights: Weights, layer: int, options: MoeOptions) -> Product:
    """This rank's part of the mixture of one layer. Raises `MeshError`, see `Weights`."""
    prefix, hidden, experts = f"model.layers.{layer}.{options.prefix}", config.hidden_size, config.routed_experts
    checkpoint, parallel = weights.checkpoint, weights.parallel
    gather, group = parallel.experts.gather, parallel.experts.group
    owners, sharers = (group, ALONE) if parallel.own_experts else (ALONE, group)
    mine = share("experts", experts, owners)

    def block(expert: int) -> Product:
        gate, up, down = (f"{prefix}.experts.{expert}.{name}" for name in options.names)
        return weights.mlp((gate, up, down), hidden, options.expert_size, sharers)

    gate_XE = checkpoint.tensor(f"{prefix}.gate.weight", experts, hidden, dtype=torch.float32).clone()
    bias_X = None
    if options.corrected:
        bias_X = checkpoint.tensor(f"{prefix}.gate.e_score_correction_bias", experts, dtype=torch.float32).clone()
    shared = None
    if options.shared_size:
        gate, up, down = (f"{prefix}.shared_experts.{name}" for name in LLAMA_NAMES)
        # Within a block that gathers, the tokens are there already.
        dense = parallel.dense if gather is None else Sharing(parallel.dense.group)
        shared = dense.whole(weights.mlp((gate, up, down), hidden, options.shared_size, dense.group))
    mixture = MixtureOfExperts(
        Router(gate_XE, options.routing, bias_X),
        Experts(mine.start, [block(expert) for expert in range(mine.start, mine.stop)]),
        parallel.dispatch or ReplicatedDispatch(group),
        shared,
    )
    return mixture if gather is None else gather.around(mixture)


def check_routing(config: ModelConfig, routing: Routing) -> Routing:
    """`routing`, if the experts can be chosen so. Raises `MeshError` (BAD_CHECKPOINT)."""
    experts = config.routed_experts
    in_group = experts // routing.groups
    problem = None
    if experts < 1 or experts % routing.groups:
        problem = f"{experts} experts in {routing.groups} groups"
    elif not 1 <= routing.top_groups <= routing.groups:
        problem = f"topk_group is {routing.top_groups} of {routing.groups} groups"
    elif not 1 <= routing.top_k <= routing.top_groups * in_group:
        problem = f"num_experts_per_tok is {routing.top_k} of {routing.top_groups * in_group} experts"
    elif routing.top_groups < routing.groups and routing.best_of_group > in_group:
        problem = f"groups of {in_group} experts are rated by their best {routing.best_of_group}"
    if problem:
        raise bad_checkpoint(f"config.json: cannot route: {problem}")
    return routing
