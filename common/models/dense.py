"""The dense decoder that Llama and its relatives are: what differs between them is a handful of options.

Shape suffixes: T tokens, S tokens whose logits are wanted, E hidden size, F feed-forward size, V vocabulary,
N query and key heads, D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from common.layers.attention import Attention
from common.layers.mlp import GatedMlp
from common.layers.norm import RmsNorm
from common.layers.rotary import Rotary
from common.models.checkpoint import Checkpoint
from common.models.config import ModelConfig, bad_checkpoint
from common.ops.attention.base import AttentionPlan
from common.ops.linear import Product, make_linear


@dataclass(frozen=True)
class DenseOptions:
    """Where a family departs from the plain decoder."""

    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False


class DenseDecoder:
    """Embedding, layers, norm and head of a model; see `common.models.registry.CausalLM`."""

    def __init__(self, config: ModelConfig, checkpoint: Checkpoint, context_length: int, options: DenseOptions) -> None:
        vocabulary = (config.vocab_size, config.hidden_size)
        self.embedding_VE = checkpoint.owned("model.embed_tokens.weight", *vocabulary)
        try:
            self.rotary = Rotary(
                config.rope, config.head_size, config.max_position_embeddings, context_length, checkpoint.device
            )
        except ValueError as error:
            raise bad_checkpoint(f"{checkpoint.folder / 'config.json'}: {error}") from None
        loader = LayerLoader(config, checkpoint, options)
        self.layers = [loader.load(layer) for layer in range(config.num_hidden_layers)]
        self.norm = loader.norm("model.norm.weight")
        if config.tie_word_embeddings:
            self.head = make_linear(self.embedding_VE)
        else:
            self.head = loader.linear(["lm_head"], [config.vocab_size], config.hidden_size, bias=False)

    def __call__(
        self,
        token_ids_T: torch.Tensor,
        positions_T: torch.Tensor,
        plan: AttentionPlan,
        wanted_S: torch.Tensor | None,
    ) -> torch.Tensor:
        """Logits `[S, V]` after the rows `wanted_S`; after all of them when it is None."""
        x_TE = F.embedding(token_ids_T, self.embedding_VE)
        cos_T1D, sin_T1D = self.rotary.tables(positions_T, x_TE.dtype)
        for layer in self.layers[:-1]:
            x_TE = layer(x_TE, cos_T1D, sin_T1D, plan, None)
        x_SE = self.layers[-1](x_TE, cos_T1D, sin_T1D, plan, wanted_S)
        return self.head(self.norm(x_SE))


class DenseLayer:
    """Attention and feed-forward, each normalised before and added to the residual stream after."""

    def __init__(
        self, input_norm: RmsNorm, attention: Attention, output: Product, mlp_norm: RmsNorm, mlp: GatedMlp
    ) -> None:
        self.input_norm = input_norm
        self.attention = attention
        self.output = output
        self.mlp_norm = mlp_norm
        self.mlp = mlp

    def __call__(
        self,
        x_TE: torch.Tensor,
        cos_T1D: torch.Tensor,
        sin_T1D: torch.Tensor,
        plan: AttentionPlan,
        wanted_S: torch.Tensor | None,
    ) -> torch.Tensor:
        """The stream after this layer; of the rows `wanted_S` only where they are given (the last layer)."""
        heads = self.attention(self.input_norm(x_TE), cos_T1D, sin_T1D, plan)
        if wanted_S is not None:
            heads, x_TE = heads.index_select(0, wanted_S), x_TE.index_select(0, wanted_S)
        x_TE = self.output(heads).add_(x_TE)
        return self.mlp(self.mlp_norm(x_TE)).add_(x_TE)


class LayerLoader:
    """Makes layers from a checkpoint's tensors, which bear transformers' names."""

    def __init__(self, config: ModelConfig, checkpoint: Checkpoint, options: DenseOptions) -> None:
        self.config = config
        self.checkpoint = checkpoint
        self.options = options

    def load(self, layer: int) -> DenseLayer:
        config, options, prefix = self.config, self.options, f"model.layers.{layer}"
        hidden, intermediate = config.hidden_size, config.intermediate_size
        q_size, kv_size = config.num_attention_heads * config.head_size, config.kv_heads * config.head_size
        projections = [f"{prefix}.self_attn.{name}_proj" for name in ("q", "k", "v")]
        attention = Attention(
            layer,
            self.linear(projections, [q_size, kv_size, kv_size], hidden, options.qkv_bias),
            config.num_attention_heads,
            config.kv_heads,
            config.head_size,
            self.qk_norm(f"{prefix}.self_attn") if options.qk_norm else None,
            config.rms_norm_eps,
        )
        gate_up = [f"{prefix}.mlp.gate_proj", f"{prefix}.mlp.up_proj"]
        mlp = GatedMlp(
            self.linear(gate_up, [intermediate, intermediate], hidden, options.mlp_bias),
            self.linear([f"{prefix}.mlp.down_proj"], [hidden], intermediate, options.mlp_bias),
        )
        return DenseLayer(
            self.norm(f"{prefix}.input_layernorm.weight"),
            attention,
            self.linear([f"{prefix}.self_attn.o_proj"], [hidden], q_size, options.output_bias),
            self.norm(f"{prefix}.post_attention_layernorm.weight"),
            mlp,
        )

    def linear(self, names: list[str], outputs: list[int], inputs: int, bias: bool) -> Product:
        """Projections of the same input, joined into one product."""
        sizes = list(zip(names, outputs, strict=True))
        weight_OI = torch.cat([self.checkpoint.tensor(f"{name}.weight", size, inputs) for name, size in sizes])
        if not bias:
            return make_linear(weight_OI)
        return make_linear(weight_OI, torch.cat([self.checkpoint.tensor(f"{name}.bias", size) for name, size in sizes]))

    def norm(self, name: str) -> RmsNorm:
        return RmsNorm(self.checkpoint.owned(name, self.config.hidden_size), self.config.rms_norm_eps)

    def qk_norm(self, prefix: str) -> torch.Tensor:
        """Weights of all query and key heads, `[N, D]`."""
        config, size = self.config, self.config.head_size
        q_D = self.checkpoint.tensor(f"{prefix}.q_norm.weight", size)
        k_D = self.checkpoint.tensor(f"{prefix}.k_norm.weight", size)
        return torch.cat((q_D.expand(config.num_attention_heads, size), k_D.expand(config.kv_heads, size)))
