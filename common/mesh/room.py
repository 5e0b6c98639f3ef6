"""The life of a room: a pure function from a room and an event to the next room and what to do about it.

    BOOTSTRAPPING → WAITING_FOR_INPUT → TRANSFERRING → SUCCESS        FAILED from all but SUCCESS

No I/O, no clock, no locks: the service, the tests and simulations run this very function. It never raises; an
event with a stale ticket or one that does not fit is refused with a reason and leaves the room as it is.
A repeated event changes nothing and does nothing.

Quarantine: once the reservation went to prefill, prefill may write to decode's pages until it says `Quiet` or is
lost. A room that fails in between is `quarantined`; decode gets RELEASE only at the end of that.
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
    state: State = State.BOOTSTRAPPING
    reservation: object = None  # opaque here
    quarantined: bool = False
    reason: str = ""
    message: str = ""

    @property
    def at_rest(self) -> bool:
        """No event can bring an effect any more."""
        return self.state.terminal and not self.quarantined

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
    """Decode has all bytes."""

    ticket: Ticket


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
    """One of the room's workers is gone, and with it whatever it might still have written."""

    ticket: Ticket
    which: Party
    message: str = ""


@dataclass(frozen=True)
class Quiet:
    """Prefill will write nothing more for the room."""

    ticket: Ticket


Event = Reserved | Transferring | Transferred | RoomFailed | Abort | DeadlinePassed | WorkerLost | Quiet


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


def reserved(room: Room, event: Reserved, now: float) -> Transition:
    if room.state is State.BOOTSTRAPPING:
        moved = replace(room, state=State.WAITING_FOR_INPUT, changed_at=now, reservation=event.reservation)
        return Transition(moved, (Effect.PUSH_RESERVATION, Effect.PERSIST))
    if room.state is State.FAILED:
        # granted while the room failed: nobody will write there, unless this repeats what prefill was given
        return wrong_state(room, "reserved", () if room.quarantined else (Effect.RELEASE,))
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
    pushed = room.reservation is not None
    failed = replace(room, state=State.FAILED, changed_at=now, reason=reason, message=message, quarantined=pushed)
    release = () if pushed else (Effect.RELEASE,)
    return Transition(failed, (Effect.END_PREFILL, Effect.END_DECODE, *release, Effect.END_ROUTER, Effect.PERSIST))


def expire(room: Room, now: float) -> Transition:
    deadline = room.deadline
    if deadline is None or now < deadline.at:
        return wrong_state(room, "deadline passed")
    return fail(room, deadline.reason, deadline.message, now)


def worker_lost(room: Room, event: WorkerLost, now: float) -> Transition:
    """The lost worker is told nothing; a lost prefill worker cannot write, a lost decode worker has no pages."""
    gone = {
        Party.PREFILL: (Effect.END_PREFILL,),
        Party.DECODE: (Effect.END_DECODE, Effect.RELEASE),
    }[event.which]
    released = (Effect.RELEASE,) if event.which is Party.PREFILL else ()
    if room.at_rest:
        return Transition(room)
    if room.quarantined:
        return Transition(replace(room, quarantined=False), (*released, Effect.PERSIST))
    message = event.message or f"the {event.which} worker is gone"
    failed = fail(room, Reason.WORKER_LOST, message, now)
    effects = [effect for effect in failed.effects if effect not in gone]
    if released and Effect.RELEASE not in effects:
        effects.insert(effects.index(Effect.END_DECODE) + 1, Effect.RELEASE)
    return Transition(replace(failed.room, quarantined=False), tuple(effects))


def quiet(room: Room) -> Transition:
    if not room.state.terminal:
        return wrong_state(room, "quiet")
    if not room.quarantined:
        return Transition(room)
    return Transition(replace(room, quarantined=False), (Effect.RELEASE, Effect.PERSIST))


def wrong_state(room: Room, event: str, effects: tuple[Effect, ...] = ()) -> Transition:
    ended = f" ({room.reason})" if room.reason else ""
    return refuse(room, Reason.WRONG_STATE, f"{event!r} does not fit a room that is {room.state}{ended}", effects)


def refuse(room: Room, reason: Reason, message: str, effects: tuple[Effect, ...] = ()) -> Transition:
    return Transition(room, effects, Refusal(reason, message))
