"""A rank's modules made from a checkpoint's tensors, which bear transformers' names.

A tensor is looked at whole, also where a rank keeps a part of it: what FP8 makes of it shall not depend on how many
ranks there are. Files are mapped, so parts that nobody asks for are not read.
"""

from __future__ import annotations

import torch

from common.dist.group import Group
from common.dist.parallel import NOT_PARALLEL, Parallel, share, share_padded
from common.layers.mlp import GatedMlp
from common.layers.norm import RmsNorm
from common.layers.vocabulary import Embedding, Head
from common.models.checkpoint import Checkpoint
from common.ops.linear import Product, make_linear

ALL = slice(None)


class Weights:
    """What every family's loader asks a checkpoint for.

    Methods raise `MeshError`: BAD_CHECKPOINT, or BAD_CONFIG for what so many ranks cannot share.
    """

    def __init__(self, checkpoint: Checkpoint, eps: float, parallel: Parallel = NOT_PARALLEL) -> None:
        self.checkpoint = checkpoint
        self.eps = eps
        self.parallel = parallel

    def linear(
        self,
        names: list[str],
        outputs: list[int],
        inputs: int,
        bias: bool = False,
        parts: list[slice] | None = None,
    ) -> Product:
        """Projections of the same input, joined into one product; of each the outputs `parts`, or all."""
        whole = zip(names, outputs, parts or [ALL] * len(names), strict=True)
        projections = [(name, size, part) for name, size, part in whole]
        weight_OI = torch.cat(
            [self.checkpoint.projection(f"{name}.weight", size, inputs)[part] for name, size, part in projections]
        )
        if not bias:
            return make_linear(weight_OI)
        bias_O = torch.cat([self.checkpoint.tensor(f"{name}.bias", size)[part] for name, size, part in projections])
        return make_linear(weight_OI, bias_O)

    def partial(self, name: str, outputs: int, inputs: int, part: slice, bias: bool = False) -> Product:
        """A projection of the inputs `part` alone: the group's ranks sum up to the whole. The bias is the first's."""
        weight_OI = self.checkpoint.projection(f"{name}.weight", outputs, inputs)[:, part].clone()
        if not bias or part.start:
            return make_linear(weight_OI)
        return make_linear(weight_OI, self.checkpoint.owned(f"{name}.bias", outputs))

    def mlp(
        self, names: tuple[str, str, str], hidden: int, intermediate: int, group: Group, bias: bool = False
    ) -> GatedMlp:
        """This rank's part of a feed-forward block: `group` sums the parts up.

        `names` are those of the gate, up and down projections.
        """
        gate, up, down = names
        part = share("feed-forward elements", intermediate, group)
        return GatedMlp(
            self.linear([gate, up], [intermediate, intermediate], hidden, bias, [part, part]),
            self.partial(down, hidden, intermediate, part, bias),
        )

    def norm(self, name: str, size: int, eps: float | None = None) -> RmsNorm:
        """A norm with the model's epsilon, or one of its own."""
        return RmsNorm(self.checkpoint.owned(f"{name}.weight", size), self.eps if eps is None else eps)

    def cache_layer(self, layer: int, num_layers: int) -> int:
        """Number of a layer in this rank's pages, of its number in the model."""
        return layer - self.parallel.stage.layers(num_layers).start

    def embedding(self, vocab_size: int, hidden: int) -> Embedding:
        """The table, which is never quantized."""
        group = self.parallel.embedding.group
        part = share_padded(vocab_size, group)
        table_VE = self.checkpoint.tensor("model.embed_tokens.weight", vocab_size, hidden)[part].clone()
        return Embedding(table_VE, part.start, group)

    def head(self, vocab_size: int, hidden: int, tied: bool, embedding: Embedding | None) -> Head:
        """What makes logits, which is never quantized; `tied` to the table of `embedding`, if this rank has that."""
        name, sharing = "model.embed_tokens" if tied else "lm_head", self.parallel.head
        if tied and embedding and embedding.group is sharing.group:
            return Head(make_linear(embedding.table_VE), vocab_size, sharing)
        part = share_padded(vocab_size, sharing.group)
        weight_VE = self.checkpoint.tensor(f"{name}.weight", vocab_size, hidden)[part].clone()
        return Head(make_linear(weight_VE), vocab_size, sharing)


def mlp_names(prefix: str) -> tuple[str, str, str]:
    """What most families call a feed-forward block's projections."""
    return f"{prefix}.gate_proj", f"{prefix}.up_proj", f"{prefix}.down_proj"
