"""What a room's transfers took, and how much of it was hidden behind the prompt's compute."""

from __future__ import annotations

import pytest

from common.mesh.transfer_stats import TransferStats
from common.transfer.base import Completion, Handle, HandleState
from common.transfer.meter import Meter

pytestmark = pytest.mark.unit

DONE, FAILED = HandleState.DONE, HandleState.FAILED


class Clock:
    """A meter whose time a test sets."""

    def __init__(self) -> None:
        self.now = 0.0
        self.meter = Meter(lambda: self.now)

    def submit(self, at: float, handle: int) -> None:
        self.now = at
        self.meter.submitted(Handle(handle))

    def computed(self, at: float) -> None:
        self.now = at
        self.meter.computed()

    def ended(self, handle: int, seconds: float, queued_s: float = 0.0, state: HandleState = DONE) -> None:
        self.meter.ended(Completion(Handle(handle), state, "", seconds, queued_s, nbytes=100, descriptors=2))

    def stats(self) -> TransferStats:
        return self.meter.stats("local")


def test_chunks_that_go_while_the_next_is_computed_are_hidden() -> None:
    clock = Clock()
    clock.submit(10, 1)
    clock.ended(1, 1.5, queued_s=0.5)  # from 10.5 to 11.5
    clock.submit(12, 2)
    clock.computed(13)
    clock.submit(13, 3)
    clock.ended(2, 2)  # from 12 to 14, half of it hidden; taken in late
    clock.ended(3, 1.25, queued_s=1)  # from 14 to 14.25
    assert clock.stats() == TransferStats("local", 300, 6, seconds=3.25, queued_s=1.5, hidden_s=2.0, exposed_s=1.25)
    assert clock.stats().bytes_per_s == 300 / 3.25


def test_what_is_written_at_the_same_time_counts_once() -> None:
    clock = Clock()
    clock.submit(10, 1)
    clock.submit(10, 2)
    clock.ended(2, 3)
    clock.ended(1, 2)
    clock.computed(11)
    assert clock.stats() == TransferStats("local", 200, 4, seconds=3.0, hidden_s=1.0, exposed_s=2.0)


def test_what_arrived_before_the_prompt_ended_cost_nothing() -> None:
    clock = Clock()
    clock.submit(10, 1)
    clock.ended(1, 2)
    clock.computed(20)
    assert clock.stats() == TransferStats("local", 100, 2, seconds=2.0, hidden_s=2.0, exposed_s=0.0)


def test_a_failed_write_takes_time_and_brings_nothing() -> None:
    clock = Clock()
    clock.submit(10, 1)
    clock.ended(1, 2, state=FAILED)
    clock.ended(7, 2)  # of nobody
    assert clock.stats() == TransferStats("local", 0, 0, seconds=2.0, hidden_s=2.0)
    assert clock.stats().bytes_per_s == 0


def test_nothing_was_sent() -> None:
    clock = Clock()
    clock.computed(10)
    assert clock.stats() == TransferStats("local")
