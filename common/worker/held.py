"""Which rooms a worker holds and how far they have come, for an owner that is new to them.

Kept by the front from what passes through it, in both directions and in order: the ranks are not asked.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from pdmesh.v1 import bootstrap_service_pb2 as pb
from pdmesh.v1 import types_pb2

# How long it is remembered that a room arrived or was given up: the owner that was told may have died of it.
REMEMBER_S = 15.0
PRUNE_INTERVAL_S = 5.0

Key = tuple[str, int, int]


@dataclass(slots=True)
class Held:
    """A room of this worker. `over_at` is set when nothing of it is held any more."""

    ticket: types_pb2.Ticket
    phase: pb.HeldPhase.ValueType = pb.HELD_PHASE_WAITING
    reservation: types_pb2.Reservation | None = None
    writer: types_pb2.Writer | None = None  # decode: who brings the pages
    ended: bool = False  # bootstrap said so
    reason: str = ""
    message: str = ""
    over_at: float | None = None


class HeldRooms:
    """The rooms of one worker; `prefill` tells its side. In the order in which they began."""

    def __init__(self, *, prefill: bool, now: Callable[[], float] = time.monotonic) -> None:
        self._prefill = prefill
        self._now = now
        self._rooms: dict[Key, Held] = {}
        self._tickets: dict[int, types_pb2.Ticket] = {}  # of sequences
        self._pruned_at = now()

    def __len__(self) -> int:
        return len(self._rooms)

    def started(self, sequence_id: int, ticket: types_pb2.Ticket, writer: types_pb2.Writer | None = None) -> None:
        """A router started the room's sequence. Its reservation may have been here before."""
        self._tickets[sequence_id] = ticket
        self._rooms.setdefault(key_of(ticket), Held(ticket)).writer = writer
        if self._now() - self._pruned_at > PRUNE_INTERVAL_S:
            self._prune()

    def ended(self, sequence_id: int) -> None:
        """The sequence got its last message, or was aborted."""
        ticket = self._tickets.pop(sequence_id, None)
        room = self._rooms.get(key_of(ticket)) if ticket else None
        if ticket is None or room is None or room.over_at is not None:
            return
        refused = room.phase == pb.HELD_PHASE_WAITING and not room.ended and not room.reason
        if refused or (self._prefill and not room.ended and not room.reason):
            del self._rooms[key_of(ticket)]

    def said(self, event: pb.WorkerEvent) -> None:
        """The rank said something about a room."""
        kind = event.WhichOneof("event")
        ticket = getattr(event, str(kind)).ticket
        room = self._rooms.get(key_of(ticket))
        if room is None:
            return
        match kind:
            case "reserved":
                room.reservation = event.reserved.reservation
                room.phase = pb.HELD_PHASE_QUARANTINED if room.ended else pb.HELD_PHASE_RESERVED
                room.over_at = None
            case "transferring":
                room.phase = pb.HELD_PHASE_RESERVED
            case "transferred":
                room.phase = pb.HELD_PHASE_ARRIVED
                room.over_at = self._now()
            case "failed":
                room.reason, room.message = event.failed.reason, event.failed.message
                if not self._prefill:
                    self._end(room)
            case "quiet":
                self._over(room)
            case "fenced":
                del self._rooms[key_of(ticket)]

    def told(self, event: pb.ControlEvent) -> None:
        """Bootstrap told the rank something about a room."""
        kind = event.WhichOneof("event")
        if kind == "reserved" and self._prefill:
            ticket = event.reserved.ticket
            self._rooms.setdefault(key_of(ticket), Held(ticket)).phase = pb.HELD_PHASE_RESERVED
        elif kind == "ended" and (room := self._rooms.get(key_of(event.ended.ticket))):
            room.ended = True
            if not self._prefill:
                self._end(room)
        elif kind == "released" and not event.released.when_gone:
            room = self._rooms.get(key_of(event.released.ticket))
            if room is not None and room.phase == pb.HELD_PHASE_QUARANTINED:
                del self._rooms[key_of(event.released.ticket)]

    def announce(self) -> list[pb.HeldRoom]:
        """All that is held, and what was over a moment ago."""
        self._prune()
        return [
            pb.HeldRoom(
                ticket=room.ticket,
                phase=room.phase,
                reservation=room.reservation,
                writer=room.writer,
                reason=room.reason,
                message=room.message,
            )
            for room in self._rooms.values()
            if not (room.ended and room.over_at is not None)
        ]

    def _end(self, room: Held) -> None:
        """Decode: the room failed. Pages that were granted wait for the writer."""
        if room.phase == pb.HELD_PHASE_RESERVED:
            room.phase = pb.HELD_PHASE_QUARANTINED
        elif room.phase == pb.HELD_PHASE_WAITING:
            self._over(room)

    def _over(self, room: Held) -> None:
        """Nothing is held any more; what is remembered says why, if it was this worker that gave up."""
        room.phase = pb.HELD_PHASE_OVER
        room.over_at = self._now()

    def _prune(self) -> None:
        self._pruned_at = self._now()
        limit = self._now() - REMEMBER_S
        for key in [key for key, room in self._rooms.items() if room.over_at is not None and room.over_at < limit]:
            del self._rooms[key]


def key_of(ticket: types_pb2.Ticket) -> Key:
    return ticket.room_id, ticket.attempt, ticket.epoch
