"""The gated feed-forward block."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from common.ops.linear import Product


class GatedMlp:
    """`down(silu(gate(x)) * up(x))`, with gate and up in one product."""

    def __init__(self, gate_up: Product, down: Product) -> None:
        self.gate_up = gate_up
        self.down = down

    def __call__(self, x_TE: torch.Tensor) -> torch.Tensor:
        gate_TF, up_TF = self.gate_up(x_TE).chunk(2, -1)
        return self.down(F.silu(gate_TF).mul_(up_TF))
