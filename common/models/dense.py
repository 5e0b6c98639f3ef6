"""Layers as Llama and its relatives have them: what differs between them is a handful of options.

Shape suffixes: N query and key heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from common.layers.attention import Attention
from common.models.checkpoint import Checkpoint
from common.models.config import ModelConfig
from common.models.decoder import Decoder, DecoderLayer
from common.models.weights import Weights, mlp_names
from common.ops.linear import Product

FeedForward = Callable[[Weights, int], Product]  # makes the block of a layer's number


@dataclass(frozen=True)
class DenseOptions:
    """Where a family departs from the plain decoder."""

    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False


def load_dense(
    config: ModelConfig,
    checkpoint: Checkpoint,
    context_length: int,
    options: DenseOptions,
    feed_forward: FeedForward | None = None,
) -> Decoder:
    """A decoder with grouped-query attention; `feed_forward` replaces the gated block of every layer."""

    def load_layer(weights: Weights, layer: int) -> DecoderLayer:
        prefix, hidden = f"model.layers.{layer}", config.hidden_size
        heads_size = config.num_attention_heads * config.head_size
        if feed_forward is None:
            mlp: Product = weights.mlp(mlp_names(f"{prefix}.mlp"), hidden, config.intermediate_size, options.mlp_bias)
        else:
            mlp = feed_forward(weights, layer)
        return DecoderLayer(
            weights.norm(f"{prefix}.input_layernorm", hidden),
            load_attention(config, weights, layer, options),
            weights.linear([f"{prefix}.self_attn.o_proj"], [hidden], heads_size, options.output_bias),
            weights.norm(f"{prefix}.post_attention_layernorm", hidden),
            mlp,
        )

    return Decoder(config, checkpoint, context_length, load_layer)


def load_attention(config: ModelConfig, weights: Weights, layer: int, options: DenseOptions) -> Attention:
    prefix = f"model.layers.{layer}.self_attn"
    q_size, kv_size = config.num_attention_heads * config.head_size, config.kv_heads * config.head_size
    projections = [f"{prefix}.{name}_proj" for name in ("q", "k", "v")]
    return Attention(
        layer,
        weights.linear(projections, [q_size, kv_size, kv_size], config.hidden_size, options.qkv_bias),
        config.num_attention_heads,
        config.kv_heads,
        config.head_size,
        load_qk_norm(config, weights, prefix) if options.qk_norm else None,
        config.rms_norm_eps,
    )


def load_qk_norm(config: ModelConfig, weights: Weights, prefix: str) -> torch.Tensor:
    """Weights of all query and key heads, `[N, D]`."""
    size = config.head_size
    q_D = weights.checkpoint.tensor(f"{prefix}.q_norm.weight", size)
    k_D = weights.checkpoint.tensor(f"{prefix}.k_norm.weight", size)
    return torch.cat((q_D.expand(config.num_attention_heads, size), k_D.expand(config.kv_heads, size)))
