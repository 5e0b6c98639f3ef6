"""Timelines are bounded, count what repeats, and are cheap; watchers hear what they asked for."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from common.errors.base import Reason
from common.mesh import room as machine
from common.mesh.room import Refusal, Room, State
from common.mesh.ticket import Ticket
from pdmesh.v1 import bootstrap_service_pb2 as pb
from pdmesh.v1 import types_pb2 as types
from services.bootstrap import timeline, wire
from services.bootstrap.timeline import MAX_REFUSALS, Figures, Journal, Timeline

pytestmark = pytest.mark.unit

TICKET = Ticket("r", 1, 7)


@dataclass
class Entry:
    room: Room = field(default_factory=lambda: opened())
    timeline: Timeline = field(default_factory=Timeline)


def opened(request_id: str = "q") -> Room:
    return Room(TICKET, request_id, 0, "prefill-0", "decode-0", opened_at=100.0, changed_at=100.0)


class Mesh:
    """A journal with a clock and figures that a test sets."""

    def __init__(self, history: int = 10) -> None:
        self.time = 100.0
        self.workers: dict[str, Figures] = {}
        self.journal = Journal(lambda: self.time, self.workers.get, lambda: tuple(self.workers.items()), history)

    def told(self, worker_id: str, state: types.WorkerState.ValueType = types.WORKER_STATE_READY, **load: int) -> None:
        """A heartbeat; ledger states are given by name, the rest is the load's."""
        pages = {name: load.pop(name) for name in list(load) if name in types.Ledger.DESCRIPTOR.fields_by_name}
        message = types.WorkerLoad(**load, ledger=types.Ledger(**pages))  # type: ignore[arg-type]
        self.workers[worker_id] = Figures(state, message, self.time)

    def apply(self, entry: Entry, event: machine.Event, by: str) -> None:
        before = entry.room
        transition = machine.next(before, event, self.time)
        entry.room = transition.room
        self.journal.applied(entry, event, by, before, transition.refusal)


def test_every_transition_has_its_time_its_cause_and_the_load_of_that_moment() -> None:
    mesh, entry = Mesh(), Entry()
    mesh.journal.note(entry, timeline.OPENED, timeline.ROUTER)
    mesh.told("decode-0", running=3, free=10)
    mesh.time = 101.0
    mesh.apply(entry, machine.Reserved(TICKET, "pages"), "decode-0")
    mesh.told("decode-0", running=4, free=8)
    mesh.time = 102.0
    mesh.apply(entry, machine.Abort(TICKET, Reason.ABORTED, "no longer wanted"), timeline.OPERATOR)
    first, second, third = entry.timeline.moments
    assert (first.event, first.by, first.decode) == ("Opened", "router", None)
    assert (second.at, second.by, second.state) == (101.0, "decode-0", State.WAITING_FOR_INPUT)
    assert second.decode is not None
    assert second.decode.load.running == 3
    assert (third.by, third.reason, third.message) == ("operator", Reason.ABORTED, "no longer wanted")
    assert third.decode is not None
    assert third.decode.load.ledger.free == 8


def test_how_the_pages_travelled_is_kept_with_the_moment_that_told_it() -> None:
    mesh, entry = Mesh(), Entry()
    mesh.apply(entry, machine.Reserved(TICKET, "pages"), "decode-0")
    assert entry.timeline.transfer is None
    told = types.TransferStats(backend="local", bytes=4096)
    mesh.apply(entry, machine.Transferred(TICKET, told), "decode-0")
    reserved, transferred = entry.timeline.moments
    assert (reserved.transfer, transferred.transfer) == (None, told)
    assert entry.timeline.transfer == told
    assert wire.moment_to(transferred).transfer == told
    assert not wire.moment_to(reserved).HasField("transfer")


def test_repeats_leave_no_trace_and_refusals_are_counted() -> None:
    mesh, entry = Mesh(), Entry()
    mesh.apply(entry, machine.Reserved(TICKET, "pages"), "decode-0")
    mesh.apply(entry, machine.Reserved(TICKET, "pages"), "decode-0")
    assert len(entry.timeline.moments) == 1
    for _ in range(5):
        mesh.apply(entry, machine.Transferred(Ticket("r", 1, 6)), "decode-0")
    _, refused = entry.timeline.moments
    assert refused.refusal is not None
    assert (refused.refusal.reason, refused.times) == (Reason.STALE_TICKET, 5)
    assert wire.moment_to(refused).count == 5


def test_a_flood_of_refusals_is_bounded_and_transitions_are_kept() -> None:
    mesh, entry = Mesh(), Entry()
    for n in range(MAX_REFUSALS + 7):
        mesh.journal.applied(
            entry, machine.Transferred(TICKET), "decode-0", entry.room, Refusal(Reason.WRONG_STATE, str(n))
        )
    mesh.apply(entry, machine.Abort(TICKET, Reason.ABORTED, "enough"), timeline.ROUTER)
    assert len(entry.timeline.moments) == MAX_REFUSALS + 1
    assert entry.timeline.dropped == 7
    assert wire.timeline_to(entry.timeline).moments[-1].state == types.ROOM_STATE_FAILED


async def test_watchers_hear_what_they_asked_for_and_may_leave() -> None:
    mesh = Mesh()
    everything = mesh.journal.watch(pb.WatchRoomsRequest())
    failures = mesh.journal.watch(pb.WatchRoomsRequest(state=types.ROOM_STATE_FAILED, worker_id="decode-0"))
    others = mesh.journal.watch(pb.WatchRoomsRequest(request_id="another"))
    entry = Entry()
    mesh.journal.note(entry, timeline.OPENED, timeline.ROUTER)
    mesh.apply(entry, machine.Abort(TICKET, Reason.ABORTED, "enough"), timeline.ROUTER)
    assert [len(watcher) for watcher in (everything, failures, others)] == [2, 1, 0]
    mesh.journal.unwatch(everything)
    mesh.journal.note(entry, timeline.CLOSED, timeline.ROUTER)
    assert len(everything) == 2
    room, moment = (await anext(failures.batches()))[0]
    assert (room.state, moment.event) == (State.FAILED, "Abort")


def test_what_is_remembered_of_requests_and_workers_is_bounded() -> None:
    mesh = Mesh(history=3)
    for n in range(5):
        mesh.journal.refused(pb.OpenRoom(request_id=f"q{n}"), Reason.NO_WORKER, "nobody is there")
        mesh.journal.request_failed(pb.RequestFailed(request_id=f"q{n}", reason="OVERLOADED", message="full"))
        mesh.journal.worker_lost(f"w{n}", "gone")
    assert [bool(mesh.journal.refusals_of(f"q{n}")) for n in range(5)] == [False, False, True, True, True]
    assert mesh.journal.failure_of("q1") is None
    assert mesh.journal.loss_of("w1", 0, 1000) is None
    assert mesh.journal.loss_of("w4", 0, 1000)
    assert mesh.journal.loss_of("w4", 101, 1000) is None
