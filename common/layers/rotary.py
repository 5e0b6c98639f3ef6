"""Rotary position embeddings and their scaling kinds.

Shape suffixes: T tokens, R half of the head dimension, D head dimension.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from common.layers.rope import RopeConfig, yarn_mscale


class Rotary:
    """Angles of positions, for one head dimension."""

    def __init__(
        self, config: RopeConfig, head_dim: int, max_position: int, context_length: int, device: torch.device
    ) -> None:
        """`max_position` is the checkpoint's `max_position_embeddings`; the engine serves `context_length` tokens.

        Raises:
            ValueError: The kind is not known, or lacks a parameter.
        """
        if config.rope_type not in KINDS:
            raise ValueError(f"rope_type {config.rope_type!r} is not one of {', '.join(KINDS)}")
        powers_R = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        inverse_R, self.magnitude = KINDS[config.rope_type](config, powers_R, max_position, context_length)
        self.inverse_R = inverse_R.to(device)
        self.powers_R = powers_R.to(device)
        self.config = config
        self.max_position = max_position

    def tables(self, positions_T: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and signed sines `[T, 1, D]` for `rotate`.

        A few thousand sines a step cost less than 0.2 % of it, so nothing is kept for the whole context.
        """
        inverse = self.inverse_R
        if self.config.rope_type == "dynamic":
            inverse = self.dynamic_inverse(positions_T)
        angles_TR = positions_T[:, None] * inverse
        cos_TR, sin_TR = angles_TR.cos() * self.magnitude, angles_TR.sin() * self.magnitude
        cos_T1D = torch.cat((cos_TR, cos_TR), -1).to(dtype)[:, None]
        sin_T1D = torch.cat((-sin_TR, sin_TR), -1).to(dtype)[:, None]
        return cos_T1D, sin_T1D

    def dynamic_inverse(self, positions_T: torch.Tensor) -> torch.Tensor:
        """Dynamic NTK scaling: beyond the trained length the base grows with the position.

        A token is rotated for the length that the sequence had when it was computed; so a position's angle
        depends on nothing but the position.
        """
        factor, dim = required(self.config, "factor"), 2 * len(self.powers_R)
        length_T = (positions_T + 1).clamp(min=self.max_position)
        growth_T = (factor * length_T / self.max_position - (factor - 1)) ** (dim / (dim - 2))
        return 1.0 / (self.config.rope_theta * growth_T[:, None]) ** self.powers_R


def rotate(x_THD: torch.Tensor, cos_T1D: torch.Tensor, sin_T1D: torch.Tensor) -> torch.Tensor:
    """Turn each pair `(x[i], x[i + D/2])` by its position's angle."""
    return torch.addcmul(x_THD * cos_T1D, x_THD.roll(x_THD.shape[-1] // 2, -1), sin_T1D)


def required(config: RopeConfig, name: str) -> float:
    """A parameter that the kind cannot do without; `ValueError` when it is missing."""
    value: float | None = getattr(config, name)
    if not value:
        raise ValueError(f"rope_type {config.rope_type!r} needs {name}")
    return value


# Every kind gives the inverse frequencies `[R]` and the factor of sine and cosine.


def default_inverse(config: RopeConfig, powers_R: torch.Tensor, *_: int) -> tuple[torch.Tensor, float]:
    """Su et al., RoFormer, https://arxiv.org/abs/2104.09864; also the start of dynamic NTK scaling."""
    if config.rope_type == "dynamic":
        required(config, "factor")
    return 1.0 / config.rope_theta**powers_R, 1.0


def linear_inverse(config: RopeConfig, powers_R: torch.Tensor, *_: int) -> tuple[torch.Tensor, float]:
    """Chen et al., position interpolation, https://arxiv.org/abs/2306.15595."""
    return 1.0 / config.rope_theta**powers_R / required(config, "factor"), 1.0


def llama3_inverse(
    config: RopeConfig, powers_R: torch.Tensor, max_position: int, context_length: int
) -> tuple[torch.Tensor, float]:
    """Llama 3.1: long waves are stretched, short ones kept, those between blended."""
    inverse_R = 1.0 / config.rope_theta**powers_R
    low, high = config.low_freq_factor, config.high_freq_factor
    trained = config.original_max_position_embeddings or max_position
    turns_R = trained * inverse_R / (2 * math.pi)  # within the trained length
    kept_R = ((turns_R - low) / (high - low)).clamp(0, 1)
    return inverse_R * (kept_R + (1 - kept_R) / required(config, "factor")), 1.0


def yarn_inverse(
    config: RopeConfig, powers_R: torch.Tensor, max_position: int, context_length: int
) -> tuple[torch.Tensor, float]:
    """Peng et al., YaRN, https://arxiv.org/abs/2309.00071."""
    trained = config.original_max_position_embeddings or max_position
    factor = config.factor or max_position / trained
    dim = 2 * len(powers_R)

    def dimension(turns: float) -> float:
        """The dimension that turns `turns` times within the trained length."""
        return dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low, high = dimension(config.beta_fast or 32), dimension(config.beta_slow or 1)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    stretched_R = ((torch.arange(len(powers_R), dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    inverse_R = 1.0 / config.rope_theta**powers_R
    return inverse_R * (stretched_R / factor + (1 - stretched_R)), yarn_magnitude(config, factor)


def yarn_magnitude(config: RopeConfig, factor: float) -> float:
    if config.attention_factor is not None:
        return config.attention_factor
    if config.mscale and config.mscale_all_dim:
        return yarn_mscale(factor, config.mscale) / yarn_mscale(factor, config.mscale_all_dim)
    return yarn_mscale(factor)


def longrope_inverse(
    config: RopeConfig, powers_R: torch.Tensor, max_position: int, context_length: int
) -> tuple[torch.Tensor, float]:
    """Ding et al., LongRoPE, https://arxiv.org/abs/2402.13753.

    The long factors serve whenever the engine's context exceeds the trained length: one sequence must not mix
    keys that were turned by both.
    """
    trained = config.original_max_position_embeddings or max_position
    factors = config.long_factor if context_length > trained else config.short_factor
    if len(factors) != len(powers_R):
        raise ValueError(f"rope_type 'longrope' needs {len(powers_R)} short and long factors, not {len(factors)}")
    factor = config.factor or max_position / trained
    magnitude = config.attention_factor
    if magnitude is None:
        magnitude = math.sqrt(1 + math.log(factor) / math.log(trained)) if factor > 1 else 1.0
    return 1.0 / (torch.tensor(factors) * config.rope_theta**powers_R), magnitude


KINDS: dict[str, Callable[[RopeConfig, torch.Tensor, int, int], tuple[torch.Tensor, float]]] = {
    "default": default_inverse,
    "linear": linear_inverse,
    "dynamic": default_inverse,
    "llama3": llama3_inverse,
    "yarn": yarn_inverse,
    "longrope": longrope_inverse,
}
