"""What workers say of rooms whose opening is still on its way here.

A router names a room by itself and starts both its legs at once, so that a worker's word of the room may overtake the
router's. Such words wait here, in front of the state machine, which never sees an event of a room that is not open:
until the room is opened, or for `HOLD_S`. Then the router is gone, and they are answered like those of any room that
nobody knows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from common.mesh.shards import shard_of_room
from common.mesh.ticket import Ticket
from pdmesh.v1 import bootstrap_service_pb2 as pb
from services.bootstrap import metrics
from services.bootstrap.timers import Timers

HOLD_S = 5.0
MOST_EVENTS = 10_000  # of all rooms; beyond that the oldest room's go
ALARM = ("early", "")

Word = tuple[str, pb.WorkerEvent]  # a worker, and what it said


@dataclass
class Waiting:
    """The words of one room, in order."""

    until: float
    words: list[Word] = field(default_factory=list)


class Early:
    """Keeps early words; `unknown` is told those whose room was not opened in time."""

    def __init__(
        self, now: Callable[[], float], timers: Timers[tuple[str, str]], unknown: Callable[[str, pb.WorkerEvent], None]
    ) -> None:
        self._now, self._timers, self._unknown = now, timers, unknown
        self._rooms: dict[Ticket, Waiting] = {}  # the oldest first
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def hold(self, ticket: Ticket, worker_id: str, event: pb.WorkerEvent) -> None:
        """Keep what a worker says of a room that is not open yet."""
        waiting = self._rooms.get(ticket)
        if waiting is None:
            waiting = self._rooms[ticket] = Waiting(self._now() + HOLD_S)
            if len(self._rooms) == 1:
                self._timers.set(ALARM, waiting.until)
        waiting.words.append((worker_id, event))
        self._count += 1
        metrics.EVENTS_EARLY.inc()
        while self._count > MOST_EVENTS:
            self._let_go(next(iter(self._rooms)))

    def take(self, ticket: Ticket) -> list[Word]:
        """The words of a room that is open now."""
        waiting = self._rooms.pop(ticket, None)
        if waiting is None:
            return []
        self._count -= len(waiting.words)
        return waiting.words

    def drop(self, shard: int) -> None:
        """Forget a shard that is another's now: workers tell its owner what they hold."""
        for ticket in [ticket for ticket in self._rooms if shard_of_room(ticket.room_id) == shard]:
            self.take(ticket)

    def alarm(self) -> None:
        """The oldest room has waited long enough."""
        while self._rooms:
            ticket, waiting = next(iter(self._rooms.items()))
            if waiting.until > self._now():
                self._timers.set(ALARM, waiting.until)
                return
            self._let_go(ticket)

    def _let_go(self, ticket: Ticket) -> None:
        for worker_id, event in self.take(ticket):
            metrics.EVENTS_EARLY_DROPPED.inc()
            self._unknown(worker_id, event)
