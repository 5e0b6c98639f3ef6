"""The less loaded of two random workers."""

from __future__ import annotations

import random
from collections.abc import Sequence

from services.router.policy.base import C, Candidate
from services.router.request import GenerationRequest


class LeastLoaded:
    """Power of two choices (Mitzenmacher 2001): looks at two random workers and takes the less loaded one.

    With loads that are a heartbeat old, taking the least loaded of all would send everything to one worker
    until its next heartbeat. `seed` makes the choices repeatable.
    """

    def __init__(self, seed: int | None = None) -> None:
        self._random = random.Random(seed)

    def choose(self, workers: Sequence[C], request: GenerationRequest) -> C:
        if len(workers) == 1:
            return workers[0]
        return min(self._random.sample(workers, 2), key=load)


def load(worker: Candidate) -> float:
    """Share of a worker's slots that is taken or waited for.

    What this router sent is known exactly, what others sent as of the last heartbeat: the larger counts.
    """
    told = worker.record.load.running + worker.record.load.waiting
    return max(worker.in_flight, told) / max(1, worker.record.max_running_requests)
