"""What happened to every room: who caused it, when, and how busy its workers were at that moment.

Noting something costs a tuple and two look-ups; messages are made only when somebody asks or watches. Everything is
in memory and bounded: a timeline lives as long as its room is kept.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, TypeVar

from common.errors.base import Reason
from common.mesh import room as machine
from common.mesh.outbox import Outbox
from common.mesh.room import Refusal, Room, State
from common.mesh.shards import shard_of_room
from pdmesh.v1 import bootstrap_service_pb2 as pb
from pdmesh.v1 import types_pb2 as types

ROUTER, TIMER, OPERATOR, BOOTSTRAP = "router", "timer", "operator", "bootstrap"
T = TypeVar("T")

OPENED, CLOSED, RESTORED = "Opened", "Closed", "Restored"

STATES = {state: types.RoomState.Value(f"ROOM_STATE_{state}") for state in State}

# Refused events that one room shows; transitions are few and always kept.
MAX_REFUSALS = 32
# Changes that a watcher may leave unread.
WATCH_LIMIT = 10_000
# Ends of a worker's lives that are remembered, and losses of the store.
MAX_LOSSES = 16


class Figures(NamedTuple):
    """A worker between two heartbeats. `load` is never changed."""

    state: types.WorkerState.ValueType
    load: types.WorkerLoad
    told_at: float


class Moment(NamedTuple):
    """One line of a timeline; times are seconds since 1970."""

    at: float
    event: str
    by: str
    state: State
    prefill: Figures | None
    decode: Figures | None
    reason: str = ""
    message: str = ""
    refusal: Refusal | None = None
    times: int = 1
    transfer: types.TransferStats | None = None


Watcher = Outbox[tuple[Room, Moment]]


@dataclass(slots=True)
class Timeline:
    """A room's moments in order, and how many refusals are not among them."""

    moments: list[Moment] = field(default_factory=list)
    refusals: int = 0
    dropped: int = 0

    @property
    def transfer(self) -> types.TransferStats | None:
        """How the room's pages travelled, as far as that was told."""
        return next((moment.transfer for moment in reversed(self.moments) if moment.transfer), None)

    def add(self, moment: Moment) -> None:
        """Append a moment; a refusal that was there before is counted instead."""
        if moment.refusal is None:
            self.moments.append(moment)
            return
        for index, earlier in enumerate(self.moments):
            if earlier.refusal == moment.refusal and (earlier.event, earlier.by) == (moment.event, moment.by):
                self.moments[index] = earlier._replace(times=earlier.times + 1)
                return
        if self.refusals < MAX_REFUSALS:
            self.refusals += 1
            self.moments.append(moment)
        else:
            self.dropped += 1


class Kept(Protocol):
    """What a journal needs of a room's entry."""

    room: Room
    timeline: Timeline


class Refused(NamedTuple):
    """A room that was not opened."""

    at: float
    wanted: pb.OpenRoom
    reason: str
    message: str


class Failure(NamedTuple):
    """A request that failed at a router."""

    at: float
    reason: str
    message: str
    decodes: tuple[tuple[str, Figures], ...]  # decode workers at that time


class Queued(NamedTuple):
    """A request that waits at a router, and what for."""

    at: float
    message: str


class Loss(NamedTuple):
    """The end of a worker's life."""

    at: float
    message: str
    silent_s: float


class Takeover(NamedTuple):
    """A shard came from another owner; `words` say who took over from whom."""

    at: float
    words: str


@dataclass(slots=True)
class Outage:
    """The store was out of reach. Without `until` it still is."""

    since: float
    until: float | None = None


class Journal:
    """Keeps the timelines of all rooms, and what else `Explain` has to know.

    `figures` tells a worker's by its id, `decodes` those of some decode workers with their ids.
    """

    def __init__(
        self,
        now: Callable[[], float],
        figures: Callable[[str], Figures | None],
        decodes: Callable[[], tuple[tuple[str, Figures], ...]],
        history: int,
    ) -> None:
        self._now = now
        self._figures, self._decodes = figures, decodes
        self._history = max(history, 1)
        self._watchers: list[tuple[pb.WatchRoomsRequest, Watcher]] = []
        self._refused: OrderedDict[str, list[Refused]] = OrderedDict()
        self._failures: OrderedDict[str, Failure] = OrderedDict()
        self._queued: OrderedDict[str, Queued] = OrderedDict()
        self._losses: OrderedDict[str, deque[Loss]] = OrderedDict()
        self._takeovers: dict[int, Takeover] = {}
        self._outages: deque[Outage] = deque(maxlen=MAX_LOSSES)

    # ---------------------------------------------------------------------------------- notes

    def note(self, entry: Kept, event: str, by: str, reason: str = "", message: str = "") -> None:
        """Something happened to a room; it has its new state already."""
        self._add(entry, event, by, reason, message)

    def applied(self, entry: Kept, event: machine.Event, by: str, before: Room, refusal: Refusal | None) -> None:
        """The state machine was given an event. One that repeats what is known leaves no trace, unless it is the first
        that may tell why a room failed: a worker often hears of an end before bootstrap does."""
        if entry.room is before and refusal is None and not self._tells_why(entry, event):
            return
        reason, message = getattr(event, "reason", ""), getattr(event, "message", "")
        if isinstance(event, machine.DeadlinePassed) and refusal is None:
            reason, message = entry.room.reason, entry.room.message
        self._add(entry, type(event).__name__, by, reason, message, refusal, getattr(event, "transfer", None))

    def _tells_why(self, entry: Kept, event: machine.Event) -> bool:
        """Whether an event that changed nothing is worth a line.

        What failed at a worker may reach bootstrap by the router first, which does not say where.
        """
        if isinstance(event, machine.RoomFailed):
            return event.reason == entry.room.reason != Reason.ABORTED
        if not isinstance(event, machine.WorkerLost | machine.Abort):
            return False
        name = type(event).__name__
        return all(moment.event != name for moment in entry.timeline.moments)

    def taken_over(self, entry: Kept) -> None:
        """A room came with its shard, as the store had it. What happened to it before was told to another."""
        room, now, words = entry.room, self._now(), ""
        if taken := self._takeovers.get(shard_of_room(room.ticket.room_id)):
            age_s, lasted_s = now - room.opened_at, now - room.changed_at
            words = (
                f"{taken.words}, {age_s:.3f} s after the room was opened and {lasted_s:.3f} s after it was {room.state}"
            )
        self.note(entry, RESTORED, BOOTSTRAP, message=words)

    def brought_back(self, entry: Kept, epoch: int) -> None:
        """A room came with its router, for the store did not have it. `epoch` is that of its owner from now on."""
        ticket = entry.room.ticket
        if taken := self._takeovers.get(shard_of_room(ticket.room_id)):
            words = f"{taken.words}, who had not written of the room to the store yet; its router brought it"
        else:
            words = f"its router brought it from an earlier bootstrap, of epoch {ticket.epoch}, to this one, of {epoch}"
        self.note(entry, RESTORED, ROUTER, message=words)

    def refused(self, wanted: pb.OpenRoom, reason: str, message: str) -> None:
        """A room was not opened."""
        refusals = bounded(self._refused, wanted.request_id, list, self._history)
        if len(refusals) < MAX_REFUSALS:
            refusals.append(Refused(self._now(), wanted, reason, message))

    def request_failed(self, failed: pb.RequestFailed) -> None:
        """A router tells that a request failed; the last word counts."""
        failure = Failure(self._now(), failed.reason, failed.message, self._decodes())
        self._failures.pop(failed.request_id, None)
        bounded(self._failures, failed.request_id, lambda: failure, self._history)

    def request_queued(self, queued: pb.RequestQueued) -> None:
        """A router tells that a request waits for a room; the first word counts."""
        waiting = Queued(self._now(), queued.message)
        bounded(self._queued, queued.request_id, lambda: waiting, self._history)

    def worker_lost(self, worker_id: str, message: str) -> None:
        """A worker's life ended."""
        figures, now = self._figures(worker_id), self._now()
        silent_s = now - figures.told_at if figures else 0.0
        losses = bounded(self._losses, worker_id, lambda: deque[Loss](maxlen=MAX_LOSSES), self._history)
        losses.append(Loss(now, message, silent_s))

    def took_over(self, shard: int, words: str) -> None:
        """A shard is ours that was another's."""
        self._takeovers[shard] = Takeover(self._now(), words)

    def store_lost(self, for_s: float) -> None:
        """Nothing could be written for so long, and cannot be now."""
        self._outages.append(Outage(self._now() - for_s))

    def store_back(self) -> None:
        """What waited is being written."""
        if self._outages:
            self._outages[-1].until = self._now()

    # ---------------------------------------------------------------------------------- questions

    def refusals_of(self, request_id: str) -> list[Refused]:
        return self._refused.get(request_id, [])

    def queued_of(self, request_id: str) -> Queued | None:
        return self._queued.get(request_id)

    def failure_of(self, request_id: str) -> Failure | None:
        return self._failures.get(request_id)

    def loss_of(self, worker_id: str, since: float, until: float) -> Loss | None:
        """The first end of a life of the worker in that time."""
        return next((loss for loss in self._losses.get(worker_id, ()) if since <= loss.at <= until), None)

    def takeover_of(self, shard: int) -> Takeover | None:
        return self._takeovers.get(shard)

    def outages(self, since: float, until: float) -> list[Outage]:
        """Those of the store that fall into that time."""
        return [outage for outage in self._outages if outage.since <= until and since <= (outage.until or until)]

    def figures(self, worker_id: str) -> Figures | None:
        """The worker at this moment."""
        return self._figures(worker_id)

    # ---------------------------------------------------------------------------------- watching

    def watch(self, wanted: pb.WatchRoomsRequest) -> Watcher:
        """A queue of all changes from now on that `wanted` asks for; give it back to `unwatch`."""
        watcher: Watcher = Outbox(WATCH_LIMIT)
        self._watchers.append((wanted, watcher))
        return watcher

    def unwatch(self, watcher: Watcher) -> None:
        self._watchers = [entry for entry in self._watchers if entry[1] is not watcher]

    def close(self) -> None:
        """End all watchers after what is queued for them."""
        for _, watcher in self._watchers:
            watcher.close()

    def _add(
        self,
        entry: Kept,
        event: str,
        by: str,
        reason: str,
        message: str,
        refusal: Refusal | None = None,
        transfer: types.TransferStats | None = None,
    ) -> None:
        room = entry.room
        prefill, decode = self._figures(room.prefill_worker_id), self._figures(room.decode_worker_id)
        moment = Moment(
            self._now(), event, by, room.state, prefill, decode, reason, message, refusal, transfer=transfer
        )
        entry.timeline.add(moment)
        for wanted, watcher in self._watchers:
            if matches(room, wanted):
                watcher.put((room, moment))


def matches(room: Room, wanted: pb.WatchRoomsRequest | pb.ListRoomsRequest) -> bool:
    """Whether a room is in the state, of the worker and of the request that are asked for; unset: all."""
    return (
        wanted.request_id in ("", room.request_id)
        and wanted.worker_id in ("", room.prefill_worker_id, room.decode_worker_id)
        and wanted.state in (types.ROOM_STATE_UNSPECIFIED, STATES[room.state])
    )


def bounded(table: OrderedDict[str, T], key: str, make: Callable[[], T], limit: int) -> T:
    """The value under `key`, made when there is none; the oldest leaves when there are too many."""
    if (value := table.get(key)) is None:
        value = table[key] = make()
        if len(table) > limit:
            table.popitem(last=False)
    return value
