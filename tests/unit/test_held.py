"""What a worker's front remembers of rooms, from what passes through it."""

from __future__ import annotations

import pytest

from common.worker.held import REMEMBER_S, HeldRooms
from pdmesh.v1 import bootstrap_service_pb2 as pb
from pdmesh.v1 import types_pb2 as types

pytestmark = pytest.mark.unit


class Side:
    """One worker's table, with a clock that the test turns."""

    def __init__(self, *, prefill: bool) -> None:
        self.time = 0.0
        self.held = HeldRooms(prefill=prefill, now=lambda: self.time)

    def said(self, room: str, **event: object) -> None:
        [(kind, message)] = event.items()
        message.ticket.CopyFrom(ticket(room))  # type: ignore[attr-defined]
        self.held.said(pb.WorkerEvent(**{kind: message}))  # type: ignore[arg-type]

    def told(self, room: str, **event: object) -> None:
        [(kind, message)] = event.items()
        message.ticket.CopyFrom(ticket(room))  # type: ignore[attr-defined]
        self.held.told(pb.ControlEvent(**{kind: message}))  # type: ignore[arg-type]

    def phases(self) -> dict[str, str]:
        names = pb.HeldPhase.Name
        return {room.ticket.room_id: names(room.phase).removeprefix("HELD_PHASE_") for room in self.held.announce()}


def ticket(room: str) -> types.Ticket:
    return types.Ticket(room_id=room, attempt=1, epoch=1)


RESERVATION = types.Reservation(from_token=3)


def test_decode_from_start_to_arrival() -> None:
    side = Side(prefill=False)
    side.held.started(1, ticket("a"))
    assert side.phases() == {"a": "WAITING"}
    side.said("a", reserved=pb.RoomReserved(reservation=RESERVATION))
    assert side.phases() == {"a": "RESERVED"}
    assert side.held.announce()[0].reservation == RESERVATION
    side.said("a", transferred=pb.RoomTransferred())
    side.held.ended(1)
    assert side.phases() == {"a": "ARRIVED"}, "the owner may have died of the news"
    side.time = REMEMBER_S + 1
    assert side.phases() == {}
    assert len(side.held) == 0


def test_decode_tells_who_writes() -> None:
    side = Side(prefill=False)
    writer = types.Writer(worker_id="p", epoch=7, endpoints=[types.RankEndpoint(descriptor=b"its process")])
    side.held.started(1, ticket("a"), writer)
    side.held.started(2, ticket("b"))
    told = {room.ticket.room_id: room for room in side.held.announce()}
    assert told["a"].writer == writer
    assert not told["b"].HasField("writer")


def test_decode_keeps_what_is_quarantined_until_it_is_released() -> None:
    side = Side(prefill=False)
    for number, room in enumerate(("own", "told", "crossing", "waiting")):
        side.held.started(number, ticket(room))
    for room in ("own", "told"):
        side.said(room, reserved=pb.RoomReserved())
    side.said("own", failed=pb.RoomFailed(reason="ABORTED"))
    for room in ("told", "crossing", "waiting"):
        side.told(room, ended=pb.RoomEnded())
    side.said("crossing", reserved=pb.RoomReserved())  # granted before the rank heard of the end
    side.time = 10 * REMEMBER_S
    assert side.phases() == dict.fromkeys(("own", "told", "crossing"), "QUARANTINED")
    assert side.held.announce()[0].reason == "ABORTED"
    side.told("told", released=pb.RoomReleased(when_gone=[types.RankEndpoint()]))
    assert "told" in side.phases(), "a lost writer is yet to be fenced off"
    side.said("told", fenced=pb.RoomFenced())
    side.told("own", released=pb.RoomReleased())
    side.told("crossing", released=pb.RoomReleased())
    assert side.phases() == {}


def test_a_sequence_that_was_refused_leaves_nothing() -> None:
    for prefill in (False, True):
        side = Side(prefill=prefill)
        side.held.started(1, ticket("a"))
        side.held.ended(1)
        assert side.phases() == {}


def test_prefill_may_write_from_the_reservation_on_until_it_is_done() -> None:
    side = Side(prefill=True)
    side.told("early", reserved=pb.RoomReserved())
    side.held.started(1, ticket("early"))
    side.held.started(2, ticket("late"))
    assert side.phases() == {"early": "RESERVED", "late": "WAITING"}
    side.told("late", reserved=pb.RoomReserved())
    side.said("early", transferring=pb.RoomTransferring())
    side.held.ended(1)  # all is written
    assert side.phases() == {"late": "RESERVED"}


def test_prefill_holds_a_failed_room_until_it_is_quiet() -> None:
    side = Side(prefill=True)
    for number, room in enumerate(("gave up", "told")):
        side.held.started(number, ticket(room))
        side.told(room, reserved=pb.RoomReserved())
    side.said("gave up", failed=pb.RoomFailed(reason="TRANSFER_FAILED", message="cable"))
    side.told("told", ended=pb.RoomEnded())
    for number in range(2):
        side.held.ended(number)
    assert side.phases() == dict.fromkeys(("gave up", "told"), "RESERVED")
    for room in ("gave up", "told"):
        side.said(room, quiet=pb.RoomQuiet())
    assert side.phases() == {"gave up": "OVER"}, "an owner that has not heard why is told"
