"""Many hand-overs among several workers while everything goes wrong that may: bootstrap, router and network in one.

Bootstrap is the very function that the service runs (`common.mesh.room`); hand-overs, engines and transfer backends
are real. Who loses its session hears again what it missed, and says again what it said, as the sessions of workers do.
Every page that decode reads is compared byte by byte (`tests.paged_toy`).

`tickets=False` is the control: all attempts of a request bear the same ticket.
"""

from __future__ import annotations

import itertools
import random
import socket
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import zmq
from msgspec import structs

from common.engine.messages import Sampling, SequenceFailed, Tokens
from common.mesh import room as machine
from common.mesh.room import Effect, Room, State, Timeouts
from common.mesh.room import Party as Which
from common.mesh.ticket import Ticket
from common.worker.messages import (
    AbortSequence,
    Prefilled,
    Registered,
    RoomEnded,
    RoomFailed,
    RoomFenced,
    RoomQuiet,
    RoomReleased,
    RoomReserved,
    RoomTransferred,
    RoomTransferring,
    StartSequence,
)
from common.worker.waker import Waker
from tests.handover_parties import Child, Here, Setting
from tests.paged_toy import PAGE_SIZE, VOCAB_SIZE, WRONG, outputs_of

Member = Here | Child
OPEN_AT_ONCE = 10
MOST_PAGES = 10
SOON = 40  # turns within which a fault strikes
PATIENCE_S = 120.0
TIMEOUTS = Timeouts(10.0, 10.0, 10.0)

FAULTS = {
    "abort at the router": 10,
    "abort by an operator": 10,
    "time-out": 10,
    "session of prefill broken": 6,
    "session of decode broken": 6,
    "prefill taken for lost": 3,
    "decode taken for lost": 3,
    "prefill killed": 1,
    "decode killed": 1,
}


@dataclass(eq=False)
class Request:
    """What one client wants; it lives through several attempts."""

    room_id: str
    prompt_ids: list[int]
    max_new_tokens: int
    expected: list[int]
    attempt: int = 0


@dataclass(eq=False)
class Entry:
    """One attempt."""

    room: Room
    request: Request
    prefill: Member
    decode: Member
    tokens: list[int] = field(default_factory=list)

    @property
    def over(self) -> bool:
        """Whether nothing is left to do; the pages of a process end with it."""
        return self.room.state.terminal and not (self.room.quarantined and self.decode.alive)


class World:
    """Everybody who takes part. `make` makes a party; `rate` is the share of rooms that something happens to.

    The rooms' clock goes on by `step_s` a turn, and by `idle_step_s` more when nobody has anything to do.
    """

    def __init__(
        self,
        seed: int,
        make: Callable[[Setting], Member],
        prefill: Setting,
        decode: Setting,
        waker: Waker,
        *,
        parties: int = 2,
        rate: float = 0.5,
        faults: dict[str, int] = FAULTS,
        tickets: bool = True,
        step_s: float = 0.01,
        idle_step_s: float = 0.2,
    ) -> None:
        self.draw = random.Random(seed)
        self.make = make
        self.waker = waker
        self.rate = rate
        self.faults = faults
        self.tickets = tickets
        self.step_s = step_s
        self.idle_step_s = idle_step_s
        self.now = 0.0
        self.turns = 0
        self.lives = 0
        self.sequences = self.attempts = 0
        self.numbers = itertools.count(1)
        self.did: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.prefixes = [[self.draw.randrange(VOCAB_SIZE) for _ in range(length)] for length in (40, 64, 100, 150)]
        self.entries: dict[Ticket, Entry] = {}
        self.open: dict[Ticket, Entry] = {}  # not at rest
        self.by_sequence: dict[tuple[int, int], Entry] = {}
        self.plans: dict[int, list[Callable[[], None]]] = defaultdict(list)
        self.members: list[Member] = []
        for setting in [prefill] * parties + [decode] * parties:
            self.join(self.fresh(setting))

    # ------------------------------------------------------------------------------------ the way of it

    def run(self, count: int) -> None:
        """Let there be `count` hand-overs, those of earlier calls among them, and all of them end."""
        while self.attempts < count or self.open:
            while self.attempts < count and len(self.open) < OPEN_AT_ONCE:
                self.request(next(self.numbers))
            self.turn()
        self.settle()

    def turn(self) -> None:
        """A little of everything."""
        self.turns += 1
        self.now += self.step_s
        busy = False
        for act in self.plans.pop(self.turns, []):
            act()
        for member in self.draw.sample(self.members, len(self.members)):
            busy |= self.turn_of(member)
        for entry in list(self.open.values()):
            deadline = entry.room.deadline
            if deadline and deadline.at <= self.now:
                self.apply(entry, machine.DeadlinePassed(entry.room.ticket))
            elif entry.over:
                self.open.pop(entry.room.ticket, None)
        if not busy and not self.plans:
            self.wait()

    def wait(self) -> None:
        """Until a backend here or a child has news, for a moment at most."""
        poller = zmq.Poller()
        poller.register(self.waker.fd, zmq.POLLIN)
        for member in self.members:
            if isinstance(member, Child):
                poller.register(member.socket, zmq.POLLIN)
        if not poller.poll(2):
            self.now += self.idle_step_s
        self.waker.drain()

    def turn_of(self, member: Member) -> bool:
        if not member.alive:
            return False
        busy = bool(member.control or member.router or member.news)
        for queue in (member.router, member.control if member.attached else None):
            while queue and self.draw.random() < 0.8:
                self.deliver(member, queue)
        for message in member.turn():
            busy = True
            self.said(member, message)
        while member.news and member.attached and self.draw.random() < 0.8:
            self.hear(member, member.news.popleft())
        return busy or bool(member.load.running)

    def deliver(self, member: Member, queue: Any) -> None:
        message = queue.popleft()
        if isinstance(message, RoomReleased) and not message.when_gone:
            member.holds.discard(message.ticket)
        elif isinstance(message, StartSequence):
            member.holds.add(message.ticket)
        member.give(message)
        if queue is member.control and self.draw.random() < 0.03 and not isinstance(message, Registered):
            self.did["said twice to a worker"] += 1
            queue.append(message)

    def settle(self) -> None:
        """No more faults: all that is under way arrives, and then everything is at rest."""
        for member in self.members:
            member.calm()
        for due in sorted(self.plans):
            for act in self.plans.pop(due):
                act()
        for member in list(self.members):
            self.return_of(member)
        rate, self.rate = self.rate, 0.0
        self.now += 1000
        end = time.monotonic() + PATIENCE_S
        while not self.quiet:
            assert time.monotonic() < end, self.story()
            self.turn()
            for member in self.members:
                if not member.attached:
                    self.attach(member)
        self.rate = rate

    @property
    def quiet(self) -> bool:
        return not self.open and all(
            not (member.control or member.router or member.news) and member.at_rest for member in self.members
        )

    def story(self) -> str:
        rooms = [f"{e.room.ticket} {e.room.state} {e.room.reason} {e.room.quarantined}" for e in self.open.values()]
        return f"{rooms}; {[(m.role, m.alive, m.attached, m.load) for m in self.members]}; {self.did}"

    def close(self) -> None:
        for member in self.members:
            member.close()
            self.did.update(member.did)

    # ------------------------------------------------------------------------------------ the router

    def request(self, number: int) -> None:
        tokens = self.draw.randrange(1, MOST_PAGES * PAGE_SIZE)
        prompt = [self.draw.randrange(VOCAB_SIZE) for _ in range(tokens)]
        if self.draw.random() < 0.5:  # much of it may have been computed for another one
            known = self.draw.choice(self.prefixes)[:tokens]
            prompt[: len(known)] = known
        most = self.draw.randrange(2, 6)
        self.attempt(Request(f"r{number}", prompt, most, outputs_of(prompt, most)))

    def attempt(self, request: Request, at: tuple[Member, Member] | None = None) -> None:
        request.attempt += 1
        self.attempts += 1
        prefill, decode = at or (self.one("prefill"), self.one("decode"))
        ticket = Ticket(request.room_id, request.attempt, self.lives) if self.tickets else Ticket(request.room_id, 1, 1)
        room = Room(ticket, request.room_id, 0, "p", "d", self.now, self.now, TIMEOUTS)
        entry = Entry(room, request, prefill, decode)
        self.entries[ticket] = self.open[ticket] = entry
        for member in (decode, prefill):
            self.sequences += 1
            self.by_sequence[id(member), self.sequences] = entry
            sampling = Sampling(max_new_tokens=request.max_new_tokens, temperature=0.0, ignore_eos=True)
            start = StartSequence(self.sequences, request.room_id, ticket, request.prompt_ids, sampling)
            if self.draw.random() < 0.02 * self.rate:
                self.did["start lost"] += 1
            else:
                member.router.append(start)
            if self.draw.random() < 0.03 * self.rate:
                sequence = self.sequences
                self.soon("abort on one side", lambda m=member, s=sequence: m.router.append(AbortSequence(s)))  # type: ignore[misc]
        if self.draw.random() < self.rate:
            what = self.draw.choices(list(self.faults), list(self.faults.values()))[0]
            self.soon(what, lambda: self.strike(what, entry))

    def soon(self, what: str, act: Callable[[], None]) -> None:
        self.did[what] += 1
        self.plans[self.turns + self.draw.randrange(1, SOON)].append(act)

    def one(self, role: str) -> Member:
        return self.draw.choice([member for member in self.members if member.role == role and member.alive])

    def ended(self, entry: Entry) -> None:
        """The room is over. One that failed is soon tried again, mostly where it was."""
        if entry.room.state is State.SUCCESS:
            self.did["success"] += 1
            return
        self.did[f"failed: {entry.room.reason}"] += 1
        if entry.request.attempt < 4 and self.rate:
            both = (entry.prefill, entry.decode)
            same = all(member.alive for member in both) and self.draw.random() < 0.8
            self.attempt(entry.request, both if same else None)

    def tokens(self, entry: Entry, tokens: Tokens) -> None:
        entry.tokens += tokens.token_ids
        if entry.tokens != entry.request.expected[: len(entry.tokens)]:
            self.wrong.append(f"{entry.room.ticket} generated {entry.tokens}, not {entry.request.expected}")
        if tokens.finish and tokens.finish != "abort":
            self.did["finished"] += 1

    # ------------------------------------------------------------------------------------ bootstrap

    def said(self, member: Member, message: Any) -> None:
        """A rank said something: sequences' news are for the router, rooms' take their way to bootstrap."""
        match message:
            case Prefilled():
                member.holds.discard(self.by_sequence[id(member), message.sequence_id].room.ticket)
            case Tokens() | SequenceFailed():
                entry = self.by_sequence[id(member), message.sequence_id]
                if isinstance(message, Tokens):
                    self.tokens(entry, message)
                elif WRONG in message.message:
                    self.wrong.append(f"{entry.room.ticket}: {message.message}")
            case RoomReserved() | RoomTransferring() | RoomTransferred() | RoomFailed() | RoomQuiet() | RoomFenced():
                if isinstance(message, RoomTransferred | RoomFenced | RoomQuiet):
                    member.holds.discard(message.ticket)
                member.said.setdefault(message.ticket, []).append(message)
                member.news.append(message)
                if self.draw.random() < 0.03 * bool(self.rate):
                    self.did["said twice to bootstrap"] += 1
                    member.news.append(message)

    def hear(self, member: Member, message: Any) -> None:
        entry = self.entries.get(message.ticket)
        if entry is None or member not in (entry.prefill, entry.decode):
            return
        ticket = message.ticket
        match message:
            case RoomReserved():
                event: machine.Event = machine.Reserved(ticket, message)
            case RoomTransferring():
                event = machine.Transferring(ticket)
            case RoomTransferred():
                event = machine.Transferred(ticket)
            case RoomFailed():
                event = machine.RoomFailed(ticket, message.reason, message.message)
            case RoomQuiet():
                event = machine.Quiet(ticket)
            case _:
                event = machine.Fenced(ticket)
        self.apply(entry, event)

    def apply(self, entry: Entry, event: machine.Event) -> None:
        transition = machine.next(entry.room, event, self.now)
        entry.room = room = transition.room
        ticket = room.ticket
        for effect in transition.effects:
            match effect:
                case Effect.PUSH_RESERVATION:
                    self.tell(entry.prefill, structs.replace(room.reservation, ticket=ticket))  # type: ignore[type-var]
                case Effect.END_PREFILL:
                    self.tell(entry.prefill, RoomEnded(ticket, room.reason, room.message))
                case Effect.END_DECODE:
                    self.tell(entry.decode, RoomEnded(ticket, room.reason, room.message))
                case Effect.RELEASE:
                    self.tell(entry.decode, RoomReleased(ticket))
                case Effect.FENCE:
                    descriptor, epoch = room.writer  # type: ignore[misc]
                    self.tell(entry.decode, RoomReleased(ticket, (descriptor,), epoch))
                case Effect.END_ROUTER:
                    self.ended(entry)
                case Effect.PERSIST:
                    pass

    def tell(self, member: Member, message: Any) -> None:
        if member.alive and member.attached:
            member.control.append(message)

    # ------------------------------------------------------------------------------------ what goes wrong

    def strike(self, what: str, entry: Entry) -> None:
        member = entry.prefill if "prefill" in what else entry.decode
        match what.split():
            case ["abort", "at", "the", "router"]:
                self.apply(entry, machine.Abort(entry.room.ticket, "ABORTED", "the client left"))
                for (owner, number), known in list(self.by_sequence.items())[-40:]:
                    if known is entry:
                        party = entry.prefill if owner == id(entry.prefill) else entry.decode
                        party.router.append(AbortSequence(number))
            case ["abort", *_]:
                self.apply(entry, machine.Abort(entry.room.ticket, "ABORTED", "making room"))
            case ["time-out"]:
                if deadline := entry.room.deadline:
                    transition_at, self.now = self.now, deadline.at
                    self.apply(entry, machine.DeadlinePassed(entry.room.ticket))
                    self.now = transition_at
            case [*_, "broken"]:
                self.cut(member)
            case [*_, "lost"]:
                self.cut(member)
                self.lose(member)
            case [*_, "killed"]:
                self.kill(member)

    def cut(self, member: Member) -> None:
        """Its session ends, and with it all that was under way; a new one comes soon."""
        if member.alive and member.attached:
            member.attached = False
            member.control.clear()
            member.news.clear()
            self.plans[self.turns + self.draw.randrange(1, SOON)].append(lambda: self.return_of(member))

    def lose(self, member: Member) -> None:
        """Bootstrap gives it up: its life ends."""
        member.lost = True
        writer = (member.descriptor, member.life)
        which = Which.PREFILL if member.role == "prefill" else Which.DECODE
        for entry in list(self.open.values()):
            if member in (entry.prefill, entry.decode):
                self.apply(entry, machine.WorkerLost(entry.room.ticket, which, "", writer))

    def kill(self, member: Member) -> None:
        if not member.alive:
            return
        member.kill()
        self.did.update(member.did)
        member.attached = False
        for queue in (member.control, member.router, member.news):
            queue.clear()
        self.members.remove(member)
        setting = self.fresh(member.setting)
        if self.draw.random() < 0.5 and is_free(member.address):
            setting = structs.replace(setting, control=member.address)
            self.did["same address again"] += 1
        self.join(setting)
        self.plans[self.turns + self.draw.randrange(1, SOON)].append(lambda: self.return_of(member))

    def fresh(self, setting: Setting) -> Setting:
        """The same again, which draws other faults and listens anywhere."""
        return structs.replace(setting, seed=self.draw.randrange(1 << 30), control=None)

    def join(self, setting: Setting) -> Member:
        """A new process."""
        member = self.make(setting)
        self.members.append(member)
        self.attach(member)
        return member

    def return_of(self, member: Member) -> None:
        """A session is there again; or bootstrap takes note that there will be none."""
        if not member.alive:
            self.lose(member)
        elif not member.attached:
            self.attach(member)

    def attach(self, member: Member) -> None:
        """It registers: in the life that it had, or in a new one. Both say again what the other may have missed."""
        member.attached = True
        if member.lost:
            self.lives += 1
            member.life, member.lost = self.lives, False
            member.control.append(Registered(member.life))
        which = Which.PREFILL if member.role == "prefill" else Which.DECODE
        mine = {entry.room.ticket for entry in self.open.values() if member in (entry.prefill, entry.decode)}
        for ticket in sorted(mine | member.holds, key=str):
            entry = self.entries[ticket]
            for message in member.said.get(ticket, []):
                self.hear(member, message)
            self.apply(entry, machine.Held(ticket, which))


def is_free(address: Any) -> bool:
    """Whether somebody can listen there."""
    with socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError:
            return False
    return True
