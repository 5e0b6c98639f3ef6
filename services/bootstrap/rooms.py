"""The rooms: the state machine's events in, its effects out."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import cast

from common.errors.base import MeshError, Reason
from common.mesh import room as machine
from common.mesh.outbox import Outbox
from common.mesh.room import Effect, Party, Room, State, Timeouts
from common.mesh.shards import new_room_id, shard_of_room
from common.mesh.ticket import Ticket
from common.mesh.wire import ticket_from, ticket_to
from common.obs.log import get_logger
from pdmesh.v1 import bootstrap_service_pb2 as pb
from pdmesh.v1 import types_pb2 as types
from services.bootstrap import metrics, timeline, wire
from services.bootstrap.early import Early
from services.bootstrap.pairing import check_pair
from services.bootstrap.timeline import Journal, Timeline
from services.bootstrap.timers import Timers
from services.bootstrap.workers import Workers

log = get_logger(__name__)

RouterOutbox = Outbox[pb.MeshEvent]

# Which of a room's workers may say what.
SPEAKERS: dict[type, set[Party]] = {
    machine.Reserved: {Party.DECODE},
    machine.Transferring: {Party.PREFILL},
    machine.Transferred: {Party.DECODE},
    machine.RoomFailed: {Party.PREFILL, Party.DECODE},
    machine.Quiet: {Party.PREFILL},
    machine.Fenced: {Party.DECODE},
}


@dataclass
class Entry:
    """A room and who follows it. `number` orders rooms by opening; a `closed` one leaves once it is at rest."""

    room: Room
    number: int
    router: RouterOutbox | None
    closed: bool = False
    retired: bool = False
    writer: types.Writer | None = None  # who writes to decode's pages, as decode told after a change of owners
    timeline: Timeline = field(default_factory=Timeline)


class Rooms:
    """All rooms that are open, and the last `history` that were closed.

    Everything runs in the event loop and takes effect at once; what others are to be told goes into their
    outboxes, in order.
    """

    def __init__(
        self,
        now: Callable[[], float],
        timers: Timers[tuple[str, str]],
        *,
        shard_of: Callable[[str], int],
        epoch_of: Callable[[int], int],
        timeouts: Timeouts,
        history: int,
        workers: Workers,
        journal: Journal,
        persist: Callable[[Room], None],
        forget: Callable[[str], None],
    ) -> None:
        self._now = now
        self._timers = timers
        self._shard_of, self._epoch_of = shard_of, epoch_of
        self._timeouts = timeouts
        self._history = history
        self._workers = workers
        self._journal = journal
        self._persist, self._forget = persist, forget
        self._count = 0
        self._entries: dict[str, Entry] = {}
        self._by_request: dict[tuple[str, int, int], Entry] = {}
        self._by_shard: defaultdict[int, dict[str, Entry]] = defaultdict(dict)
        self._by_worker: defaultdict[str, set[str]] = defaultdict(set)
        self._by_router: defaultdict[RouterOutbox, set[str]] = defaultdict(set)
        self._retired: deque[str] = deque()
        self.early = Early(now, timers, self._on_unknown)
        # What recovery has to do with a room: `on_unknown` is given an event for one that is not known, and tells
        # whether it took it; `on_adopted` a room that its router brought back.
        self.on_unknown: Callable[[str, pb.WorkerEvent], bool] = lambda worker_id, event: False
        self.on_adopted: Callable[[Entry], None] = lambda entry: None

    # ---------------------------------------------------------------------------------- of routers

    def open(self, router: RouterOutbox, wanted: pb.OpenRoom) -> None:
        """Open a room, or find the one that was opened for this request, index and attempt.

        `router` is told the ticket, unless it named it, or the refusal.
        """
        try:
            entry = self._by_request.get((wanted.request_id, wanted.index, wanted.attempt))
            if entry is None:
                entry = self._new(router, wanted)
            elif entry.closed:
                raise MeshError(Reason.WRONG_STATE, f"room {entry.room.ticket} was closed already")
            elif wanted.HasField("ticket") and ticket_from(wanted.ticket) != entry.room.ticket:
                raise MeshError(Reason.WRONG_STATE, f"the room was opened as {entry.room.ticket}")
            else:
                self._follow(entry, router)
        except MeshError as error:
            metrics.ROOMS_REFUSED.labels(error.reason).inc()
            if error.reason is not Reason.NOT_OWNER:  # the router asks again, elsewhere
                self._journal.refused(wanted, error.reason, error.message)
            refused = pb.OpenRefused(
                request_id=wanted.request_id,
                index=wanted.index,
                attempt=wanted.attempt,
                reason=error.reason,
                message=error.message,
                retryable=error.retryable,
            )
            router.put(pb.MeshEvent(open_refused=refused))
            return
        ticket = entry.room.ticket
        if not wanted.HasField("ticket"):
            opened = pb.RoomOpened(request_id=wanted.request_id, index=wanted.index, ticket=ticket_to(ticket))
            router.put(pb.MeshEvent(opened=opened))
        if entry.room.state.terminal:
            router.put(pb.MeshEvent(ended=wire.ended_to(entry.room)))
        elif wanted.HasField("ticket"):
            self.on_adopted(entry)
            for worker_id, event in self.early.take(ticket):
                self.worker_event(worker_id, event)

    def abort(self, wanted: pb.AbortRoom, by: str = timeline.ROUTER) -> None:
        """End a room as FAILED, if it has not ended."""
        ticket = ticket_from(wanted.ticket)
        if entry := self._entries.get(ticket.room_id):
            self._apply(entry, machine.Abort(ticket, wanted.reason or Reason.ABORTED, wanted.message), by)

    def close(self, ticket: Ticket, why: str = "") -> None:
        """The router is done with a room: it leaves once it is at rest.

        Not an abort: a short sequence may be over for the router before decode's news of the transfer is here.
        """
        entry = self._entries.get(ticket.room_id)
        if entry is None or entry.room.ticket != ticket:
            return
        entry.closed = True
        self._journal.note(entry, timeline.CLOSED, timeline.ROUTER, message=why)
        self._retire_if_at_rest(entry)

    def router_lost(self, router: RouterOutbox) -> None:
        """Nobody follows the router's rooms any more: abort those that have not ended, and close all."""
        for room_id in sorted(self._by_router.pop(router, ())):
            entry = self._entries[room_id]
            entry.router, entry.closed = None, True
            if entry.room.state.terminal:
                self._retire_if_at_rest(entry)
            else:
                self._apply(
                    entry, machine.Abort(entry.room.ticket, Reason.ABORTED, "the router is gone"), timeline.BOOTSTRAP
                )

    # ---------------------------------------------------------------------------------- of workers

    def worker_event(self, worker_id: str, event: pb.WorkerEvent) -> None:
        """What a worker says of a room. A refusal is told to it; nothing is raised."""
        said = wire.room_event_from(event)
        if said is None:
            return
        entry = self._entries.get(said.ticket.room_id)
        if entry is None:
            if self._may_be_opened(said.ticket):
                self.early.hold(said.ticket, worker_id, event)
            else:
                self._on_unknown(worker_id, event)
        elif self._parties(entry.room, worker_id).isdisjoint(SPEAKERS[type(said)]):
            refusal = machine.Refusal(Reason.NOT_FOUND, f"room {said.ticket} is not of worker {worker_id}")
            self._refuse(worker_id, said, refusal)
            self._journal.applied(entry, said, worker_id, entry.room, refusal)
        elif isinstance(said, machine.Quiet) and not self.may_speak_for_writer(worker_id, entry):
            message = f"room {said.ticket} was written to by an earlier process of worker {worker_id}"
            refusal = machine.Refusal(Reason.STALE_TICKET, message)
            self._refuse(worker_id, said, refusal)
            self._journal.applied(entry, said, worker_id, entry.room, refusal)
        else:
            self._apply(entry, said, worker_id, worker_id)

    def may_speak_for_writer(self, worker_id: str, entry: Entry) -> bool:
        """Whether the worker's present process is the room's writer, and not one that was started in its place."""
        writer = cast(types.Writer | None, entry.room.writer) or entry.writer
        return writer is None or self._workers.is_process(worker_id, writer)

    def worker_lost(self, worker_id: str, message: str, last: types.Worker | None = None) -> None:
        """A worker's life ended: its rooms fail. `last` is its record, unless that is still among the workers."""
        member = self._workers.get(worker_id)
        record = member.record if member else last
        known = types.Writer(endpoints=record.endpoints, epoch=record.epoch) if record else types.Writer()
        for entry in self.of_worker(worker_id):
            writer = entry.writer or known
            for party in self._parties(entry.room, worker_id):
                self._apply(entry, machine.WorkerLost(entry.room.ticket, party, message, writer), timeline.BOOTSTRAP)
            if entry.room.at_rest:  # else the worker may come back, and with it an end of the quarantine
                self._by_worker[worker_id].discard(entry.room.ticket.room_id)
        if not self._by_worker.get(worker_id):
            self._by_worker.pop(worker_id, None)

    def alarm(self, room_id: str) -> None:
        """The timer of a room fired."""
        entry = self._entries.get(room_id)
        if entry is None:
            return
        deadline = entry.room.deadline
        if deadline is None:
            return
        if deadline.at <= self._now():
            self._apply(entry, machine.DeadlinePassed(entry.room.ticket), timeline.TIMER)
        else:
            self._timers.set(("room", room_id), deadline.at)

    # ---------------------------------------------------------------------------------- change of owners

    def load(self, records: Iterable[types.Room]) -> None:
        """Take over rooms as an earlier owner wrote them. Those that have not ended go on."""
        for record in sorted(records, key=lambda record: record.opened_at.ToNanoseconds()):
            room = replace(wire.room_from(record), timeouts=self._timeouts, recovered=True)
            if room.ticket.room_id in self._entries:
                continue
            entry = self._add(room, router=None)
            self._journal.taken_over(entry)
            if room.at_rest:
                entry.closed = True
                self._retire(entry)
            else:
                self._begin(entry)

    def drop(self, shard: int) -> None:
        """Forget the rooms of a shard that is another's now."""
        self.early.drop(shard)
        for entry in self._by_shard.pop(shard, {}).values():
            room = entry.room
            del self._entries[room.ticket.room_id]
            self._by_request.pop((room.request_id, room.index, room.ticket.attempt), None)
            self._timers.cancel(("room", room.ticket.room_id))
            if not entry.retired:
                self._let_go(entry)
                metrics.ROOMS.labels(room.state).dec()
                metrics.ROOMS_QUARANTINED.dec(room.quarantined)

    def in_shard(self, shard: int) -> list[Entry]:
        """All rooms of a shard that are kept."""
        return list(self._by_shard.get(shard, {}).values())

    def of_worker(self, worker_id: str) -> list[Entry]:
        """The worker's rooms that are not at rest, and those that the router has not closed."""
        return [self._entries[room_id] for room_id in sorted(self._by_worker.get(worker_id, ()))]

    def find(self, room_id: str) -> Entry | None:
        return self._entries.get(room_id)

    def apply(self, entry: Entry, event: machine.Event, by: str) -> None:
        """Give a room's machine an event that nobody waits for an answer to."""
        self._apply(entry, event, by)

    def remind_prefill(self, entry: Entry) -> None:
        """Say to prefill once more where the pages go, or that the room ended."""
        self._apply(entry, machine.Held(entry.room.ticket, Party.PREFILL), timeline.BOOTSTRAP)

    def remind_decode(self, entry: Entry) -> None:
        """Say to decode once more that the room ended, and what may become of its pages."""
        self._apply(entry, machine.Held(entry.room.ticket, Party.DECODE), timeline.BOOTSTRAP)

    # ---------------------------------------------------------------------------------- inspection

    def get(self, room_id: str) -> Entry:
        """Raises `MeshError` (NOT_FOUND)."""
        if entry := self._entries.get(room_id):
            return entry
        raise MeshError(Reason.NOT_FOUND, f"no room {room_id!r}", parameter="room_id")

    def newest_first(self, before: int | None = None) -> Iterator[tuple[int, Room]]:
        """Rooms with their numbers, from the newest, or from the one before number `before`, back."""
        for entry in reversed(self._entries.values()):
            if before is None or entry.number < before:
                yield entry.number, entry.room

    def of_request(self, request_id: str) -> list[Entry]:
        """The rooms of a request, by sequence and attempt. Looks at every room that is kept."""
        entries = [entry for entry in self._entries.values() if entry.room.request_id == request_id]
        return sorted(entries, key=lambda entry: (entry.room.index, entry.room.ticket.attempt))

    # ---------------------------------------------------------------------------------- the machine's sides

    def _new(self, router: RouterOutbox, wanted: pb.OpenRoom) -> Entry:
        now = self._now()
        ticket = self._ticket_of(wanted)
        adopted = ticket.epoch < self._epoch_of(shard_of_room(ticket.room_id))
        if not adopted:  # the workers of one that was opened before may not have found us yet
            self._check_workers(wanted)
        deadline = wire.time_of(wanted, "deadline")
        if deadline is not None and deadline <= now:
            raise MeshError(Reason.DEADLINE_EXCEEDED, "the request's deadline passed before its room was opened")
        room = Room(
            ticket=ticket,
            request_id=wanted.request_id,
            index=wanted.index,
            prefill_worker_id=wanted.prefill_worker_id,
            decode_worker_id=wanted.decode_worker_id,
            opened_at=now,
            changed_at=now,
            timeouts=self._timeouts,
            request_deadline=deadline,
            admission_deadline=wire.time_of(wanted, "admission_deadline"),
            prompt_tokens=wanted.prompt_tokens,
            max_new_tokens=wanted.max_new_tokens,
            recovered=adopted,
        )
        entry = self._add(room, router)
        if adopted:
            self._journal.brought_back(entry, self._epoch_of(shard_of_room(ticket.room_id)))
        else:
            self._journal.note(entry, timeline.OPENED, timeline.ROUTER)
        self._begin(entry)
        self._by_router[router].add(room.ticket.room_id)
        self._persist(room)
        metrics.ROOMS_OPENED.inc()
        log.debug("room opened", room_id=room.ticket.room_id, request_id=room.request_id, attempt=room.ticket.attempt)
        return entry

    def _ticket_of(self, wanted: pb.OpenRoom) -> Ticket:
        """A fresh ticket, by us or by the router, or that under which an earlier owner opened the room.

        Raises `MeshError`: NOT_OWNER; STALE_TICKET for one of a later owner; WRONG_STATE for a name that is taken.
        """
        if not wanted.HasField("ticket"):
            shard = self._shard_of(wanted.request_id)
            epoch = self._epoch_of(shard)
            return Ticket(new_room_id(epoch, f"{self._count + 1:x}", shard), wanted.attempt, epoch)
        ticket = ticket_from(wanted.ticket)
        if ticket.epoch > self._epoch_of(shard_of_room(ticket.room_id)):
            raise MeshError(Reason.STALE_TICKET, f"room {ticket} was opened by a later owner")
        if ticket.room_id in self._entries:
            raise MeshError(Reason.WRONG_STATE, f"there is another room {ticket.room_id!r}")
        return ticket

    def _may_be_opened(self, ticket: Ticket) -> bool:
        """Whether the opening of a room that is not known may be on its way: it is named in our present epoch then."""
        try:
            return ticket.epoch == self._epoch_of(shard_of_room(ticket.room_id))
        except MeshError:
            return False

    def _check_workers(self, wanted: pb.OpenRoom) -> None:
        names = (wanted.prefill_worker_id, wanted.decode_worker_id)
        members = [self._workers.get(name) for name in names]
        for name, member in zip(names, members, strict=True):
            if member is None:
                raise MeshError(Reason.NO_WORKER, f"no worker {name!r}")
        prefill, decode = (member.record for member in members if member)
        check_pair(prefill, decode)

    def _begin(self, entry: Entry) -> None:
        """A room that is not at rest is now among ours."""
        room = entry.room
        for worker_id in (room.prefill_worker_id, room.decode_worker_id):
            self._by_worker[worker_id].add(room.ticket.room_id)
        self._watch(entry)
        metrics.ROOMS.labels(room.state).inc()
        metrics.ROOMS_QUARANTINED.inc(room.quarantined)

    def _let_go(self, entry: Entry) -> None:
        """Neither its workers nor its router are ours to tell any more."""
        name = entry.room.ticket.room_id
        for worker_id in (entry.room.prefill_worker_id, entry.room.decode_worker_id):
            if rooms := self._by_worker.get(worker_id):
                rooms.discard(name)
        if entry.router is not None:
            self._by_router[entry.router].discard(name)
            entry.router = None

    def _add(self, room: Room, router: RouterOutbox | None) -> Entry:
        self._count += 1
        entry = Entry(room, self._count, router)
        self._entries[room.ticket.room_id] = entry
        self._by_shard[shard_of_room(room.ticket.room_id)][room.ticket.room_id] = entry
        self._by_request[room.request_id, room.index, room.ticket.attempt] = entry
        return entry

    def _follow(self, entry: Entry, router: RouterOutbox) -> None:
        room_id = entry.room.ticket.room_id
        if entry.router is not None:
            self._by_router[entry.router].discard(room_id)
        entry.router = router
        self._by_router[router].add(room_id)

    def _apply(self, entry: Entry, event: machine.Event, by: str, speaker: str | None = None) -> None:
        before = entry.room
        transition = machine.next(before, event, self._now())
        entry.room = transition.room
        self._journal.applied(entry, event, by, before, transition.refusal)
        for effect in transition.effects:
            self._perform(effect, entry)
        if refusal := transition.refusal:
            self._refuse(speaker, event, refusal)
        if entry.room is not before:
            if not entry.retired:
                self._account(before, entry.room)
            self._watch(entry)
            self._retire_if_at_rest(entry)

    def _perform(self, effect: Effect, entry: Entry) -> None:
        room = entry.room
        match effect:
            case Effect.PUSH_RESERVATION:
                self._tell(room.prefill_worker_id, pb.ControlEvent(reserved=wire.reserved_to(room)))
            case Effect.END_PREFILL:
                self._tell(room.prefill_worker_id, pb.ControlEvent(ended=wire.ended_to(room)))
            case Effect.END_DECODE:
                self._tell(room.decode_worker_id, pb.ControlEvent(ended=wire.ended_to(room)))
            case Effect.RELEASE:
                self._release(room.decode_worker_id, room.ticket)
            case Effect.FENCE:
                self._tell(room.decode_worker_id, pb.ControlEvent(released=wire.fence_to(room, entry.writer)))
            case Effect.END_ROUTER:
                if entry.router is not None and not entry.closed:
                    put = entry.router.put if room.state is State.FAILED else entry.router.put_at_leisure
                    put(pb.MeshEvent(ended=wire.ended_to(room)))
            case Effect.PERSIST:
                self._persist(room)

    def _on_unknown(self, worker_id: str, event: pb.WorkerEvent) -> None:
        """A word of a room that nobody has opened here."""
        said = wire.room_event_from(event)
        if said is not None and not self.on_unknown(worker_id, event):
            self._unknown(worker_id, said)

    def _unknown(self, worker_id: str, event: machine.Event) -> None:
        """A room of an earlier bootstrap, or long gone. Nobody was told to write to its pages but by that one."""
        if isinstance(event, machine.Quiet):
            # its decode worker is not known here; the others do not know the ticket
            for record in self._workers.records():
                if record.role == types.WORKER_ROLE_DECODE:
                    self._release(record.worker_id, event.ticket)
            return
        message = f"no room {event.ticket}"
        self._refuse(worker_id, event, machine.Refusal(Reason.NOT_FOUND, message))
        if isinstance(event, machine.Reserved):
            ended = pb.RoomEnded(
                ticket=ticket_to(event.ticket), state=types.ROOM_STATE_FAILED, reason=Reason.NOT_FOUND, message=message
            )
            self._tell(worker_id, pb.ControlEvent(ended=ended))
            self._release(worker_id, event.ticket)

    def _refuse(self, speaker: str | None, event: machine.Event, refusal: machine.Refusal) -> None:
        name, reason, message = type(event).__name__, refusal.reason, refusal.message
        metrics.EVENTS_REFUSED.labels(name, reason).inc()
        log.debug("event refused", room_id=event.ticket.room_id, event_name=name, reason=reason, why=message)
        if speaker is not None:
            refused = pb.EventRefused(ticket=ticket_to(event.ticket), event=name, reason=reason, message=message)
            self._tell(speaker, pb.ControlEvent(refused=refused))

    def _release(self, worker_id: str, ticket: Ticket) -> None:
        self._tell(worker_id, pb.ControlEvent(released=pb.RoomReleased(ticket=ticket_to(ticket))))

    def _tell(self, worker_id: str, event: pb.ControlEvent) -> None:
        if member := self._workers.get(worker_id):
            member.send(event)

    def _parties(self, room: Room, worker_id: str) -> set[Party]:
        workers = {Party.PREFILL: room.prefill_worker_id, Party.DECODE: room.decode_worker_id}
        return {party for party, name in workers.items() if name == worker_id}

    # ---------------------------------------------------------------------------------- book-keeping

    def _watch(self, entry: Entry) -> None:
        deadline = entry.room.deadline
        key = ("room", entry.room.ticket.room_id)
        if deadline is None:
            self._timers.cancel(key)
        else:
            self._timers.set(key, deadline.at)

    def _account(self, before: Room, after: Room) -> None:
        metrics.ROOMS_QUARANTINED.inc(after.quarantined - before.quarantined)
        if before.state is after.state:
            return
        metrics.ROOMS.labels(before.state).dec()
        metrics.ROOMS.labels(after.state).inc()
        metrics.ROOM_STATE_SECONDS.labels(before.state).observe(after.changed_at - before.changed_at)
        if not after.state.terminal:
            return
        metrics.ROOMS_ENDED.labels(after.reason or State.SUCCESS).inc()
        ids = {"room_id": after.ticket.room_id, "request_id": after.request_id}
        if after.state is State.FAILED:
            log.info("room failed", **ids, reason=after.reason, why=after.message, was=before.state)
        else:
            log.debug("room succeeded", **ids, seconds=round(after.changed_at - after.opened_at, 6))

    def _retire_if_at_rest(self, entry: Entry) -> None:
        if entry.closed and entry.room.at_rest and not entry.retired:
            metrics.ROOMS.labels(entry.room.state).dec()
            self._retire(entry)

    def _retire(self, entry: Entry) -> None:
        """Move a room into the history, and the oldest out of it."""
        room = entry.room
        entry.retired = True
        self._let_go(entry)
        self._retired.append(room.ticket.room_id)
        while len(self._retired) > self._history:
            if dropped := self._entries.pop(self._retired.popleft(), None):  # else its shard has left
                oldest = dropped.room
                self._by_shard[shard_of_room(oldest.ticket.room_id)].pop(oldest.ticket.room_id, None)
                self._by_request.pop((oldest.request_id, oldest.index, oldest.ticket.attempt), None)
                self._forget(oldest.ticket.room_id)
