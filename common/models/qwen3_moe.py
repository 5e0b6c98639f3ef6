"""Qwen3 with a mixture of experts."""

from __future__ import annotations

from common.dist.parallel import Parallel
from common.layers.routing import Routing
from common.models.checkpoint import Checkpoint
from common.models.config import ModelConfig
from common.models.decoder import Decoder
from common.models.dense import DenseOptions, load_dense, load_gated
from common.models.moe import MoeOptions, check_routing, load_moe
from common.models.weights import Weights
from common.ops.linear import Product


def load(config: ModelConfig, checkpoint: Checkpoint, context_length: int, parallel: Parallel) -> Decoder:
    """Attention is Qwen3's; layers have experts but for those that `mlp_only_layers` and `decoder_sparse_step` keep
    dense."""
    routing = Routing(top_k=config.num_experts_per_tok or 1, normalise=bool(config.norm_topk_prob))
    expert_size = config.moe_intermediate_size or config.intermediate_size
    moe = MoeOptions(check_routing(config, routing), expert_size)

    def feed_forward(weights: Weights, layer: int) -> Product:
        if layer in (config.mlp_only_layers or ()) or (layer + 1) % config.decoder_sparse_step:
            return load_gated(config, weights, layer)
        return load_moe(config, weights, layer, moe)

    options = DenseOptions(qkv_bias=config.attention_bias, output_bias=config.attention_bias, qk_norm=True)
    return load_dense(config, checkpoint, context_length, parallel, options, feed_forward)
