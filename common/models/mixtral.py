"""Mixtral."""

from __future__ import annotations

from common.dist.parallel import Parallel
from common.layers.routing import Routing
from common.models.checkpoint import Checkpoint
from common.models.config import ModelConfig, bad_checkpoint
from common.models.decoder import Decoder
from common.models.dense import DenseOptions, load_dense
from common.models.moe import MoeOptions, check_routing, load_moe
from common.models.weights import Weights
from common.ops.linear import Product


def load(config: ModelConfig, checkpoint: Checkpoint, context_length: int, parallel: Parallel) -> Decoder:
    """Llama's attention; every layer has experts, under names of its own, whose weights always sum to one."""
    if config.sliding_window is not None:  # which here is no matter of use_sliding_window
        raise bad_checkpoint("config.json: sliding-window attention: not supported")
    routing = Routing(top_k=config.num_experts_per_tok or 2, normalise=True)
    moe = MoeOptions(
        check_routing(config, routing), config.intermediate_size, prefix="block_sparse_moe", names=("w1", "w3", "w2")
    )

    def feed_forward(weights: Weights, layer: int) -> Product:
        return load_moe(config, weights, layer, moe)

    return load_dense(config, checkpoint, context_length, parallel, DenseOptions(), feed_forward)
