"""Self-attention with grouped key/value heads.

Shape suffixes: T tokens, E hidden size, H query heads, K key/value heads, D head dimension.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from common.layers.rotary import rotate
from common.ops.attention.base import AttentionPlan
from common.ops.linear import Product


class Attention:
    """Queries, keys and values of one layer, from one product; the output projection is the caller's to apply."""

    def __init__(
        self,
        layer: int,
        qkv: Product,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        qk_norm_ND: torch.Tensor | None = None,
        eps: float = 1e-6,
    ) -> None:
        """`qk_norm_ND`, N = H + K, is the weight that normalises each query and key head, where the model has it."""
        self.layer = layer
        self.qkv = qkv
        self.num_heads = num_heads
        self.rotated = num_heads + num_kv_heads
        self.num_rows = num_heads + 2 * num_kv_heads
        self.head_dim = head_dim
        self.qk_norm_ND = qk_norm_ND
        self.eps = eps

    def __call__(
        self, x_TE: torch.Tensor, cos_T1D: torch.Tensor, sin_T1D: torch.Tensor, plan: AttentionPlan
    ) -> torch.Tensor:
        """Returns the heads' outputs, `[T, H * D]`."""
        qkv_TND = self.qkv(x_TE).view(len(x_TE), self.num_rows, self.head_dim)
        qk_TND = qkv_TND[:, : self.rotated]
        if self.qk_norm_ND is not None:
            qk_TND = F.rms_norm(qk_TND, (self.head_dim,), eps=self.eps) * self.qk_norm_ND
        qk_TND = rotate(qk_TND, cos_T1D, sin_T1D)
        q_THD, k_TKD = qk_TND[:, : self.num_heads], qk_TND[:, self.num_heads :]
        return plan.attend(self.layer, q_THD, k_TKD, qkv_TND[:, self.rotated :])
