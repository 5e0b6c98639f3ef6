"""Rooms among workers that are cut off, stopped, killed, replaced and come back: no page is free under a writer.

Bootstrap is the very function that the service runs. The workers are what is left of the hand-over files when
nothing but the pages of one room matters. A walk does whatever is possible at a moment, at random: messages are
late, lost with their session, said twice; processes stop and go on. At its end all that is under way arrives, and
then everything must be at rest.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto

import pytest

from common.mesh import room as machine
from common.mesh.room import Effect, Party, Room, State, Timeouts
from common.mesh.ticket import Ticket

pytestmark = pytest.mark.unit

TICKET = Ticket("r", 1, 7)
WALKS, STEPS = 8000, 60


class Corruption(Exception):
    """A process may write to pages that decode takes for free."""


class Pages(Enum):
    """A decode process's pages of the room."""

    NONE = auto()
    RESERVED = auto()
    QUARANTINED = auto()
    ADOPTED = auto()
    FREE = auto()


@dataclass(eq=False)
class Process:
    """A worker's process. `inbox` is what its present session brings it; a life lasts from `attach` to its loss."""

    life: int = 0
    alive: bool = True
    attached: bool = False
    stopped: bool = False
    inbox: list[tuple[Effect, Room]] = field(default_factory=list)
    unsent: list[machine.Event] = field(default_factory=list)


@dataclass(eq=False)
class Prefill(Process):
    """`connected` is the life in which it connected to decode. `granted` lasts until it is quiet."""

    connected: int | None = None
    granted: bool = False
    ended: bool = False


@dataclass(eq=False)
class Decode(Process):
    """`fenced` is the writer that it waits for: a process and its life."""

    pages: Pages = Pages.NONE
    ended: bool = False
    bars: dict[Prefill, int] = field(default_factory=dict)
    fenced: tuple[Prefill, int] | None = None


class World:
    """One room and everybody who has a part in it."""

    def __init__(self, seed: int, *, fencing: bool) -> None:
        self.draw = random.Random(seed)
        self.fencing = fencing
        self.now = 0.0
        self.lives = 0
        self.room = Room(TICKET, "q", 0, "p", "d", 0.0, 0.0, Timeouts(30, 30, 30))
        self.prefills = [Prefill()]
        self.decode = Decode()
        self.under_way: list[tuple[Process, int, machine.Event]] = []  # to bootstrap
        self.attach(self.prefills[0])
        self.attach(self.decode)

    # ------------------------------------------------------------------------------------ bootstrap

    def apply(self, event: machine.Event) -> None:
        transition = machine.next(self.room, event, self.now)
        self.room = transition.room
        for effect in transition.effects:
            if effect in (Effect.PUSH_RESERVATION, Effect.END_PREFILL):
                to: Process | None = next((process for process in self.prefills if process.attached), None)
            elif effect in (Effect.END_DECODE, Effect.RELEASE, Effect.FENCE):
                to = self.decode if self.decode.attached else None
            else:
                to = None
            if to:
                told = Effect.RELEASE if effect is Effect.FENCE and not self.fencing else effect
                to.inbox.append((told, self.room))

    def lose(self, process: Process) -> None:
        """Its session ends, and with it all that was under way on it."""
        process.attached = False
        process.inbox.clear()
        lost = [event for sender, life, event in self.under_way if sender is process and life == process.life]
        self.under_way = [entry for entry in self.under_way if entry[0] is not process]
        process.unsent += [event for event in lost if isinstance(event, machine.Quiet)]
        writer = (process, process.life) if isinstance(process, Prefill) else ()
        party = Party.PREFILL if isinstance(process, Prefill) else Party.DECODE
        self.apply(machine.WorkerLost(TICKET, party, "", writer))

    def attach(self, process: Process) -> None:
        """It registers: whoever had its name is lost. It tells what it holds, and what it could not say before."""
        for other in [*self.prefills, self.decode]:
            if type(other) is type(process) and other.attached:
                self.lose(other)
        self.lives += 1
        process.life, process.attached = self.lives, True
        if isinstance(process, Decode):
            if process.pages in (Pages.RESERVED, Pages.QUARANTINED):
                self.apply(machine.Held(TICKET, Party.DECODE))
        elif isinstance(process, Prefill):
            if process.granted:
                self.apply(machine.Held(TICKET, Party.PREFILL))
            elif self.is_writer(process):
                self.apply(machine.Quiet(TICKET))
        unsent, process.unsent = process.unsent, []
        for event in unsent:
            self.say(process, event)

    def is_writer(self, process: Prefill) -> bool:
        return isinstance(self.room.writer, tuple) and self.room.writer[:1] == (process,)

    def say(self, process: Process, event: machine.Event) -> None:
        if process.attached:
            self.under_way.append((process, process.life, event))
        elif isinstance(event, machine.Quiet):
            process.unsent.append(event)

    def hear(self, index: int) -> None:
        """Bootstrap gets something that is under way, in any order."""
        process, _, event = self.under_way.pop(index)
        if isinstance(event, machine.Quiet) and self.room.prefill_lost and not self.is_writer(process):  # type: ignore[arg-type]
            return
        self.apply(event)

    # ------------------------------------------------------------------------------------ prefill

    def prefill_hears(self, process: Prefill) -> None:
        effect, room = process.inbox.pop(0)
        if effect is Effect.PUSH_RESERVATION and not process.granted:
            if process.connected is None:
                if room.reservation is not self.decode or self.decode.bars.get(process, 0) >= process.life:
                    self.say(process, machine.RoomFailed(TICKET, "TRANSFER_FAILED", "not welcome"))
                    self.say(process, machine.Quiet(TICKET))
                    return
                process.connected = process.life
            process.granted = True
        elif effect is Effect.END_PREFILL:
            process.ended = True
            if not process.granted:
                self.say(process, machine.Quiet(TICKET))

    def write(self, process: Prefill) -> None:
        if self.decode.pages in (Pages.FREE, Pages.NONE):
            raise Corruption
        self.say(process, machine.Transferring(TICKET))

    def fall_quiet(self, process: Prefill) -> None:
        process.granted = False
        self.say(process, machine.Quiet(TICKET))

    def finish(self, process: Prefill) -> None:
        """The last byte is there, and decode gets the notice directly."""
        process.granted = False
        if self.decode.pages is Pages.RESERVED and not self.decode.ended:
            self.decode.pages = Pages.ADOPTED
            self.say(self.decode, machine.Transferred(TICKET))

    def disconnect(self, process: Prefill) -> None:
        process.connected = None

    # ------------------------------------------------------------------------------------ decode

    def grant(self) -> None:
        self.decode.pages = Pages.RESERVED
        self.say(self.decode, machine.Reserved(TICKET, self.decode))

    def decode_hears(self) -> None:
        decode = self.decode
        effect, room = decode.inbox.pop(0)
        if effect is Effect.END_DECODE:
            decode.ended = True
            if decode.pages is Pages.RESERVED:
                decode.pages = Pages.QUARANTINED
        elif effect is Effect.RELEASE and decode.pages is Pages.QUARANTINED:
            decode.pages = Pages.FREE
        elif effect is Effect.FENCE:
            process, life = room.writer  # type: ignore[misc]
            if decode.pages is not Pages.QUARANTINED:
                self.say(decode, machine.Fenced(TICKET))
                return
            decode.bars[process] = max(life, decode.bars.get(process, 0))
            decode.fenced = (process, life)

    def look_at_the_fence(self) -> None:
        decode = self.decode
        assert decode.fenced
        process, life = decode.fenced
        if process.connected is not None and process.connected <= life:
            return
        decode.fenced = None
        if decode.pages is Pages.QUARANTINED:
            decode.pages = Pages.FREE
            self.say(decode, machine.Fenced(TICKET))

    def kill_decode(self) -> None:
        """Its memory goes with it: what is written there later harms nobody."""
        self.decode.alive = False
        self.lose(self.decode)
        for process in self.prefills:
            process.connected, process.granted = None, False
        self.decode = Decode(pages=Pages.NONE, ended=True)

    def kill_prefill(self, process: Prefill) -> None:
        process.alive, process.granted, process.connected = False, False, None
        if process.attached:
            self.lose(process)
        process.inbox.clear()
        process.unsent.clear()
        self.prefills.remove(process)

    # ------------------------------------------------------------------------------------ the walk

    def faults(self) -> list[Callable[[], None]]:
        """What goes wrong, and rights itself."""
        acts: list[Callable[[], None]] = [self.time_passes, self.kill_decode, self.abort]
        if self.under_way:
            acts.append(lambda: self.under_way.append(self.draw.choice(self.under_way)))  # said twice
        if len(self.prefills) < 3:
            acts.append(self.replace_prefill)
        for process in [*self.prefills, self.decode]:
            if process.attached:
                acts.append(lambda process=process: self.lose(process))  # type: ignore[misc]
            elif not process.stopped:
                acts += [lambda process=process: self.attach(process)] * 2  # type: ignore[misc]
        for prefill in self.prefills:
            acts.append(lambda process=prefill: setattr(process, "stopped", not process.stopped))  # type: ignore[misc]
            acts.append(lambda process=prefill: self.kill_prefill(process))  # type: ignore[misc]
        return acts

    def business(self) -> list[Callable[[], None]]:
        """What happens when nothing goes wrong, but for the order."""
        acts: list[Callable[[], None]] = []
        acts += [lambda index=index: self.hear(index) for index in range(len(self.under_way))]  # type: ignore[misc]
        decode = self.decode
        if decode.inbox:
            acts.append(self.decode_hears)
        if decode.pages is Pages.NONE and not decode.ended and decode.attached:
            acts.append(self.grant)
        if decode.fenced:
            acts.append(self.look_at_the_fence)
        for process in self.prefills:
            if not process.stopped:
                acts += self.of_prefill(process)
        return acts

    def abort(self) -> None:
        self.apply(machine.Abort(TICKET, "ABORTED", "no longer wanted"))

    def time_passes(self) -> None:
        self.now += 10
        self.apply(machine.DeadlinePassed(TICKET))

    def replace_prefill(self) -> None:
        self.prefills.append(Prefill())
        self.attach(self.prefills[-1])

    def of_prefill(self, process: Prefill) -> list[Callable[[], None]]:
        acts: list[Callable[[], None]] = []
        if process.inbox:
            acts.append(lambda: self.prefill_hears(process))
        if process.granted:
            acts += [lambda: self.write(process)] * 3
            acts.append(lambda: self.fall_quiet(process) if process.ended else self.finish(process))
        elif process.connected is not None:
            acts.append(lambda: self.disconnect(process))
        return acts

    def walk(self) -> None:
        for _ in range(STEPS):
            business = self.business()
            going_wrong = not business or self.draw.random() < 0.15
            self.draw.choice(self.faults() if going_wrong else business)()

    def settle(self) -> None:
        """No more faults: the stopped go on or are killed, the cut off come back, all that is under way arrives."""
        for process in list(self.prefills):
            process.stopped = False
            if self.draw.random() < 0.5 or not process.attached:
                self.kill_prefill(process)
        if not self.decode.attached:
            self.attach(self.decode)
        self.now += 1000
        self.apply(machine.DeadlinePassed(TICKET))
        for _ in range(100):
            while self.under_way:
                self.hear(0)
            while self.decode.inbox:
                self.decode_hears()
            if self.decode.fenced:
                self.look_at_the_fence()
            for process in self.prefills:
                while process.inbox:
                    self.prefill_hears(process)
                if process.granted:
                    self.write(process)
                    self.fall_quiet(process) if process.ended else self.finish(process)


@pytest.mark.parametrize("part", range(4))
def test_no_page_is_free_under_a_writer_and_all_come_back(part: int) -> None:
    ends: set[State] = set()
    for seed in range(part * WALKS // 4, (part + 1) * WALKS // 4):
        world = World(seed, fencing=True)
        world.walk()
        world.settle()
        assert world.room.state.terminal, seed
        assert world.room.at_rest, seed
        assert world.decode.pages in (Pages.NONE, Pages.FREE, Pages.ADOPTED), seed
        ends.add(world.room.state)
    assert ends == {State.SUCCESS, State.FAILED}


def test_control_without_fencing_pages_are_free_under_a_writer() -> None:
    """What would be if the loss of a prefill worker released its rooms' pages."""
    corrupted = 0
    for seed in range(WALKS):
        world = World(seed, fencing=False)
        try:
            world.walk()
        except Corruption:
            corrupted += 1
    assert corrupted > WALKS // 100
