"""The decoder that all families share: embedding, layers, norm and head. A family says what a layer is made of.

Shape suffixes: T tokens, S tokens whose logits are wanted, E hidden size, V vocabulary, D rotated dimension.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from common.dist.parallel import Parallel
from common.layers.norm import RmsNorm
from common.layers.rotary import Rotary
from common.models.checkpoint import Checkpoint
from common.models.config import ModelConfig, bad_checkpoint
from common.models.weights import Weights
from common.ops.attention.base import Plan
from common.ops.linear import Product

# (x_TE, cos_T1D, sin_T1D, plan) -> the heads' outputs of each token
AttentionBlock = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Plan], torch.Tensor]


class DecoderLayer:
    """Attention and feed-forward, each normalised before and added to the residual stream after."""

    def __init__(
        self, input_norm: RmsNorm, attention: AttentionBlock, output: Product, mlp_norm: RmsNorm, mlp: Product
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
        plan: Plan,
        wanted_S: torch.Tensor | None,
    ) -> torch.Tensor:
        """The stream after this layer; of the rows `wanted_S` only where they are given (the last layer)."""
        heads = self.attention(self.input_norm(x_TE), cos_T1D, sin_T1D, plan)
        if wanted_S is not None:
            heads, x_TE = heads.index_select(0, wanted_S), x_TE.index_select(0, wanted_S)
        x_TE = self.output(heads).add_(x_TE)
        return self.mlp(self.mlp_norm(x_TE)).add_(x_TE)


class Decoder:
    """A loaded model, or a stage of one; see `common.models.registry.CausalLM`."""

    def __init__(
        self,
        config: ModelConfig,
        checkpoint: Checkpoint,
        context_length: int,
        parallel: Parallel,
        load_layer: Callable[[Weights, int], DecoderLayer],
    ) -> None:
        """`load_layer` makes this rank's part of the layer of a number.

        Raises:
            MeshError: BAD_CHECKPOINT; BAD_CONFIG for what so many ranks cannot share.
        """
        weights = Weights(checkpoint, config.rms_norm_eps, parallel)
        vocabulary, hidden, stage = config.vocab_size, config.hidden_size, parallel.stage
        self.embedding = weights.embedding(vocabulary, hidden) if stage.is_first else None
        try:
            self.rotary = Rotary(
                config.rope, config.rotary_dim, config.max_position_embeddings, context_length, checkpoint.device
            )
        except ValueError as error:
            raise bad_checkpoint(f"{checkpoint.folder / 'config.json'}: {error}") from None
        self.layers = [load_layer(weights, layer) for layer in stage.layers(config.num_hidden_layers)]
        self.norm = weights.norm("model.norm", hidden)
        tied = config.tie_word_embeddings
        self.head = weights.head(vocabulary, hidden, tied, self.embedding) if stage.is_last else None
        # Where ranks gather each other's tokens within a layer, they know how many there are, not how many are wanted.
        self.selects_late = parallel.gathers

    def __call__(
        self,
        given_T: torch.Tensor,
        positions_T: torch.Tensor,
        plan: Plan,
        wanted_S: torch.Tensor | None,
    ) -> torch.Tensor:
        """See `common.models.registry.CausalLM`."""
        x_TE = self.embedding(given_T) if self.embedding else given_T
        cos_T1D, sin_T1D = self.rotary.tables(positions_T, x_TE.dtype)
        for layer in self.layers[:-1]:
            x_TE = layer(x_TE, cos_T1D, sin_T1D, plan, None)
        early = wanted_S if self.head and not self.selects_late else None
        x_TE = self.layers[-1](x_TE, cos_T1D, sin_T1D, plan, early)
        if self.head is None:
            return x_TE
        x_SE = x_TE.index_select(0, wanted_S) if self.selects_late and wanted_S is not None else x_TE
        return self.head(self.norm(x_SE))
