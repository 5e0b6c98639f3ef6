"""Modules made from a checkpoint's tensors, which bear transformers' names."""

from __future__ import annotations

import torch

from common.layers.mlp import GatedMlp
from common.layers.norm import RmsNorm
from common.models.checkpoint import Checkpoint
from common.ops.linear import Product, make_linear


class Weights:
    """What every family's loader asks a checkpoint for. Raises `MeshError` (BAD_CHECKPOINT)."""

    def __init__(self, checkpoint: Checkpoint, eps: float) -> None:
        self.checkpoint = checkpoint
        self.eps = eps

    def linear(self, names: list[str], outputs: list[int], inputs: int, bias: bool = False) -> Product:
        """Projections of the same input, joined into one product."""
        sizes = list(zip(names, outputs, strict=True))
        weight_OI = torch.cat([self.checkpoint.projection(f"{name}.weight", size, inputs) for name, size in sizes])
        if not bias:
            return make_linear(weight_OI)
        return make_linear(weight_OI, torch.cat([self.checkpoint.tensor(f"{name}.bias", size) for name, size in sizes]))

    def mlp(self, names: tuple[str, str, str], hidden: int, intermediate: int, bias: bool = False) -> GatedMlp:
        """A feed-forward block; `names` are those of its gate, up and down projections."""
        gate, up, down = names
        return GatedMlp(
            self.linear([gate, up], [intermediate, intermediate], hidden, bias),
            self.linear([down], [hidden], intermediate, bias),
        )

    def norm(self, name: str, size: int, eps: float | None = None) -> RmsNorm:
        """A norm with the model's epsilon, or one of its own."""
        return RmsNorm(self.checkpoint.owned(f"{name}.weight", size), self.eps if eps is None else eps)


def mlp_names(prefix: str) -> tuple[str, str, str]:
    """What most families call a feed-forward block's projections."""
    return f"{prefix}.gate_proj", f"{prefix}.up_proj", f"{prefix}.down_proj"
