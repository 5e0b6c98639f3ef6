"""One worker after the other."""

from __future__ import annotations

from collections.abc import Sequence

from services.router.policy.base import C
from services.router.request import GenerationRequest


class RoundRobin:
    """The next worker by name after the one chosen last, so that workers may come and go."""

    def __init__(self) -> None:
        self._last = ""

    def choose(self, workers: Sequence[C], request: GenerationRequest) -> C:
        later = [worker for worker in workers if worker.worker_id > self._last]
        chosen = min(later or workers, key=lambda worker: worker.worker_id)
        self._last = chosen.worker_id
        return chosen
