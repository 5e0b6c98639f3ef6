"""Counts what one room's transfers take, and how much of it passes while the prompt is still being computed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from common.mesh.transfer_stats import TransferStats
from common.transfer.base import Completion, Handle, HandleState


class Meter:
    """Told by the hand-over of each chunk's submission and end, and of the end of the prompt's compute.

    Completions may be taken in later than they came about, such as at the end of a step: their own times count.
    """

    __slots__ = ("_computed_at", "_descriptors", "_ended_at", "_nbytes", "_now", "_queued_s", "_submitted", "_writes")

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._submitted: dict[Handle, float] = {}
        self._writes: list[tuple[float, float]] = []  # when each began and ended
        self._computed_at = math.inf
        self._ended_at = 0.0
        self._nbytes = self._descriptors = 0
        self._queued_s = 0.0

    def submitted(self, handle: Handle) -> None:
        """A chunk's pages were handed to the backend."""
        self._submitted[handle] = self._now()

    def computed(self) -> None:
        """The last chunk of the prompt is computed."""
        self._computed_at = self._now()

    def ended(self, completion: Completion) -> None:
        """A chunk's transfer has ended, well or not."""
        submitted_at = self._submitted.pop(completion.handle, None)
        if submitted_at is None:
            return
        ended_at = submitted_at + completion.seconds
        self._writes.append((min(submitted_at + completion.queued_s, ended_at), ended_at))
        self._ended_at = max(self._ended_at, ended_at)
        self._queued_s += completion.queued_s
        if completion.state is HandleState.DONE:
            self._nbytes += completion.nbytes
            self._descriptors += completion.descriptors

    def stats(self, backend: str) -> TransferStats:
        """All so far."""
        seconds = hidden_s = until = 0.0
        for began, ended in sorted(self._writes):
            began = max(began, until)  # of writes at the same time the time counts once
            if ended > began:
                seconds += ended - began
                hidden_s += max(0.0, min(ended, self._computed_at) - began)
                until = ended
        exposed_s = max(0.0, self._ended_at - self._computed_at)
        return TransferStats(backend, self._nbytes, self._descriptors, seconds, self._queued_s, hidden_s, exposed_s)
