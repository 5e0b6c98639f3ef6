"""The race of pipeline-parallel workers, simulated over the pure function that the service runs.

Workers of many ranks, whose clocks differ by up to 10 s, hand rooms over while decode is saturated, messages are
late and timeouts fire. Every rank runs steps of a pipeline: what its step computes must be what the rank before it
computed, or the worker crashes. Ranks that follow bootstrap's events agree in every step. The control lets the
ranks decide timeouts by their own clocks: then one has given a room up that the next one still computes.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from common.errors.base import STATUS, Reason
from common.mesh import room as machine
from common.mesh.room import Effect, Party, Room, State, Timeouts
from common.mesh.ticket import Ticket

pytestmark = pytest.mark.unit

ROOMS = 40
SLOTS = 3
SKEW_S = 10.0
TIMEOUTS = Timeouts(bootstrap_s=6.0, waiting_s=4.0, transfer_s=4.0)
STEP_S = 0.5
SOFT = {Reason.BOOTSTRAP_TIMEOUT, Reason.WAITING_TIMEOUT, Reason.TRANSFER_TIMEOUT}


class Disagreement(Exception):
    """What a crash of a pipeline looks like: a rank was given a step that does not fit what it knows."""


@dataclass(eq=False)
class Rank:
    """One process of a worker. `rooms` are those it takes part in; `seen` is what it was told, in order."""

    skew_s: float
    rooms: dict[Ticket, Room] = field(default_factory=dict)
    seen: list[tuple[Ticket, str]] = field(default_factory=list)

    def take(self, news: tuple[Effect, Room]) -> None:
        effect, room = news
        if effect is Effect.PUSH_RESERVATION:
            self.rooms[room.ticket] = room
            self.seen.append((room.ticket, "reserved"))
        else:
            self.rooms.pop(room.ticket, None)
            self.seen.append((room.ticket, room.reason or room.state))

    def step(self, now: float, own_clock: bool) -> tuple[Ticket, ...]:
        """The rooms that this rank computes in its next step."""
        if own_clock:
            for ticket, room in list(self.rooms.items()):
                assert room.deadline
                if now + self.skew_s >= room.deadline.at:
                    del self.rooms[ticket]
                    self.seen.append((ticket, room.deadline.reason))
        return tuple(self.rooms)


@dataclass(eq=False)
class Worker:
    """A front and its ranks. Rank 0 plans each step; the news before it and the step itself travel as one."""

    ranks: list[Rank]
    inbox: deque[tuple[Effect, Room]] = field(default_factory=deque)

    def plan(self, sim: Simulation) -> None:
        """A step of rank 0, which sends what it knows and does down the pipeline."""
        news, self.inbox = list(self.inbox), deque()
        self.run(sim, 0, news, None)

    def run(
        self, sim: Simulation, index: int, news: list[tuple[Effect, Room]], plan: tuple[Ticket, ...] | None
    ) -> None:
        rank = self.ranks[index]
        for entry in news:
            rank.take(entry)
        step = rank.step(sim.now, sim.own_clocks)
        if plan is not None and step != plan:
            raise Disagreement(f"rank {index} would compute {step}, was given {plan}")
        if index + 1 < len(self.ranks):
            sim.in_order((self, index), lambda: self.run(sim, index + 1, news, step))


class Simulation:
    """Bootstrap, a prefill and a decode worker, and time. Streams keep their order and are late at will."""

    def __init__(self, seed: int, ranks: tuple[int, int], own_clocks: bool) -> None:
        self.draw = random.Random(seed)
        self.own_clocks = own_clocks
        self.now = 0.0
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._last_on: dict[object, float] = {}
        self.prefill, self.decode = (
            Worker([Rank(self.draw.uniform(-SKEW_S, SKEW_S)) for _ in range(count)]) for count in ranks
        )
        self.skew_s = self.draw.uniform(-SKEW_S, SKEW_S)  # bootstrap's clock is as wrong as any
        self.rooms: dict[Ticket, Room] = {}
        self.answers: dict[Ticket, Room] = {}
        self.free_slots = SLOTS
        self.waiting: deque[Ticket] = deque()

    def at(self, delay_s: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._agenda, (self.now + delay_s, next(self._order), act))

    def in_order(self, stream: object, act: Callable[[], None]) -> None:
        """After everything that was sent on this stream before, and up to 2 s later."""
        when = max(self.now + self.draw.choice((0.0, 0.01, 2.0)) * self.draw.random(), self._last_on.get(stream, 0.0))
        self._last_on[stream] = when
        self.at(when - self.now, act)

    def run(self) -> None:
        for number in range(ROOMS):
            self.at(self.draw.uniform(0, 20), lambda number=number: self.open(number))  # type: ignore[misc]
        for worker in (self.prefill, self.decode):
            for step in range(round(60 / STEP_S)):
                self.at(step * STEP_S, lambda worker=worker: worker.plan(self))  # type: ignore[misc]
        while self._agenda:
            self.now, _, act = heapq.heappop(self._agenda)
            act()

    # ------------------------------------------------------------------------------------ bootstrap

    def open(self, number: int) -> None:
        ticket = Ticket(f"r{number}", 1, 1)
        clock = self.now + self.skew_s
        self.rooms[ticket] = Room(ticket, f"q{number}", 0, "p", "d", clock, clock, TIMEOUTS)
        self.alarm(ticket)
        self.waiting.append(ticket)
        self.grant()

    def alarm(self, ticket: Ticket) -> None:
        if deadline := self.rooms[ticket].deadline:
            self.at(max(0.001, deadline.at - self.now - self.skew_s), lambda: self.ring(ticket))

    def ring(self, ticket: Ticket) -> None:
        self.say(machine.DeadlinePassed(ticket))
        self.alarm(ticket)  # if it came too early, or the room moved on

    def say(self, event: machine.Event) -> None:
        before = self.rooms[event.ticket]
        transition = machine.next(before, event, self.now + self.skew_s)
        room = self.rooms[event.ticket] = transition.room
        for effect in transition.effects:
            match effect:
                case Effect.PUSH_RESERVATION:
                    for worker in (self.prefill, self.decode):
                        self.tell(worker, effect, room)
                    self.at(self.draw.uniform(0, 6), lambda: self.write(room.ticket))
                case Effect.END_PREFILL:
                    self.tell(self.prefill, effect, room)
                case Effect.END_DECODE:
                    self.tell(self.decode, effect, room)
                    self.in_order("quiet", lambda: self.say(machine.Quiet(room.ticket)))
                case Effect.RELEASE if before.reservation is not None or isinstance(event, machine.Reserved):
                    self.free_slots += 1
                    self.grant()
                case Effect.END_ROUTER:
                    self.answers[room.ticket] = room
                    if room.state is State.SUCCESS:  # the ranks learn it from the transfer itself, as one
                        for worker in (self.prefill, self.decode):
                            self.tell(worker, effect, room)
                case _:
                    pass

    def tell(self, worker: Worker, effect: Effect, room: Room) -> None:
        self.in_order(worker, lambda: worker.inbox.append((effect, room)))

    # ------------------------------------------------------------------------------------ the workers' business

    def grant(self) -> None:
        """Decode is saturated: rooms wait for a slot, some beyond their timeout."""
        while self.free_slots and self.waiting:
            ticket = self.waiting.popleft()
            if not self.rooms[ticket].state.terminal:
                self.free_slots -= 1
                self.in_order("decode", lambda ticket=ticket: self.say(machine.Reserved(ticket, "pages")))  # type: ignore[misc]

    def write(self, ticket: Ticket) -> None:
        self.in_order("prefill", lambda: self.say(machine.Transferring(ticket)))
        self.at(self.draw.uniform(0, 6), lambda: self.in_order("decode", lambda: self.arrived(ticket)))

    def arrived(self, ticket: Ticket) -> None:
        self.say(machine.Transferred(ticket))
        if self.rooms[ticket].state is State.SUCCESS:
            self.at(self.draw.uniform(0, 10), self.finished)

    def finished(self) -> None:
        self.free_slots += 1
        self.grant()


RANKS = [(1, 1), (2, 2), (4, 1), (3, 8), (8, 4)]


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("seed", range(12))
def test_every_rank_sees_the_same_outcome_in_the_same_order(seed: int, ranks: tuple[int, int]) -> None:
    sim = Simulation(seed, ranks, own_clocks=False)
    sim.run()
    for worker in (sim.prefill, sim.decode):
        assert all(rank.seen == worker.ranks[0].seen for rank in worker.ranks)
        assert all(not rank.rooms for rank in worker.ranks), "nobody computes a room that has ended"
        for ticket, outcome in worker.ranks[0].seen:
            room = sim.rooms[ticket]
            assert outcome in ("reserved", room.reason or room.state)
    assert len(sim.answers) == ROOMS, "every request gets an answer"
    assert all(room.at_rest for room in sim.rooms.values())
    assert sim.free_slots == SLOTS, "no slot leaks"
    failed = [room for room in sim.answers.values() if room.state is State.FAILED]
    assert failed, "or nothing was saturated"
    assert {Reason(room.reason) for room in failed} <= SOFT
    assert all(STATUS[Reason(room.reason)].retryable for room in failed), "a soft error: it may be tried again"


def test_control_ranks_that_decide_by_their_own_clocks_disagree() -> None:
    crashed = 0
    for seed, ranks in itertools.product(range(12), RANKS[1:]):
        try:
            Simulation(seed, ranks, own_clocks=True).run()
        except Disagreement:
            crashed += 1
    assert crashed > 40, "of 48"


def test_control_one_rank_alone_cannot_disagree() -> None:
    Simulation(0, (1, 1), own_clocks=True).run()


def test_loss_of_a_worker_is_one_decision_too() -> None:
    """Whoever noticed it, the room ends once, and a rank's own view of the loss has no say."""
    room = Room(Ticket("r", 1, 1), "q", 0, "p", "d", 0.0, 0.0)
    lost = machine.next(room, machine.WorkerLost(room.ticket, Party.DECODE), 1.0).room
    late = machine.next(lost, machine.Transferred(room.ticket), 2.0)
    assert late.room is lost
    assert late.refusal
