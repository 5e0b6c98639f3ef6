"""DeepSeek-V2, V3 and R1: multi-head latent attention, and experts behind a few dense layers.

Shape suffixes: E hidden size, H heads, N dimension of a key without its rotated part, R of the rotated part, V of a
value, X = N + V, C dimension of the latent.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from common.dist.parallel import Parallel, share
from common.layers.mla import LatentAttention, LowRank, halves_from_pairs
from common.layers.routing import Routing
from common.models.checkpoint import Checkpoint
from common.models.config import ModelConfig, bad_checkpoint
from common.models.decoder import Decoder, DecoderLayer
from common.models.dense import load_gated, load_output
from common.models.moe import MoeOptions, check_routing, load_moe
from common.models.weights import Weights
from common.ops.linear import Product, make_linear

LATENT_EPS = 1e-6  # of the norms within attention, whatever rms_norm_eps is
GREEDY, GROUPS, CORRECTED = "greedy", "group_limited_greedy", "noaux_tc"


def load(config: ModelConfig, checkpoint: Checkpoint, context_length: int, parallel: Parallel) -> Decoder:
    """Layers before `first_k_dense_replace`, and those that `moe_layer_freq` skips, are dense."""
    check_latent(config)
    moe = moe_options(config)

    def feed_forward(weights: Weights, layer: int) -> Product:
        if layer < config.first_k_dense_replace or layer % config.moe_layer_freq:
            return load_gated(config, weights, layer)
        return load_moe(config, weights, layer, moe)

    def load_layer(weights: Weights, layer: int) -> DecoderLayer:
        prefix, hidden = f"model.layers.{layer}", config.hidden_size
        heads, values = config.num_attention_heads, value_dim(config)
        return DecoderLayer(
            weights.norm(f"{prefix}.input_layernorm", hidden),
            load_attention(config, weights, layer),
            load_output(weights, layer, hidden, heads, values, config.attention_bias),
            weights.norm(f"{prefix}.post_attention_layernorm", hidden),
            feed_forward(weights, layer),
        )

    return Decoder(config, checkpoint, context_length, parallel, load_layer)


def moe_options(config: ModelConfig) -> MoeOptions:
    """V3 scores by sigmoids, corrects them for the choice, and rates a group by its best two; V2 scores by softmax
    and rates a group, where it has groups, by its best."""
    v3 = is_v3(config)
    method = config.topk_method or (CORRECTED if v3 else GREEDY)
    score = config.scoring_func or ("sigmoid" if v3 else "softmax")
    if method not in (GREEDY, GROUPS, CORRECTED) or score not in ("sigmoid", "softmax"):
        raise bad_checkpoint(f"config.json: topk_method {method!r} with scoring_func {score!r} is not supported")
    # V2's own code scales only where it does not normalise; V3's does both.
    normalise = bool(config.norm_topk_prob) and (config.num_experts_per_tok or 1) > 1
    scaled = method == CORRECTED or not normalise
    routing = Routing(
        top_k=config.num_experts_per_tok or 1,
        sigmoid=score == "sigmoid",
        groups=1 if method == GREEDY else config.n_group or 1,
        top_groups=1 if method == GREEDY else config.topk_group or 1,
        best_of_group=2 if method == CORRECTED else 1,
        normalise=normalise,
        scale=config.routed_scaling_factor if scaled else 1.0,
    )
    expert_size = config.moe_intermediate_size or config.intermediate_size
    return MoeOptions(
        check_routing(config, routing),
        expert_size,
        shared_size=expert_size * (config.n_shared_experts or 0),
        corrected=method == CORRECTED,
    )


def load_attention(config: ModelConfig, weights: Weights, layer: int) -> LatentAttention:
    """This rank's heads; the latent, which all heads share, is made on every rank."""
    prefix, hidden, rope = f"model.layers.{layer}.self_attn", config.hidden_size, config.qk_rope_head_dim
    heads, latent = config.num_attention_heads, config.kv_lora_rank or 0
    mine = share("attention heads", heads, weights.parallel.attention.group)
    both = config.qk_nope_head_dim + value_dim(config)
    expand_OC = weights.checkpoint.projection(f"{prefix}.kv_b_proj.weight", heads * both, latent)
    down = Rotated(f"{prefix}.kv_a_proj_with_mqa", 1, latent + rope, slice(0, 1))
    return LatentAttention(
        weights.cache_layer(layer, config.num_hidden_layers),
        load_query(config, weights, prefix, mine),
        load_rotated(config, weights, down, hidden, config.attention_bias),
        weights.norm(f"{prefix}.kv_a_layernorm", latent, LATENT_EPS),
        expand_OC.view(heads, both, latent)[mine].clone(),
        rope,
    )


def load_query(config: ModelConfig, weights: Weights, prefix: str, mine: slice) -> Product:
    """Straight from the hidden state, or by way of `q_lora_rank` dimensions."""
    heads, dim = config.num_attention_heads, config.qk_nope_head_dim + config.qk_rope_head_dim
    hidden, rank = config.hidden_size, config.q_lora_rank
    if rank is None:
        return load_rotated(config, weights, Rotated(f"{prefix}.q_proj", heads, dim, mine), hidden)
    return LowRank(
        weights.linear([f"{prefix}.q_a_proj"], [rank], hidden, config.attention_bias),
        weights.norm(f"{prefix}.q_a_layernorm", rank, LATENT_EPS),
        load_rotated(config, weights, Rotated(f"{prefix}.q_b_proj", heads, dim, mine), rank),
    )


@dataclass(frozen=True)
class Rotated:
    """A projection to heads of `dim` elements, the last of which are rotated; those of `mine` are this rank's."""

    name: str
    heads: int
    dim: int
    mine: slice


def load_rotated(
    config: ModelConfig, weights: Weights, projection: Rotated, inputs: int, bias: bool = False
) -> Product:
    """The product that makes this rank's heads, rotated elements in halves."""

    def rows(x_OI: torch.Tensor) -> torch.Tensor:
        x_HDI = x_OI.reshape(projection.heads, projection.dim, -1)[projection.mine]
        moved = halves_from_pairs(x_HDI, config.qk_rope_head_dim) if interleaved(config) else x_HDI.clone()
        return moved.flatten(0, 1)

    name, outputs = projection.name, projection.heads * projection.dim
    weight_OI = rows(weights.checkpoint.projection(f"{name}.weight", outputs, inputs))
    if not bias:
        return make_linear(weight_OI)
    return make_linear(weight_OI, rows(weights.checkpoint.tensor(f"{name}.bias", outputs)).flatten())


def interleaved(config: ModelConfig) -> bool:
    """Whether rotated elements are neighbours; V2 knows nothing else."""
    return config.rope_interleave or not is_v3(config)


def is_v3(config: ModelConfig) -> bool:
    """V3 and its relatives, which have other model types."""
    return "DeepseekV3ForCausalLM" in (config.architectures or ()) or config.model_type == "deepseek_v3"


def value_dim(config: ModelConfig) -> int:
    """Elements of a head's value."""
    return config.v_head_dim or config.qk_nope_head_dim


def check_latent(config: ModelConfig) -> None:
    """Raises `MeshError` (BAD_CHECKPOINT) for dimensions that latent attention cannot have."""
    if (config.kv_lora_rank or 0) < 1 or config.qk_nope_head_dim < 1:
        raise bad_checkpoint("config.json: multi-head latent attention needs kv_lora_rank and qk_nope_head_dim")
    if config.qk_rope_head_dim < 2 or config.qk_rope_head_dim % 2:
        raise bad_checkpoint(f"config.json: qk_rope_head_dim is {config.qk_rope_head_dim}, not even")
    if config.moe_layer_freq < 1:
        raise bad_checkpoint(f"config.json: moe_layer_freq is {config.moe_layer_freq}")
