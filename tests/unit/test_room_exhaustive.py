"""Every event in every state of a room that any sequence of events can reach.

A room's times matter only by their order to its deadline, so each event is tried just before and just after it; the
states that remain are few, and all of them are visited.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import pytest

from common.errors.base import Reason
from common.mesh import room as machine
from common.mesh.room import Effect, Party, Room, State, Timeouts, Transition
from common.mesh.ticket import Ticket

pytestmark = pytest.mark.unit

TICKET = Ticket("r", 2, 7)
STALE = [Ticket("r", 1, 7), Ticket("r", 3, 7), Ticket("r", 2, 6), Ticket("r", 2, 8), Ticket("s", 2, 7)]
NEW = Room(TICKET, "q", 0, "p", "d", 0.0, 0.0, Timeouts(10, 20, 30), request_deadline=1e6)
TAKEN_OVER = replace(NEW, recovered=True)
BEFORE, AFTER = 1.0, 50.0  # all timeouts lie between
ENDS = (Effect.END_ROUTER, Effect.END_PREFILL, Effect.END_DECODE)


def events(ticket: Ticket = TICKET) -> Iterator[machine.Event]:
    yield machine.Reserved(ticket, "pages")
    yield machine.Reserved(ticket, "other pages")
    yield machine.Transferring(ticket)
    yield machine.Transferred(ticket)
    yield machine.RoomFailed(ticket, Reason.ENGINE_FAILED, "it broke")
    yield machine.Abort(ticket, Reason.ABORTED, "no longer wanted")
    yield machine.DeadlinePassed(ticket)
    yield machine.WorkerLost(ticket, Party.PREFILL, "", "writer")
    yield machine.WorkerLost(ticket, Party.DECODE)
    yield machine.Quiet(ticket)
    yield machine.Fenced(ticket)
    yield machine.Held(ticket, Party.PREFILL)
    yield machine.Held(ticket, Party.DECODE)


EVENTS = list(events())


def normal(room: Room) -> Room:
    """The same room with its times taken out."""
    return replace(room, changed_at=0.0)


@cache
def reachable() -> dict[Room, tuple[machine.Event, ...]]:
    """Every state of a room, with a shortest way to it."""
    found: dict[Room, tuple[machine.Event, ...]] = {NEW: (), TAKEN_OVER: ()}
    fresh = [NEW, TAKEN_OVER]
    while fresh:
        room = fresh.pop(0)
        for event, now in itertools.product(EVENTS, (BEFORE, AFTER)):
            after = normal(machine.next(room, event, now).room)
            if after not in found:
                found[after] = (*found[room], event)
                fresh.append(after)
    return found


def check(before: Room, event: machine.Event, transition: Transition) -> None:
    """What holds of any transition."""
    after, effects = transition.room, transition.effects
    if event.ticket != before.ticket:
        assert after is before
        assert not effects
        assert transition.refusal
        assert transition.refusal.reason is Reason.STALE_TICKET
        return
    if transition.refusal:
        assert after is before
    if after is not before:
        assert effects[-1] is Effect.PERSIST
    if before.state.terminal:
        assert (after.state, after.reason, after.message) == (before.state, before.reason, before.message)
        assert Effect.END_ROUTER not in effects
        assert Effect.PUSH_RESERVATION not in effects
    elif after.state.terminal:
        assert effects.count(Effect.END_ROUTER) == 1
    assert after.quarantined <= (after.state is State.FAILED)
    assert after.quarantined <= (after.reservation is not None or after.recovered)
    if after.quarantined:
        assert Effect.RELEASE not in effects, "released under a writer"
    if before.quarantined and not after.quarantined:
        assert isinstance(event, machine.Quiet | machine.Fenced)
    assert len(set(effects)) == len(effects)
    assert (Effect.FENCE in effects) <= after.prefill_lost


def test_every_event_in_every_reachable_state() -> None:
    rooms = reachable()
    assert {room.state for room in rooms} == set(State)
    for room, event, now in itertools.product(rooms, EVENTS, (BEFORE, AFTER)):
        transition = machine.next(room, event, now)
        check(room, event, transition)
        if not isinstance(event, machine.Held):
            again = machine.next(transition.room, event, now)
            assert again.room is transition.room, "a repeated event changed something"
            if not isinstance(event, machine.Reserved):  # one that comes too late is told so each time
                assert not again.effects


def test_a_stale_ticket_is_applied_in_no_state() -> None:
    for room, ticket, now in itertools.product(reachable(), STALE, (BEFORE, AFTER)):
        for event in events(ticket):
            check(room, event, machine.next(room, event, now))


def test_timers_alone_end_every_room() -> None:
    for room in reachable():
        ended = machine.next(room, machine.DeadlinePassed(TICKET), AFTER).room
        assert ended.state.terminal


def test_every_quarantine_ends() -> None:
    """By the writer's word; by decode's fence once the writer is lost; and when both are lost nobody is waited for."""
    quiet, fenced = machine.Quiet(TICKET), machine.Fenced(TICKET)
    prefill_lost = machine.WorkerLost(TICKET, Party.PREFILL, "", "writer")
    decode_lost = machine.WorkerLost(TICKET, Party.DECODE)
    for room in reachable():
        ended = machine.next(room, machine.DeadlinePassed(TICKET), AFTER).room
        by_word = machine.next(ended, quiet, AFTER)
        assert by_word.room.at_rest
        assert (Effect.RELEASE in by_word.effects) == ended.quarantined
        lost = machine.next(ended, prefill_lost, AFTER)
        if ended.quarantined and not ended.prefill_lost and not ended.decode_lost:
            assert Effect.FENCE in lost.effects, "decode must be told what to wait for"
        assert machine.next(lost.room, fenced, AFTER).room.at_rest
        assert machine.next(lost.room, decode_lost, AFTER).room.at_rest


@pytest.mark.parametrize("seed", range(4))
def test_random_walks_over_many_rooms(seed: int) -> None:
    """Events of many rooms, repeated, delayed and out of order, go to rooms that they are not meant for as well."""
    draw = random.Random(seed)
    tickets = [Ticket(f"r{number}", attempt, 7) for number in range(8) for attempt in (1, 2)]
    rooms = {ticket: replace(NEW, ticket=ticket) for ticket in tickets}
    late: list[machine.Event] = []
    now = 0.0
    for _ in range(30_000):
        if late and draw.random() < 0.3:
            event = draw.choice(late)  # once more
        else:
            event = replace(draw.choice(EVENTS), ticket=draw.choice(tickets))
            late = [*late[-63:], event]
        addressee = event.ticket if draw.random() < 0.8 else draw.choice(tickets)
        before = rooms[addressee]
        transition = machine.next(before, event, now)
        check(before, event, transition)
        rooms[addressee] = transition.room
        now += draw.choice((0.0, 0.01, 1.0))
        if before.state.terminal and draw.random() < 0.2:  # the next request
            rooms[addressee] = replace(NEW, ticket=addressee, opened_at=now, changed_at=now, request_deadline=now + 99)
