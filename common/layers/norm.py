"""Root-mean-square normalisation."""

from __future__ import annotations

import torch
import torch.nn.functional as F


class RmsNorm:
    """`x / sqrt(mean(x²) + eps) * weight` over the last dimension."""

    def __init__(self, weight_E: torch.Tensor, eps: float) -> None:
        self.weight_E = weight_E
        self.eps = eps

    def __call__(self, x_TE: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x_TE, self.weight_E.shape, self.weight_E, self.eps)
