"""Workers' words that overtake the opening of their room: the order of the two streams must not matter."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from common.mesh.outbox import Outbox
from common.mesh.room import State, Timeouts
from common.mesh.shards import new_room_id
from common.mesh.ticket import Ticket
from common.mesh.wire import ticket_to
from pdmesh.v1 import bootstrap_service_pb2 as pb
from pdmesh.v1 import types_pb2 as types
from services.bootstrap import early
from services.bootstrap.early import HOLD_S, Early
from services.bootstrap.rooms import Rooms
from services.bootstrap.timeline import Journal
from services.bootstrap.timers import Timers
from services.bootstrap.workers import Workers

pytestmark = pytest.mark.unit

EPOCH, SHARD = 7, 3
NAMED = Ticket(new_room_id(EPOCH, "router.1", SHARD), 1, EPOCH)  # by the router
OPEN = pb.OpenRoom(request_id="q", attempt=1, prefill_worker_id="p", decode_worker_id="d", ticket=ticket_to(NAMED))
RESERVED = pb.RoomReserved(ticket=ticket_to(NAMED), reservation=types.Reservation(from_token=1))

Step = Callable[["Bootstrap"], None]


class Bootstrap:
    """The rooms of one owner of all shards, on a clock that is set; everybody's outbox can be read."""

    def __init__(self) -> None:
        self.time = 1000.0
        self.timers: Timers[tuple[str, str]] = Timers(lambda: self.time)
        self.router: Outbox[pb.MeshEvent] = Outbox()
        self.workers = Workers(
            lambda: self.time,
            self.timers,
            epoch=1,
            heartbeat_interval_s=1e6,
            heartbeat_max_failure=2,
            on_changed=lambda record, stored: None,
            on_gone=lambda worker_id: None,
            on_lost=lambda worker_id, message: None,
        )
        self.outboxes: dict[str, Outbox[pb.ControlEvent]] = {"p": Outbox(), "d": Outbox()}
        for name, role in (("p", types.WORKER_ROLE_PREFILL), ("d", types.WORKER_ROLE_DECODE)):
            self.workers.register(types.Worker(worker_id=name, role=role, address="a:1"), self.outboxes[name])
        self.rooms = Rooms(
            lambda: self.time,
            self.timers,
            shard_of=lambda request_id: SHARD,
            epoch_of=lambda shard: EPOCH,
            timeouts=Timeouts(),
            history=10,
            workers=self.workers,
            journal=Journal(lambda: self.time, self.workers.figures, self.workers.decode_figures, 10),
            persist=lambda room: None,
            forget=lambda room_id: None,
        )
        for outbox in self.outboxes.values():
            outbox._items.clear()

    def told(self, name: str) -> list[str]:
        """What was said to a worker about rooms, in order."""
        return [str(event.WhichOneof("event")) for event in self.outboxes[name]._items]

    def answers(self) -> list[str]:
        return [str(event.WhichOneof("event")) for event in self.router._items]

    def pass_time(self, seconds: float) -> None:
        self.time += seconds
        for kind, name in self.timers.due():
            if kind == "early":
                self.rooms.early.alarm()
            elif kind == "room":
                self.rooms.alarm(name)

    @property
    def state(self) -> State | None:
        entry = self.rooms.find(NAMED.room_id)
        return entry.room.state if entry else None


def opening(bootstrap: Bootstrap) -> None:
    bootstrap.rooms.open(bootstrap.router, OPEN)


def says(worker_id: str, event: pb.WorkerEvent) -> Step:
    return lambda bootstrap: bootstrap.rooms.worker_event(worker_id, event)


SUCCESS = (
    says("d", pb.WorkerEvent(reserved=RESERVED)),
    says("p", pb.WorkerEvent(transferring=pb.RoomTransferring(ticket=ticket_to(NAMED)))),
    says("d", pb.WorkerEvent(transferred=pb.RoomTransferred(ticket=ticket_to(NAMED)))),
)
FAILURE = (
    says("p", pb.WorkerEvent(failed=pb.RoomFailed(ticket=ticket_to(NAMED), reason="CONTEXT_TOO_LONG", message="no"))),
    says("p", pb.WorkerEvent(quiet=pb.RoomQuiet(ticket=ticket_to(NAMED)))),
)


def run(*steps: Step) -> Bootstrap:
    bootstrap = Bootstrap()
    for step in steps:
        step(bootstrap)
    return bootstrap


@pytest.mark.parametrize("words", [SUCCESS, FAILURE, (SUCCESS[0], *FAILURE)], ids=["success", "failure", "granted"])
async def test_an_opening_may_come_at_any_time(words: tuple[Step, ...]) -> None:
    in_order = run(opening, *words)
    assert in_order.state in (State.SUCCESS, State.FAILED)
    for place in range(1, len(words) + 1):
        late = run(*words[:place], opening, *words[place:])
        assert late.state is in_order.state
        assert (late.told("p"), late.told("d"), late.answers()) == (
            in_order.told("p"),
            in_order.told("d"),
            in_order.answers(),
        )
        assert not len(late.rooms.early)
        late.pass_time(2 * HOLD_S)
        assert late.state is in_order.state, "nothing is applied twice"


async def test_any_order_of_the_words_of_two_workers_ends_the_room() -> None:
    """Whatever overtakes what: the room is over, and a worker that granted pages is told what becomes of them."""
    for steps in itertools.permutations((opening, *SUCCESS, FAILURE[0])):
        bootstrap = run(*steps, FAILURE[1])
        assert bootstrap.state in (State.SUCCESS, State.FAILED)
        if bootstrap.state is State.FAILED:
            assert "released" in bootstrap.told("d")


async def test_a_room_that_nobody_opens() -> None:
    """Its router is gone. Decode hears that the room is over, and that nobody writes to the pages."""
    bootstrap = run(SUCCESS[0])
    assert bootstrap.told("d") == []
    bootstrap.pass_time(HOLD_S - 0.1)
    assert bootstrap.told("d") == []
    bootstrap.pass_time(0.2)
    assert bootstrap.told("d") == ["refused", "ended", "released"]
    opening(bootstrap)  # after all
    assert bootstrap.state is State.BOOTSTRAPPING
    assert bootstrap.answers() == []
    says("d", pb.WorkerEvent(failed=pb.RoomFailed(ticket=ticket_to(NAMED), reason="ABORTED")))(bootstrap)
    assert bootstrap.state is State.FAILED


@pytest.mark.parametrize("epoch", [EPOCH - 1, EPOCH + 1])
async def test_only_rooms_of_the_present_epoch_are_waited_for(epoch: int) -> None:
    other = Ticket(new_room_id(epoch, "router.1", SHARD), 1, epoch)
    bootstrap = run(says("d", pb.WorkerEvent(reserved=pb.RoomReserved(ticket=ticket_to(other)))))
    assert not len(bootstrap.rooms.early)
    assert bootstrap.told("d") == ["refused", "ended", "released"]


async def test_a_named_room_is_opened_once() -> None:
    bootstrap = run(opening, opening)
    assert bootstrap.answers() == []
    other = pb.OpenRoom()
    other.CopyFrom(OPEN)
    other.ticket.room_id = new_room_id(EPOCH, "router.2", SHARD)
    bootstrap.rooms.open(bootstrap.router, other)  # the same attempt under another name
    other.CopyFrom(OPEN)
    other.request_id = "r"
    bootstrap.rooms.open(bootstrap.router, other)  # another request under the same name
    later = pb.OpenRoom()
    later.CopyFrom(OPEN)
    later.attempt = later.ticket.attempt = 2
    later.ticket.room_id, later.ticket.epoch = new_room_id(EPOCH + 1, "router.3", SHARD), EPOCH + 1
    bootstrap.rooms.open(bootstrap.router, later)  # by a later owner
    reasons = [event.open_refused.reason for event in bootstrap.router._items]
    assert reasons == ["WRONG_STATE", "WRONG_STATE", "STALE_TICKET"]


async def test_a_room_from_an_earlier_epoch_may_have_been_written_to() -> None:
    old = Ticket(new_room_id(EPOCH - 1, "router.1", SHARD), 1, EPOCH - 1)
    bootstrap = Bootstrap()
    adopted = pb.OpenRoom()
    adopted.CopyFrom(OPEN)
    adopted.ticket.CopyFrom(ticket_to(old))
    for wanted, recovered in ((OPEN, False), (adopted, True)):
        again = pb.OpenRoom()
        again.CopyFrom(wanted)
        again.request_id = f"of {wanted.ticket.epoch}"
        bootstrap.rooms.open(bootstrap.router, again)
        assert bootstrap.rooms.get(wanted.ticket.room_id).room.recovered is recovered


async def test_a_shard_that_leaves_takes_its_early_words_along() -> None:
    bootstrap = run(SUCCESS[0])
    bootstrap.rooms.drop(SHARD)
    assert not len(bootstrap.rooms.early)
    bootstrap.pass_time(2 * HOLD_S)
    assert bootstrap.told("d") == []


def test_the_oldest_room_goes_when_there_are_too_many_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(early, "MOST_EVENTS", 3)
    gone: list[str] = []
    kept = Early(lambda: 0.0, Timers(lambda: 0.0), lambda worker_id, event: gone.append(worker_id))
    first, second = Ticket("1-a-1", 1, 1), Ticket("1-b-1", 1, 1)
    for number, ticket in enumerate((first, first, second, second)):
        kept.hold(ticket, str(number), pb.WorkerEvent())
    assert gone == ["0", "1"]
    assert [worker_id for worker_id, _ in kept.take(second)] == ["2", "3"]
    assert (len(kept), kept.take(first)) == (0, [])
