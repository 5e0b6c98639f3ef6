"""A checkpoint's rotary parameters: plain data, read without torch."""

from __future__ import annotations

import math

import msgspec


class RopeConfig(msgspec.Struct, frozen=True):
    """Rotary parameters of a checkpoint, under the names that config.json gives them."""

    rope_theta: float = 10000.0
    rope_type: str = "default"
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    partial_rotary_factor: float = 1.0


def yarn_mscale(factor: float, scale: float = 1.0) -> float:
    """What YaRN (https://arxiv.org/abs/2309.00071) multiplies queries and keys by, for a context `factor` times the
    trained one."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0
