"""The room's state machine: its table."""

from __future__ import annotations

from dataclasses import replace

import pytest

from common.errors.base import Reason
from common.mesh import room as machine
from common.mesh.room import Effect, Party, Room, State, Timeouts
from common.mesh.ticket import Ticket

pytestmark = pytest.mark.unit

TICKET = Ticket("r", 1, 7)
NEW = Room(TICKET, "q", 0, "p", "d", 0.0, 0.0, Timeouts(10, 20, 30), request_deadline=100.0)
RESERVED = machine.Reserved(TICKET, "pages")
TRANSFERRING = machine.Transferring(TICKET)
TRANSFERRED = machine.Transferred(TICKET)
FAILED = machine.RoomFailed(TICKET, "ENGINE_FAILED", "it broke")
ABORT = machine.Abort(TICKET, "ABORTED", "no longer wanted")
DEADLINE = machine.DeadlinePassed(TICKET)
PREFILL_LOST = machine.WorkerLost(TICKET, Party.PREFILL)
DECODE_LOST = machine.WorkerLost(TICKET, Party.DECODE)
QUIET = machine.Quiet(TICKET)
FENCED = machine.Fenced(TICKET)
HELD_BY_PREFILL = machine.Held(TICKET, Party.PREFILL)
HELD_BY_DECODE = machine.Held(TICKET, Party.DECODE)

END_ALL = (Effect.END_PREFILL, Effect.END_DECODE, Effect.END_ROUTER, Effect.PERSIST)
END_AND_FENCE = (Effect.END_DECODE, Effect.FENCE, Effect.END_ROUTER, Effect.PERSIST)
END_AND_RELEASE = (Effect.END_PREFILL, Effect.END_DECODE, Effect.RELEASE, Effect.END_ROUTER, Effect.PERSIST)


def after(*events: machine.Event, now: float = 1.0) -> Room:
    room = NEW
    for event in events:
        room = machine.next(room, event, now).room
    return room


ROOMS = {
    "bootstrapping": NEW,
    "waiting": after(RESERVED),
    "transferring": after(RESERVED, TRANSFERRING),
    "success": after(RESERVED, TRANSFERRING, TRANSFERRED),
    "failed early": after(ABORT),
    "quarantined": after(RESERVED, ABORT),
    "failed, quiet": after(RESERVED, ABORT, QUIET),
    "writer lost": after(RESERVED, PREFILL_LOST),
    "both lost": after(RESERVED, PREFILL_LOST, DECODE_LOST),
}

# room, event, next state, effects, refused
TABLE: list[tuple[str, machine.Event, State, tuple[Effect, ...], bool]] = [
    ("bootstrapping", RESERVED, State.WAITING_FOR_INPUT, (Effect.PUSH_RESERVATION, Effect.PERSIST), False),
    ("bootstrapping", TRANSFERRING, State.BOOTSTRAPPING, (), True),
    ("bootstrapping", TRANSFERRED, State.BOOTSTRAPPING, (), True),
    ("bootstrapping", FAILED, State.FAILED, END_AND_RELEASE, False),
    ("bootstrapping", ABORT, State.FAILED, END_AND_RELEASE, False),
    ("bootstrapping", DEADLINE, State.BOOTSTRAPPING, (), True),  # not due yet
    ("bootstrapping", QUIET, State.BOOTSTRAPPING, (), True),
    ("bootstrapping", PREFILL_LOST, State.FAILED, END_AND_RELEASE[1:], False),
    ("bootstrapping", DECODE_LOST, State.FAILED, (Effect.END_PREFILL, Effect.END_ROUTER, Effect.PERSIST), False),
    ("waiting", RESERVED, State.WAITING_FOR_INPUT, (), False),
    ("waiting", TRANSFERRING, State.TRANSFERRING, (Effect.PERSIST,), False),
    ("waiting", TRANSFERRED, State.SUCCESS, (Effect.END_ROUTER, Effect.PERSIST), False),
    ("waiting", ABORT, State.FAILED, END_ALL, False),
    ("waiting", PREFILL_LOST, State.FAILED, END_AND_FENCE, False),
    ("waiting", DECODE_LOST, State.FAILED, (Effect.END_PREFILL, Effect.END_ROUTER, Effect.PERSIST), False),
    ("waiting", QUIET, State.WAITING_FOR_INPUT, (), True),
    ("transferring", RESERVED, State.TRANSFERRING, (), False),
    ("transferring", TRANSFERRING, State.TRANSFERRING, (), False),
    ("transferring", TRANSFERRED, State.SUCCESS, (Effect.END_ROUTER, Effect.PERSIST), False),
    ("transferring", FAILED, State.FAILED, END_ALL, False),
    ("success", RESERVED, State.SUCCESS, (), False),
    ("success", TRANSFERRING, State.SUCCESS, (), False),  # overtaken by decode's word
    ("success", TRANSFERRED, State.SUCCESS, (), False),
    ("success", ABORT, State.SUCCESS, (), True),
    ("success", FAILED, State.SUCCESS, (), True),
    ("success", PREFILL_LOST, State.SUCCESS, (), False),
    ("success", DECODE_LOST, State.SUCCESS, (), False),
    ("success", QUIET, State.SUCCESS, (), False),
    ("failed early", RESERVED, State.FAILED, (Effect.END_DECODE, Effect.RELEASE), True),
    ("failed early", TRANSFERRED, State.FAILED, (), True),
    ("failed early", ABORT, State.FAILED, (), False),
    ("failed early", QUIET, State.FAILED, (), False),
    ("failed early", PREFILL_LOST, State.FAILED, (), False),
    ("quarantined", RESERVED, State.FAILED, (Effect.END_DECODE,), True),  # prefill may still write there
    ("writer lost", RESERVED, State.FAILED, (Effect.END_DECODE, Effect.FENCE), True),
    ("waiting", HELD_BY_PREFILL, State.WAITING_FOR_INPUT, (Effect.PUSH_RESERVATION,), False),
    ("bootstrapping", HELD_BY_PREFILL, State.BOOTSTRAPPING, (), False),
    ("quarantined", HELD_BY_PREFILL, State.FAILED, (Effect.END_PREFILL,), False),
    ("writer lost", HELD_BY_PREFILL, State.FAILED, (Effect.END_PREFILL, Effect.PERSIST), False),
    ("waiting", HELD_BY_DECODE, State.WAITING_FOR_INPUT, (), False),
    ("success", HELD_BY_DECODE, State.SUCCESS, (), False),
    ("quarantined", HELD_BY_DECODE, State.FAILED, (Effect.END_DECODE,), False),
    ("writer lost", HELD_BY_DECODE, State.FAILED, (Effect.END_DECODE, Effect.FENCE), False),
    ("both lost", HELD_BY_DECODE, State.FAILED, (Effect.END_DECODE, Effect.FENCE, Effect.PERSIST), False),
    ("failed early", HELD_BY_DECODE, State.FAILED, (Effect.END_DECODE, Effect.RELEASE), False),
    ("quarantined", TRANSFERRING, State.FAILED, (), True),
    ("quarantined", TRANSFERRED, State.FAILED, (), True),
    ("quarantined", FAILED, State.FAILED, (), False),
    ("quarantined", QUIET, State.FAILED, (Effect.RELEASE, Effect.PERSIST), False),
    ("quarantined", PREFILL_LOST, State.FAILED, (Effect.FENCE, Effect.PERSIST), False),
    ("quarantined", DECODE_LOST, State.FAILED, (Effect.PERSIST,), False),
    ("quarantined", FENCED, State.FAILED, (Effect.PERSIST,), False),
    ("writer lost", PREFILL_LOST, State.FAILED, (), False),
    ("writer lost", QUIET, State.FAILED, (Effect.RELEASE, Effect.PERSIST), False),  # it came back
    ("writer lost", FENCED, State.FAILED, (Effect.PERSIST,), False),
    ("writer lost", DECODE_LOST, State.FAILED, (Effect.PERSIST,), False),
    ("both lost", QUIET, State.FAILED, (Effect.RELEASE, Effect.PERSIST), False),
    ("both lost", DECODE_LOST, State.FAILED, (), False),
    ("waiting", FENCED, State.WAITING_FOR_INPUT, (), True),
    ("failed, quiet", FENCED, State.FAILED, (), False),
    ("failed, quiet", QUIET, State.FAILED, (), False),
    ("failed, quiet", RESERVED, State.FAILED, (Effect.END_DECODE, Effect.RELEASE), True),
]


@pytest.mark.parametrize(("name", "event", "state", "effects", "refused"), TABLE)
def test_table(name: str, event: machine.Event, state: State, effects: tuple[Effect, ...], refused: bool) -> None:
    transition = machine.next(ROOMS[name], event, 2.0)
    assert (transition.room.state, transition.effects) == (state, effects)
    assert (transition.refusal is not None) is refused
    if refused:
        assert transition.refusal
        assert transition.refusal.reason is Reason.WRONG_STATE
        assert transition.room is ROOMS[name]


@pytest.mark.parametrize("name", ROOMS)
@pytest.mark.parametrize("ticket", [Ticket("r", 1, 6), Ticket("r", 2, 7), Ticket("s", 1, 7)])
def test_a_stale_ticket_is_refused_in_every_state(name: str, ticket: Ticket) -> None:
    for event in (RESERVED, TRANSFERRING, TRANSFERRED, FAILED, ABORT, DEADLINE, PREFILL_LOST, QUIET):
        transition = machine.next(ROOMS[name], replace(event, ticket=ticket), 1e9)
        assert transition.room is ROOMS[name]
        assert not transition.effects
        assert transition.refusal
        assert transition.refusal.reason is Reason.STALE_TICKET


@pytest.mark.parametrize(
    ("name", "at", "reason"),
    [
        ("bootstrapping", 10.0, Reason.BOOTSTRAP_TIMEOUT),
        ("waiting", 21.0, Reason.WAITING_TIMEOUT),
        ("transferring", 31.0, Reason.TRANSFER_TIMEOUT),
    ],
)
def test_each_state_has_its_deadline(name: str, at: float, reason: Reason) -> None:
    assert machine.next(ROOMS[name], DEADLINE, at - 0.001).refusal
    expired = machine.next(ROOMS[name], DEADLINE, at).room
    assert (expired.state, expired.reason) == (State.FAILED, reason)


def test_the_requests_own_deadline_counts_where_it_is_earlier() -> None:
    room = replace(NEW, request_deadline=3.0)
    assert room.deadline
    assert room.deadline.at == 3.0
    assert machine.next(room, DEADLINE, 3.0).room.reason == Reason.DEADLINE_EXCEEDED
    assert ROOMS["success"].deadline is None


def test_another_reservation_for_the_same_room_is_refused() -> None:
    transition = machine.next(ROOMS["waiting"], machine.Reserved(TICKET, "other pages"), 2.0)
    assert transition.refusal
    assert transition.room.reservation == "pages"
    assert Effect.RELEASE not in transition.effects
