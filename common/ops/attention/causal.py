"""Causal attention of one sequence's new tokens, from torch's own operations.

Shape suffixes: T new tokens, S keys (earlier tokens and the new ones), K key/value heads, G query heads per key/value
head, D dimension of a key, V of a value, X = G * tokens of a block.
"""

from __future__ import annotations

import torch

QUERY_BLOCK = 64  # tokens whose scores are computed at once
MAX_SCORES = 2**24  # scores held at once, where a block can be made small enough


class CausalAttention:
    """Blocks of queries, so that no score is computed beyond a block's own last key."""

    def __init__(self, dtype: torch.dtype, device: torch.device, scale: float) -> None:
        self.scale = scale
        self.hidden = torch.full((QUERY_BLOCK, QUERY_BLOCK), -torch.inf, dtype=dtype, device=device).triu_(1)
        self.zero = torch.zeros((1, 1, 1), dtype=dtype, device=device)

    def __call__(
        self, q_KGTD: torch.Tensor, k_KSD: torch.Tensor, v_KSV: torch.Tensor, start: int, out_KGTV: torch.Tensor
    ) -> None:
        """Attend to keys `0 .. start + t` for token `t`, and write the heads' outputs to `out_KGTV`."""
        kv_heads, group, tokens, _ = q_KGTD.shape
        block = max(8, min(QUERY_BLOCK, MAX_SCORES // (kv_heads * group * (start + tokens))))
        for first in range(0, tokens, block):
            last = min(first + block, tokens)
            rows, end = last - first, start + last
            q_KXD = q_KGTD[:, :, first:last].reshape(kv_heads, -1, q_KGTD.shape[-1])
            scores_KXS = torch.baddbmm(self.zero, q_KXD, k_KSD[:, :end].transpose(1, 2), beta=0, alpha=self.scale)
            scores_KXS.view(kv_heads, -1, rows, end)[..., end - rows :].add_(self.hidden[:rows, :rows])
            out_KXV = torch.bmm(torch.softmax(scores_KXS, -1), v_KSV[:, :end])
            out_KGTV[:, :, first:last] = out_KXV.view(kv_heads, group, rows, -1)
