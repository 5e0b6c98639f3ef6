"""Why a room failed or waits, in one sentence for a person at 3 a.m.: who, for how long, and the figures of that time.

Plain functions over a room, its timeline and the ends of workers' lives; nothing here decides anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from common.errors.base import Reason
from common.mesh.room import Room, State
from common.mesh.shards import shard_of_room
from pdmesh.v1 import types_pb2 as types
from services.bootstrap import timeline
from services.bootstrap.timeline import Failure, Figures, Journal, Kept, Loss, Moment

# Figures that are older are shown with their age.
RECENT_S = 1.0
# How long before its loss is noticed a worker may already have made others fail.
NOTICE_S = 3.0
# A room that is opened so soon after its shard changed hands may have waited for that.
RECENT_TAKEOVER_S = 10.0
# A request is given up by its client and by bootstrap within so much of its deadline.
DEADLINE_SLACK_S = 0.1

# What may be but the consequence of a worker's loss.
FOLLOWS_LOSS = (Reason.WORKER_LOST, Reason.TRANSFER_FAILED, Reason.BOOTSTRAP_UNREACHABLE, Reason.INTERNAL)
TIMEOUTS = (Reason.BOOTSTRAP_TIMEOUT, Reason.WAITING_TIMEOUT, Reason.TRANSFER_TIMEOUT)


@dataclass(frozen=True)
class Cause:
    """`reason` is empty when nothing failed; `at` is when it was decided, seconds since 1970."""

    sentence: str
    reason: str = ""
    at: float = 0.0


@dataclass(frozen=True)
class Scene:
    """A room with all that is known around it. `pages_for` gives the pages of so many tokens on decode."""

    entry: Kept
    journal: Journal
    now: float
    pages_for: Callable[[int], int]
    silent_after_s: float = 5.5  # without a heartbeat
    request_reason: str = ""  # with which the router says that the whole request failed

    @property
    def room(self) -> Room:
        return self.entry.room

    @property
    def moments(self) -> list[Moment]:
        return self.entry.timeline.moments

    def moment_of(self, state: State) -> Moment | None:
        """When the room entered a state."""
        return next((m for m in self.moments if m.state is state and m.refusal is None), None)

    def silence(self, figures: Figures | None, now: float, how: str = "it had not been heard from") -> str:
        """For a worker that was not heard from: for how long. Empty when it was."""
        if figures is None or now - figures.told_at < self.silent_after_s:
            return ""
        return f"{how} for {seconds(now - figures.told_at)}"

    def loss(self, since: float, until: float) -> tuple[str, Loss] | None:
        """The first of the room's workers that was lost in that time."""
        names = self.room.prefill_worker_id, self.room.decode_worker_id
        losses = [(name, loss) for name in names if (loss := self.journal.loss_of(name, since, until))]
        return min(losses, key=lambda entry: entry[1].at, default=None)


def explain(scene: Scene) -> Cause:
    """The first cause of a room's failure or wait, or how it went; and what befell the control plane meanwhile."""
    cause = first_cause(scene)
    return replace(cause, sentence=" ".join((cause.sentence, *meanwhile(scene))))


def first_cause(scene: Scene) -> Cause:
    match scene.room.state:
        case State.FAILED:
            return failed(scene)
        case State.SUCCESS:
            return succeeded(scene)
    room, now = scene.room, scene.now
    figures = scene.journal.figures(room.prefill_worker_id), scene.journal.figures(room.decode_worker_id)
    return Cause(f"Under way for {seconds(now - room.opened_at)}: {waiting(scene, room.state, now, *figures)}.")


# ------------------------------------------------------------------------------------------ endings


def failed(scene: Scene) -> Cause:
    room = scene.room
    end = scene.moment_of(State.FAILED) or Moment(room.changed_at, "", timeline.BOOTSTRAP, room.state, None, None)
    if end.event in ("", timeline.RESTORED):  # what led to it was known to an earlier bootstrap
        return Cause(f"It had failed before this bootstrap took it over: {room.message}.", room.reason, end.at)
    before = state_before(scene, end)
    reason, message, by = origin(scene, end)
    if reason in FOLLOWS_LOSS and (lost := scene.loss(room.opened_at, end.at + NOTICE_S)):
        return Cause(loss_words(room, *lost, f"while {phase(room, before)}"), Reason.WORKER_LOST, end.at)
    wait = waiting(scene, before, end.at, end.prefill, end.decode)
    if past_deadline(scene, reason, end.at):
        return Cause(deadline_words(room, wait), Reason.DEADLINE_EXCEEDED, end.at)
    if reason in TIMEOUTS or end.by == timeline.TIMER:
        return Cause(f"{capital(wait)}.", reason, end.at)
    who = {
        timeline.ROUTER: "The router gave the request up",
        timeline.OPERATOR: "An operator aborted the room",
        timeline.BOOTSTRAP: "Bootstrap gave the room up",
    }.get(by, f"{by} gave the room up")
    after = f"{seconds(end.at - room.opened_at)} after the room was opened, while {phase(room, before)}"
    return Cause(f"{who} {after}: {message}.", reason, end.at)


def origin(scene: Scene, end: Moment) -> tuple[str, str, str]:
    """Reason and message of a failure, and who caused it.

    When the router gives a request up, a worker may be the first to say so, and knows only that it was aborted; the
    router's own word comes a moment later. When a worker gives it up, the router may be the first to tell.
    """
    if end.event == "Abort":
        for moment in scene.moments:
            if moment.event == "RoomFailed" and moment.reason == end.reason:
                return moment.reason, moment.message, moment.by
    if end.event == "RoomFailed" and scene.room.reason == Reason.ABORTED:
        for moment in scene.moments:
            if moment.event == "Abort" and moment.at >= end.at:
                return moment.reason, moment.message, moment.by
    return scene.room.reason, scene.room.message, end.by


def succeeded(scene: Scene) -> Cause:
    """The hand-over went well; what came of the sequence is known only if somebody said so."""
    room, moments = scene.room, scene.moments
    done = f"The hand-over succeeded in {seconds(room.changed_at - room.opened_at)}"
    abort = next((m for m in moments if m.event == "Abort" and m.refusal and m.at >= room.changed_at), None)
    closed = next((m for m in moments if m.event == timeline.CLOSED), None)
    over = abort or closed
    generated = f"{room.decode_worker_id} generated"
    if abort or not closed:
        until = over.at + NOTICE_S if over else scene.now
        lost = scene.journal.loss_of(room.decode_worker_id, room.changed_at, until)
        if lost and (abort is None or abort.reason in FOLLOWS_LOSS):
            return Cause(
                loss_words(room, room.decode_worker_id, lost, f"while {generated}"), Reason.WORKER_LOST, lost.at
            )
    if abort is None:
        if closed and closed.message:
            return Cause(f"{done}; {closed.message} {seconds(closed.at - room.changed_at)} later.")
        if closed or scene.entry.timeline.moments[-1:] == [] or moments[-1].event == timeline.RESTORED:
            return Cause(f"{done}.")
        return Cause(
            f"{done} and {room.decode_worker_id} has generated for {seconds(scene.now - room.changed_at)} since."
        )
    if past_deadline(scene, abort.reason, abort.at):
        return Cause(
            deadline_words(room, f"{generated}{running_words(abort.decode)}"), Reason.DEADLINE_EXCEEDED, abort.at
        )
    after = seconds(abort.at - room.changed_at)
    words = f"{done}, but the router gave the request up {after} later, while {generated}: {abort.message}."
    return Cause(words, abort.reason, abort.at)


def router_failure(failure: Failure) -> Cause:
    """A request that failed at its router, without a room that tells more."""
    full = failure.reason == Reason.OVERLOADED
    loads = [pool_use(figures, f" of {name}") for name, figures in failure.decodes] if full else []
    then = f"; at that time {', and '.join(loads)}" if loads else ""
    return Cause(f"The router refused or ended the request: {failure.message}{then}.", failure.reason, failure.at)


def pending(scene: Scene) -> str:
    """What is still waited for after a room's end; empty when nothing is."""
    room = scene.room
    if not room.quarantined:
        return ""
    pages = plural(scene.pages_for(room.prompt_tokens), "page")
    waits = f"{pages} of {room.decode_worker_id} are in quarantine since {seconds(scene.now - room.changed_at)}"
    if not room.prefill_lost:
        return f"{waits}: {room.prefill_worker_id} has not said that it writes no more."
    if not room.decode_lost:
        return f"{waits}: {room.prefill_worker_id} is gone, and {room.decode_worker_id} has not fenced it off yet."
    return f"{waits}: both workers are gone; the quarantine ends with {room.decode_worker_id}'s process."


def meanwhile(scene: Scene) -> Iterator[str]:
    """Sentences on what happened to the control plane while the room lived, or right before."""
    room, moments = scene.room, scene.moments
    first = moments[0] if moments else None
    taken = scene.journal.takeover_of(shard_of_room(room.ticket.room_id))
    if first and first.event == timeline.RESTORED:
        if first.message:
            yield f"{capital(first.message)}."
    elif taken and 0 <= room.opened_at - taken.at < RECENT_TAKEOVER_S:
        yield f"{capital(taken.words)}, {seconds(room.opened_at - taken.at)} before the room was opened."
    until = moments[-1].at if moments and room.at_rest else scene.now
    for outage in scene.journal.outages(room.opened_at, until):
        if outage.until is None:
            lasts = seconds(scene.now - outage.since)
            yield f"The store is out of reach since {lasts}: what happens is in this replica's memory alone."
        else:
            lasted = seconds(outage.until - outage.since)
            yield f"The store was out of reach for {lasted} at that time: what happened was written later."


# ------------------------------------------------------------------------------------------ words


def waiting(scene: Scene, state: State, now: float, prefill: Figures | None, decode: Figures | None) -> str:
    """What a room in `state` waits for at time `now`, and what its workers were doing then."""
    room = scene.room
    entered = scene.moment_of(state)
    waited = seconds(now - (entered.at if entered else room.opened_at))
    match state:
        case State.BOOTSTRAPPING:
            why = scene.silence(decode, now) or pool_words(scene, decode) + as_of(decode, now)
            return f"{room.decode_worker_id} granted no pages for {waited}: {why}"
        case State.WAITING_FOR_INPUT:
            why = scene.silence(prefill, now) or prefill_words(prefill) + as_of(prefill, now)
            return (
                f"{room.prefill_worker_id} began no transfer for {waited} after {room.decode_worker_id} granted "
                f"{plural(scene.pages_for(room.prompt_tokens), 'page')}: {why}"
            )
        case State.TRANSFERRING:
            silent = [
                f"{name} was {words}"
                for name, figures in ((room.prefill_worker_id, prefill), (room.decode_worker_id, decode))
                if (words := scene.silence(figures, now, "silent"))
            ]
            what = f"the transfer from {room.prefill_worker_id} to {room.decode_worker_id} did not end for {waited}"
            return f"{what}: {' and '.join(silent) or 'both workers were alive; see their logs and the network'}"
    return f"the room was {state}"


def phase(room: Room, state: State) -> str:
    """What was going on, in a few words."""
    return {
        State.BOOTSTRAPPING: f"{room.decode_worker_id} had not yet granted pages",
        State.WAITING_FOR_INPUT: f"{room.prefill_worker_id} computed the prompt",
        State.TRANSFERRING: f"pages went from {room.prefill_worker_id} to {room.decode_worker_id}",
    }.get(state, f"the room was {state}")


def pool_words(scene: Scene, decode: Figures | None) -> str:
    """Why decode granted nothing, from its last load."""
    if decode is None:
        return "it is not registered"
    ledger, load = decode.load.ledger, decode.load
    total = sum_of(ledger)
    if not total:
        return "it had told no load"
    needed = scene.pages_for(scene.room.prompt_tokens)
    if ledger.free + ledger.cached >= needed and not load.running and not ledger.reserved:
        return f"though {ledger.free} of {total} pages were free and nothing ran: was it asked to?"
    waiting = f", {load.waiting} sequences waiting" if load.waiting > 1 else ""
    return f"{pool_use(decode)}, {needed} needed{waiting}"


def pool_use(decode: Figures, of_whom: str = "") -> str:
    """What a decode worker's pages were used for."""
    ledger = decode.load.ledger
    others = [
        f", {pages} {what}"
        for pages, what in (
            (ledger.reserved, "reserved for rooms"),
            (ledger.cached, "in the prefix cache"),
            (ledger.quarantined, "in quarantine"),
        )
        if pages
    ]
    sequences = plural(decode.load.running, "sequence")
    used = f"{ledger.in_use} of {sum_of(ledger)} pages{of_whom} were in use by {sequences}"
    return f"{used}{''.join(others)}, {ledger.free} free"


def sum_of(ledger: types.Ledger) -> int:
    return ledger.free + ledger.reserved + ledger.in_use + ledger.cached + ledger.quarantined


def prefill_words(prefill: Figures | None) -> str:
    """What prefill was busy with, from its last load."""
    if prefill is None:
        return "it is not registered"
    load = prefill.load
    if not load.running and not load.waiting:
        return "it was alive and idle"
    tokens = f" with {load.waiting_tokens} prompt tokens" if load.waiting_tokens else ""
    return f"it computed {plural(load.running, 'sequence')} and {load.waiting} waited{tokens}"


def running_words(decode: Figures | None) -> str:
    return f" ({plural(decode.load.running, 'sequence')} ran there)" if decode and decode.load.running else ""


def as_of(figures: Figures | None, now: float) -> str:
    """How old figures are that a heartbeat has yet to renew."""
    if figures is None or now - figures.told_at < RECENT_S:
        return ""
    return f" (as it told {seconds(now - figures.told_at)} before)"


def loss_words(room: Room, worker_id: str, loss: Loss, when: str) -> str:
    why = loss.message.removeprefix(f"worker {worker_id} is gone: ")
    return f"{worker_id} is gone, {seconds(loss.at - room.opened_at)} after the room was opened, {when}: {why}."


def deadline_words(room: Room, wait: str) -> str:
    allowed = "" if room.request_deadline is None else f" of {seconds(room.request_deadline - room.opened_at)}"
    return f"The request's deadline{allowed} passed while {wait}."


def past_deadline(scene: Scene, reason: str, at: float) -> bool:
    """Whether a request was given up because of its deadline, whoever was first to say so."""
    deadline = scene.room.request_deadline
    if Reason.DEADLINE_EXCEEDED in (reason, scene.request_reason):
        return True
    return reason == Reason.ABORTED and deadline is not None and at >= deadline - DEADLINE_SLACK_S


def state_before(scene: Scene, end: Moment) -> State:
    """The state that the room left at `end`."""
    earlier = [moment.state for moment in scene.moments if moment.at <= end.at and not moment.state.terminal]
    return earlier[-1] if earlier else State.BOOTSTRAPPING


def seconds(value: float) -> str:
    """As people read it: 0.012 s, 3.2 s, 300.0 s."""
    value = max(value, 0.0)
    return f"{value:.1f} s" if value >= 1 else f"{value:.3f} s"


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def capital(text: str) -> str:
    """Sentences begin with a capital, but a worker's name stays as it is."""
    return f"{text[0].upper()}{text[1:]}" if text.startswith(("the ", "replica ", "its ")) else text
