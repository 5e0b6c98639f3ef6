"""Random numbers that depend on a seed and a position alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio, odd
GAMMA = int(GOLDEN_GAMMA)
MASK = 2**64 - 1


def uniforms(seeds: Sequence[int], positions: Sequence[int]) -> NDArray[np.float64]:
    """One number in [0, 1) for each pair of a 64-bit seed and a position, with 53 random bits.

    SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014) read at
    any position at once: its state is a counter, so number `i` of a stream is `mix(start + (i + 1) * gamma)`.
    The seed is mixed before it becomes the start, so that close seeds do not share one stream at an offset.
    """
    seed_S = np.array([seed & MASK for seed in seeds], dtype=np.uint64)
    position_S = np.array(positions, dtype=np.uint64)
    bits_S = mix(mix(seed_S + GOLDEN_GAMMA) + (position_S + np.uint64(1)) * GOLDEN_GAMMA)
    return (bits_S >> np.uint64(11)).astype(np.float64) * 2.0**-53


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser (Stafford's variant 13 of MurmurHash3's): every input bit moves every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def uniform(seed: int, position: int) -> float:
    """`uniforms` of one pair; for a few of them this is faster than NumPy's calls."""
    start = mix_one((seed & MASK) + GAMMA & MASK)
    return (mix_one(start + (position + 1) * GAMMA & MASK) >> 11) * 2.0**-53


def mix_one(value: int) -> int:
    """`mix` of one value below 2**64."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & MASK
    return value ^ value >> 31
