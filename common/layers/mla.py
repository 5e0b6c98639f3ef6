"""Multi-head latent attention (DeepSeek-V2, https://arxiv.org/abs/2405.04434).

Shape suffixes: T tokens, E hidden size, H query heads of this rank, N dimension of a key without its rotated part,
R of the rotated part, V of a value, X = N + V, C dimension of the latent, L = C + R.
"""

from __future__ import annotations

import torch

from common.layers.norm import RmsNorm
from common.layers.rotary import rotate
from common.ops.attention.base import LatentPlan
from common.ops.linear import Product


class LatentAttention:
    """Queries and latents of one layer; the output projection is the caller's to apply."""

    def __init__(
        self, layer: int, query: Product, latent: Product, latent_norm: RmsNorm, expand_HXC: torch.Tensor, rope_dim: int
    ) -> None:
        """`query` gives `[T, H * (N + R)]`, `latent` `[T, L]`, before norm and rotation. `expand_HXC` makes the heads'
        keys and values from the latent."""
        self.layer = layer
        self.query = query
        self.latent = latent
        self.latent_norm = latent_norm
        self.expand_HXC = expand_HXC
        self.rope_dim = rope_dim

    def __call__(
        self, x_TE: torch.Tensor, cos_T1R: torch.Tensor, sin_T1R: torch.Tensor, plan: LatentPlan
    ) -> torch.Tensor:
        """Returns the heads' outputs, `[T, H * V]`."""
        heads, _, latent_dim = self.expand_HXC.shape
        q_TX = self.query(x_TE)
        q_THD = q_TX.view(len(x_TE), heads, q_TX.shape[1] // heads)
        q_THN, q_THR = q_THD[..., : -self.rope_dim], q_THD[..., -self.rope_dim :]
        latent_TL = self.latent(x_TE)
        c_TC, r_T1R = latent_TL[:, :latent_dim], latent_TL[:, None, latent_dim:]
        latent_TL = torch.cat((self.latent_norm(c_TC), rotate(r_T1R, cos_T1R, sin_T1R)[:, 0]), -1)
        return plan.attend_latent(self.layer, q_THN, rotate(q_THR, cos_T1R, sin_T1R), latent_TL, self.expand_HXC)


class LowRank:
    """A projection through a few dimensions: `up(norm(down(x)))`."""

    def __init__(self, down: Product, norm: RmsNorm, up: Product) -> None:
        self.down = down
        self.norm = norm
        self.up = up

    def __call__(self, x_TE: torch.Tensor) -> torch.Tensor:
        return self.up(self.norm(self.down(x_TE)))


def halves_from_pairs(weight_OI: torch.Tensor, rope_dim: int) -> torch.Tensor:
    """A projection `[..., O, I]` whose last `rope_dim` outputs are to be rotated as pairs `(2i, 2i + 1)`, with those
    outputs moved so that `rotate`, which pairs `(i, i + rope_dim / 2)`, turns the same pairs.

    Queries and keys are moved alike, which leaves their products as they were.
    """
    kept, pairs = weight_OI[..., :-rope_dim, :], weight_OI[..., -rope_dim:, :]
    return torch.cat((kept, pairs[..., 0::2, :], pairs[..., 1::2, :]), -2)
