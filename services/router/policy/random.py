"""Any worker, all alike."""

from __future__ import annotations

import random
from collections.abc import Sequence

from services.router.policy.base import C
from services.router.request import GenerationRequest


class Random:
    """Uniform choice. `seed` makes the choices repeatable."""

    def __init__(self, seed: int | None = None) -> None:
        self._random = random.Random(seed)

    def choose(self, workers: Sequence[C], request: GenerationRequest) -> C:
        return self._random.choice(workers)
