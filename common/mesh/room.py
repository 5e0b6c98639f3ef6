"""The life of a room: a pure function from a room and an event to the next room and what to do about it.

    BOOTSTRAPPING → WAITING_FOR_INPUT → TRANSFERRING → SUCCESS        FAILED from all but SUCCESS

No I/O, no clock, no locks: the service, the tests and simulations run this very function. It never raises; an
event with a stale ticket or one that does not fit is refused with a reason and leaves the room as it is.
A repeated event changes nothing and does nothing.

Quarantine: once the reservation went to prefill, prefill may write to decode's pages until it says `Quiet`. A room
that fails in between is `quarantined`; decode gets RELEASE only at the end of that. That prefill is lost proves
nothing: a stopped process, or one behind a broken network, may go on to write. Decode then gets FENCE, frees the
pages once its own transfer endpoint has seen the last of the writer, and says `Fenced`; or the writer comes back
and says `Quiet` after all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum, StrEnum, auto

from common.errors.base import Reason
from common.mesh.ticket import Ticket


class State(StrEnum):
    """Names as in `pdmesh.v1.RoomState`."""

    BOOTSTRAPPING = "BOOTSTRAPPING"
    WAITING_FOR_INPUT = "WAITING_FOR_INPUT"
    TRANSFERRING = "TRANSFERRING"
    SUCCESS = "SUCCESS"
    FAILED = "FAILED"

    @property
    def terminal(self) -> bool:
        return self in (State.SUCCESS, State.FAILED)


class Party(StrEnum):
    """The two workers of a room."""

    PREFILL = "prefill"
    DECODE = "decode"


class Effect(Enum):
    """What is to be done after an event, in this order. All that it needs stands in the room."""

    PUSH_RESERVATION = auto()  # to prefill: where the pages go
    END_PREFILL = auto()  # to prefill: stop working on the room, then say quiet
    END_DECODE = auto()  # to decode: the room failed; its pages are quarantined
    RELEASE = auto()  # to decode: nobody writes to the pages any more
    FENCE = auto()  # to decode: prefill is lost; the pages are free when its endpoint can write no more
    END_ROUTER = auto()  # to the router: the room reached a terminal state
    PERSIST = auto()  # to the store


@dataclass(frozen=True)
class Timeouts:
    """How long a room may stay in a state, in seconds."""

    bootstrap_s: float = 300.0
    waiting_s: float = 300.0
    transfer_s: float = 300.0


@dataclass(frozen=True)
class Deadline:
    """When a room expires unless it moves on, and for which reason."""

    at: float
    reason: Reason
    message: str


@dataclass(frozen=True)
class Room:
    """One hand-over. Times are seconds of the caller's clock."""

    ticket: Ticket
    request_id: str
    index: int
    prefill_worker_id: str
    decode_worker_id: str
    opened_at: float
    changed_at: float
    timeouts: Timeouts = Timeouts()
    request_deadline: float | None = None
    admission_deadline: float | None = None  # for decode's reservation
    prompt_tokens: int = 0
    max_new_tokens: int = 0
    state: State = State.BOOTSTRAPPING
    reservation: object = None  # opaque here
    recovered: bool = False  # from an earlier owner, who may have pushed a reservation that we have not heard of
    quarantined: bool = False
    writer: object = None  # what has to be fenced, once prefill is lost; opaque here
    decode_lost: bool = False
    reason: str = ""
    message: str = ""

    @property
    def at_rest(self) -> bool:
        """Nobody is waited for any more. A quarantine of two lost workers ends with decode's process."""
        return self.state.terminal and not (self.quarantined and self.awaited)

    @property
    def prefill_lost(self) -> bool:
        """Whether prefill's life ended before it was quiet."""
        return self.writer is not None

    @property
    def awaited(self) -> bool:
        """Whether somebody is left who may end a quarantine."""
        return not (self.prefill_lost and self.decode_lost)

    @property
    def deadline(self) -> Deadline | None:
        """The earliest time at which the room expires; none once it is terminal."""
        limits = {
            State.BOOTSTRAPPING: (self.timeouts.bootstrap_s, Reason.BOOTSTRAP_TIMEOUT, "decode reserved no pages"),
            State.WAITING_FOR_INPUT: (self.timeouts.waiting_s, Reason.WAITING_TIMEOUT, "prefill began no transfer"),
            State.TRANSFERRING: (self.timeouts.transfer_s, Reason.TRANSFER_TIMEOUT, "the transfer did not end"),
        }
        if self.state not in limits:
            return None
        seconds, reason, what = limits[self.state]
        own = Deadline(self.changed_at + seconds, reason, f"{what} within {seconds:g} s")
        admission = self.admission_deadline if self.state is State.BOOTSTRAPPING else None
        if admission is not None and admission < own.at:
            waited_s = admission - self.opened_at
            own = Deadline(admission, Reason.OVERLOADED, f"decode did not admit the request within {waited_s:.3g} s")
        if self.request_deadline is not None and self.request_deadline < own.at:
            return Deadline(self.request_deadline, Reason.DEADLINE_EXCEEDED, "the request's deadline passed")
        return own


# ------------------------------------------------------------------------------------------ events


@dataclass(frozen=True)
class Reserved:
    """Decode granted pages."""

    ticket: Ticket
    reservation: object


@dataclass(frozen=True)
class Transferring:
    """Prefill submitted the first write."""

    ticket: Ticket


@dataclass(frozen=True)
class Transferred:
    """Decode has all bytes. `transfer` is how they travelled; opaque here."""

    ticket: Ticket
    transfer: object = None


@dataclass(frozen=True)
class RoomFailed:
    """A worker gave the room up."""

    ticket: Ticket
    reason: str
    message: str


@dataclass(frozen=True)
class Abort:
    """The router or an operator gave the room up."""

    ticket: Ticket
    reason: str
    message: str


@dataclass(frozen=True)
class DeadlinePassed:
    """A timer of the room fired; refused when the room moved on in the meantime."""

    ticket: Ticket


@dataclass(frozen=True)
class WorkerLost:
    """The life of one of the room's workers ended; its process may live on. `writer` names prefill's endpoints."""

    ticket: Ticket
    which: Party
    message: str = ""
    writer: object = ()


@dataclass(frozen=True)
class Quiet:
    """Prefill will write nothing more for the room. `transfer` is what had been written; opaque here."""

    ticket: Ticket
    transfer: object = None


@dataclass(frozen=True)
class Fenced:
    """Decode's endpoint has fenced a lost prefill worker off, and the pages are free."""

    ticket: Ticket


@dataclass(frozen=True)
class Held:
    """A worker that has registered anew still has the room: it may have missed what was said meanwhile."""

    ticket: Ticket
    which: Party


Event = Reserved | Transferring | Transferred | RoomFailed | Abort | DeadlinePassed | WorkerLost | Quiet | Fenced | Held


@dataclass(frozen=True)
class Refusal:
    """Why an event was not applied."""

    reason: Reason
    message: str


@dataclass(frozen=True)
class Transition:
    """What an event led to. `room` is the same object when nothing changed."""

    room: Room
    effects: tuple[Effect, ...] = ()
    refusal: Refusal | None = None


# ------------------------------------------------------------------------------------------ the function


def next(room: Room, event: Event, now: float) -> Transition:
    """Apply `event` to `room` at time `now`."""
    if event.ticket != room.ticket:
        return refuse(room, Reason.STALE_TICKET, f"ticket {event.ticket} is stale: the room's is {room.ticket}")
    match event:
        case Reserved():
            return reserved(room, event, now)
        case Transferring():
            return transferring(room, now)
        case Transferred():
            return transferred(room, now)
        case RoomFailed(reason=reason, message=message) | Abort(reason=reason, message=message):
            return fail(room, reason, message, now)
        case DeadlinePassed():
            return expire(room, now)
        case WorkerLost():
            return worker_lost(room, event, now)
        case Quiet():
            return quiet(room)
        case Fenced():
            return fenced(room)
        case Held(which=Party.PREFILL):
            return held_by_prefill(room)
        case Held():
            return held_by_decode(room)


def reserved(room: Room, event: Reserved, now: float) -> Transition:
    if room.state is State.BOOTSTRAPPING:
        moved = replace(room, state=State.WAITING_FOR_INPUT, changed_at=now, reservation=event.reservation)
        return Transition(moved, (Effect.PUSH_RESERVATION, Effect.PERSIST))
    if room.state is State.FAILED:
        # granted while the room failed, or by one that has not heard of it: decode may still be waiting for bytes
        return wrong_state(room, "reserved", end_of_decode(room))
    if event.reservation != room.reservation:
        return wrong_state(room, "reserved")
    return Transition(room)


def transferring(room: Room, now: float) -> Transition:
    if room.state is State.WAITING_FOR_INPUT:
        return Transition(replace(room, state=State.TRANSFERRING, changed_at=now), (Effect.PERSIST,))
    if room.state in (State.TRANSFERRING, State.SUCCESS):  # decode's news may overtake prefill's
        return Transition(room)
    return wrong_state(room, "transferring")


def transferred(room: Room, now: float) -> Transition:
    if room.state in (State.WAITING_FOR_INPUT, State.TRANSFERRING):
        moved = replace(room, state=State.SUCCESS, changed_at=now)
        return Transition(moved, (Effect.END_ROUTER, Effect.PERSIST))
    if room.state is State.SUCCESS:
        return Transition(room)
    return wrong_state(room, "transferred")


def fail(room: Room, reason: str, message: str, now: float) -> Transition:
    """End the room as FAILED; a room that ended already stays as it is."""
    if room.state is State.FAILED:
        return Transition(room)
    if room.state is State.SUCCESS:
        return wrong_state(room, "failed")
    pushed = room.reservation is not None or room.recovered
    failed = replace(room, state=State.FAILED, changed_at=now, reason=reason, message=message, quarantined=pushed)
    release = () if pushed else (Effect.RELEASE,)
    return Transition(failed, (Effect.END_PREFILL, Effect.END_DECODE, *release, Effect.END_ROUTER, Effect.PERSIST))


def expire(room: Room, now: float) -> Transition:
    deadline = room.deadline
    if deadline is None or now < deadline.at:
        return wrong_state(room, "deadline passed")
    return fail(room, deadline.reason, deadline.message, now)


def worker_lost(room: Room, event: WorkerLost, now: float) -> Transition:
    """The lost worker is told nothing. What prefill was given to write to stays in quarantine."""
    if room.at_rest:
        return Transition(room)
    if event.which is Party.PREFILL:
        return prefill_lost(room, event, now)
    if room.decode_lost:
        return Transition(room)
    if room.state.terminal:
        return Transition(replace(room, decode_lost=True), (Effect.PERSIST,))
    failed = fail(room, Reason.WORKER_LOST, event.message or "the decode worker is gone", now)
    return told(replace(failed.room, decode_lost=True), failed.effects, but=(Effect.END_DECODE, Effect.RELEASE))


def prefill_lost(room: Room, event: WorkerLost, now: float) -> Transition:
    if room.prefill_lost:
        return Transition(room)
    if room.state.terminal:  # and quarantined
        return Transition(replace(room, writer=event.writer), (Effect.FENCE, Effect.PERSIST))
    failed = fail(room, Reason.WORKER_LOST, event.message or "the prefill worker is gone", now)
    if not failed.room.quarantined:
        return told(failed.room, failed.effects, but=(Effect.END_PREFILL,))
    effects = (Effect.END_DECODE, Effect.FENCE, Effect.END_ROUTER, Effect.PERSIST)
    return Transition(replace(failed.room, writer=event.writer), effects)


def told(room: Room, effects: tuple[Effect, ...], but: tuple[Effect, ...]) -> Transition:
    return Transition(room, tuple(effect for effect in effects if effect not in but))


def quiet(room: Room) -> Transition:
    if not room.state.terminal:
        return wrong_state(room, "quiet")
    if not room.quarantined:
        return Transition(room)
    return Transition(replace(room, quarantined=False), (Effect.RELEASE, Effect.PERSIST))


def fenced(room: Room) -> Transition:
    if not room.state.terminal:
        return wrong_state(room, "fenced")
    if not room.quarantined:
        return Transition(room)
    return Transition(replace(room, quarantined=False), (Effect.PERSIST,))


def held_by_prefill(room: Room) -> Transition:
    """It is to say `Quiet` for a room that failed, and is awaited again."""
    if room.state is State.FAILED:
        if not room.prefill_lost:
            return Transition(room, (Effect.END_PREFILL,))
        return Transition(replace(room, writer=None), (Effect.END_PREFILL, Effect.PERSIST))
    if room.state in (State.WAITING_FOR_INPUT, State.TRANSFERRING):
        return Transition(room, (Effect.PUSH_RESERVATION,))
    return Transition(room)


def held_by_decode(room: Room) -> Transition:
    """It hears how a failed room ended, and what is known of its writer."""
    if room.state is not State.FAILED:
        return Transition(room)
    effects = end_of_decode(room)
    if not room.decode_lost:
        return Transition(room, effects)
    return Transition(replace(room, decode_lost=False), (*effects, Effect.PERSIST))


def end_of_decode(room: Room) -> tuple[Effect, ...]:
    """All that decode has to know of a room that failed."""
    if not room.quarantined:
        return (Effect.END_DECODE, Effect.RELEASE)
    return (Effect.END_DECODE, Effect.FENCE) if room.prefill_lost else (Effect.END_DECODE,)


def wrong_state(room: Room, event: str, effects: tuple[Effect, ...] = ()) -> Transition:
    ended = f" ({room.reason})" if room.reason else ""
    return refuse(room, Reason.WRONG_STATE, f"{event!r} does not fit a room that is {room.state}{ended}", effects)


def refuse(room: Room, reason: Reason, message: str, effects: tuple[Effect, ...] = ()) -> Transition:
    return Transition(room, effects, Refusal(reason, message))
