"""Layers as Llama and its relatives have them: what differs between them is a handful of options.

Shape suffixes: N query and key heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from common.dist.parallel import Parallel, share, share_kv_heads
from common.layers.attention import Attention
from common.models.checkpoint import Checkpoint
from common.models.config import ModelConfig
from common.models.decoder import Decoder, DecoderLayer
from common.models.weights import Weights, mlp_names
from common.ops.linear import Product

FeedForward = Callable[[Weights, int], Product]  # makes the block of a layer's number, for all ranks together


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
    parallel: Parallel,
    options: DenseOptions,
    feed_forward: FeedForward | None = None,
) -> Decoder:
    """A decoder with grouped-query attention; `feed_forward` replaces the gated block of every layer."""

    def load_layer(weights: Weights, layer: int) -> DecoderLayer:
        prefix, hidden = f"model.layers.{layer}", config.hidden_size
        return DecoderLayer(
            weights.norm(f"{prefix}.input_layernorm", hidden),
            load_attention(config, weights, layer, options),
            load_output(weights, layer, hidden, config.num_attention_heads, config.head_size, options.output_bias),
            weights.norm(f"{prefix}.post_attention_layernorm", hidden),
            (feed_forward or gated)(weights, layer),
        )

    def gated(weights: Weights, layer: int) -> Product:
        return load_gated(config, weights, layer, options.mlp_bias)

    return Decoder(config, checkpoint, context_length, parallel, load_layer)


def load_gated(config: ModelConfig, weights: Weights, layer: int, bias: bool = False) -> Product:
    """The feed-forward block of a dense layer."""
    names, dense = mlp_names(f"model.layers.{layer}.mlp"), weights.parallel.dense
    return dense.whole(weights.mlp(names, config.hidden_size, config.intermediate_size, dense.group, bias))


def load_output(weights: Weights, layer: int, hidden: int, heads: int, head_size: int, bias: bool) -> Product:
    """The projection of the heads' outputs, `head_size` elements each, back to the stream."""
    attention = weights.parallel.attention
    mine = elements(share("attention heads", heads, attention.group), head_size)
    name = f"model.layers.{layer}.self_attn.o_proj"
    return attention.whole(weights.partial(name, hidden, heads * head_size, mine, bias))


def load_attention(config: ModelConfig, weights: Weights, layer: int, options: DenseOptions) -> Attention:
    prefix, size = f"model.layers.{layer}.self_attn", config.head_size
    heads, kv_heads = config.num_attention_heads, config.kv_heads
    group = weights.parallel.attention.group
    mine, kv_mine = share("attention heads", heads, group), share_kv_heads(kv_heads, group)
    qkv = weights.linear(
        [f"{prefix}.{name}_proj" for name in ("q", "k", "v")],
        [heads * size, kv_heads * size, kv_heads * size],
        config.hidden_size,
        options.qkv_bias,
        [elements(part, size) for part in (mine, kv_mine, kv_mine)],
    )
    num_heads, num_kv_heads = mine.stop - mine.start, kv_mine.stop - kv_mine.start
    norm_ND = load_qk_norm(weights, prefix, size, num_heads, num_kv_heads) if options.qk_norm else None
    cache_layer = weights.cache_layer(layer, config.num_hidden_layers)
    return Attention(cache_layer, qkv, num_heads, num_kv_heads, size, norm_ND, config.rms_norm_eps)


def load_qk_norm(weights: Weights, prefix: str, size: int, num_heads: int, num_kv_heads: int) -> torch.Tensor:
    """Weights of this rank's query and key heads, `[N, D]`."""
    q_D = weights.checkpoint.tensor(f"{prefix}.q_norm.weight", size)
    k_D = weights.checkpoint.tensor(f"{prefix}.k_norm.weight", size)
    return torch.cat((q_D.expand(num_heads, size), k_D.expand(num_kv_heads, size)))


def elements(heads: slice, size: int) -> slice:
    """The elements of some heads."""
    return slice(heads.start * size, heads.stop * size)
