"""A router's sessions with bootstrap: a live view of the workers, and rooms opened, aborted and closed."""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from common.config.tls import Credentials
from common.errors.base import MeshError, Reason
from common.mesh.replicas import Link, Replicas
from common.mesh.session import unreachable
from common.mesh.shards import new_room_id, shard_of_request, shard_of_room
from common.mesh.ticket import Ticket
from common.mesh.wire import ticket_from, ticket_to
from pdmesh.v1 import bootstrap_service_pb2 as pb
from pdmesh.v1 import types_pb2

Opening = tuple[str, int, int]  # request, index and attempt

# How long a worker that a fresh replica does not know yet stays in the view: it is about to register there.
KEEP_WORKER_S = 10.0
ASK_AGAIN_S = 0.2
# How long rooms may be without an owner before they count as failed.
OWNERLESS_S = 30.0
SWEEP_S = 2.0
MAX_UNSENT = 10_000

# Of what the replicas say of one worker, the best holds: its session with one of them may be down.
STATES = (
    types_pb2.WORKER_STATE_DRAINING,
    types_pb2.WORKER_STATE_READY,
    types_pb2.WORKER_STATE_SUSPECT,
    types_pb2.WORKER_STATE_OFFLINE,
)


class RouterSession(Replicas["RouterLink"]):
    """Keeps a router in touch with every replica of bootstrap from `start` to `close`.

    `workers` is the view of the mesh by worker id, put together from what the replicas tell; while all are away it
    stays as it was. `ready` is set while there is a session whose view is complete. `on_workers_changed` is called
    after each change of the view, `on_room_ended` once for every open room that reached a terminal state, also
    (as FAILED, BOOTSTRAP_UNREACHABLE) when it had no owner for too long. Both run in the event loop.

    A room whose owner is gone stays open: the next owner is told of it, under its old ticket.
    """

    def __init__(
        self,
        address: str,
        on_workers_changed: Callable[[], None] | None = None,
        on_room_ended: Callable[[pb.RoomEnded], None] | None = None,
        tls: Credentials | None = None,
    ) -> None:
        super().__init__(address, tls)
        self.on_workers_changed = on_workers_changed
        self.on_room_ended = on_room_ended
        self.workers: dict[str, types_pb2.Worker] = {}
        self.ready = asyncio.Event()
        self._name, self._numbers = secrets.token_hex(6), itertools.count(1)  # of rooms that are named here
        self._opening: dict[Opening, tuple[asyncio.Future[Ticket], pb.OpenRoom]] = {}
        self._open: dict[Ticket, pb.OpenRoom] = {}
        self._unsent: defaultdict[int, list[pb.RouterEvent]] = defaultdict(list)
        self._vacant: dict[int, float] = {}  # shards that were seen without an owner, and since when
        self._timers: set[asyncio.TimerHandle] = set()

    def start(self) -> None:
        super().start()
        self._sweep()

    async def close(self) -> None:
        self.closing = True
        for timer in self._timers:
            timer.cancel()
        await super().close()
        self._fail_opening(unreachable(self.address, "the session was closed"))
        self._open.clear()

    def begin_room(self, room: pb.OpenRoom) -> Ticket | None:
        """Open a room under a ticket that is made here, and do not wait: its workers may be told at once.

        None while nobody is known to own its shard: `open_room` waits for an owner. That the room is refused,
        `on_room_ended` tells as its failure.
        """
        if self.closing or (owner := self.owners.of_request(room.request_id)) is None:
            return None
        shard = shard_of_request(room.request_id, self.owners.shards)
        epoch = self.owners.epoch(shard)
        name = new_room_id(epoch, f"{self._name}.{next(self._numbers):x}", shard)
        ticket = Ticket(name, room.attempt, epoch)
        room.ticket.CopyFrom(ticket_to(ticket))
        self._open[ticket] = room
        owner.outbox.put(pb.RouterEvent(open=room))
        return ticket

    async def open_room(self, room: pb.OpenRoom, timeout_s: float) -> Ticket:
        """Open a room and return its ticket; to be repeated with the same request, index and attempt at will.

        Waits for an owner of the room's shard, and asks the next one when it changes. Raises `MeshError`:
        BOOTSTRAP_UNREACHABLE without an answer within `timeout_s`, NO_WORKER, LAYOUT_MISMATCH, DEADLINE_EXCEEDED,
        WRONG_STATE for a room that was closed already.
        """
        if self.closing:
            raise unreachable(self.address, "the session was closed")
        key = (room.request_id, room.index, room.attempt)
        if key in self._opening:
            raise MeshError(Reason.WRONG_STATE, f"request {room.request_id}/{room.index} is being opened already")
        answer: asyncio.Future[Ticket] = asyncio.get_running_loop().create_future()
        self._opening[key] = answer, room
        if owner := self.owners.of_request(room.request_id):
            owner.outbox.put(pb.RouterEvent(open=room))
        try:
            async with asyncio.timeout(timeout_s):
                return await answer
        except (TimeoutError, asyncio.CancelledError) as left:
            if answer.done() and not answer.cancelled() and not answer.exception():
                self._unwanted(answer.result())  # it came at the last moment
            if isinstance(left, TimeoutError):
                raise unreachable(self.address, f"no answer within {timeout_s:g} s") from None
            raise
        finally:
            self._opening.pop(key, None)

    def abort_room(self, ticket: Ticket, reason: Reason, message: str) -> None:
        """End a room as FAILED; without effect on one that ended. `on_room_ended` tells the end."""
        abort = pb.AbortRoom(ticket=ticket_to(ticket), reason=reason, message=message)
        self._send(ticket, pb.RouterEvent(abort=abort))

    def close_room(self, ticket: Ticket, why: str = "") -> None:
        """The sequence is over, or goes on elsewhere, for a reason to be remembered: nothing more is told about the
        room. To give one up, abort it first."""
        self._open.pop(ticket, None)
        self._send(ticket, pb.RouterEvent(close=pb.CloseRoom(ticket=ticket_to(ticket), message=why)), hurry=False)

    def request_failed(self, request_id: str, error: MeshError) -> None:
        """Tell bootstrap that a request failed, so that it can be explained; without an owner its next one hears it."""
        if self.owners.shards:
            failed = pb.RequestFailed(request_id=request_id, reason=error.reason, message=error.message)
            shard = shard_of_request(request_id, self.owners.shards)
            self._send_to_owner(shard, pb.RouterEvent(request_failed=failed), hurry=True)

    def request_queued(self, request_id: str, why: str) -> None:
        """Tell bootstrap that a request waits here, so that it can be explained."""
        if owner := self.owners.of_request(request_id):
            queued = pb.RequestQueued(request_id=request_id, message=why)
            owner.outbox.put_at_leisure(pb.RouterEvent(request_queued=queued))

    def lost(self, error: MeshError) -> None:
        """A session broke. For those who want to know; the view and the rooms are kept."""

    # ---------------------------------------------------------------------------------- of the links

    def make_link(self, address: str) -> RouterLink:
        return RouterLink(self, address)

    def gained(self, link: RouterLink, shards: list[int]) -> None:
        """Bring a new owner the rooms that are open, ask it for those that are wanted, and what waited for it."""
        wanted = set(shards)
        for shard in shards:
            self._vacant.pop(shard, None)
        for ticket, room in self._open.items():
            if shard_of_room(ticket.room_id) in wanted:
                again = pb.OpenRoom()
                again.CopyFrom(room)
                again.ticket.CopyFrom(ticket_to(ticket))
                link.outbox.put(pb.RouterEvent(open=again))
        for _, room in self._opening.values():
            if shard_of_request(room.request_id, self.owners.shards) in wanted:
                link.outbox.put(pb.RouterEvent(open=room))
        for shard in shards:
            for event in self._unsent.pop(shard, ()):
                link.outbox.put(event)

    def link_ready(self) -> None:
        """A replica's view of the workers is complete."""
        self.ready.set()
        self.refresh()

    def link_lost(self, link: RouterLink, error: MeshError) -> None:
        self.owners.lost(link)
        if not self.up:
            self.ready.clear()
        if self.closing:
            return
        self.refresh()
        self.lost(error)

    def link_told(self, link: RouterLink, event: pb.MeshEvent) -> None:
        """An answer or a room's end; of a replica that does not own the room any more it is not heeded."""
        match event.WhichOneof("event"):
            case "opened":
                if self.owners.of_room(event.opened.ticket.room_id) is link:
                    self._room_opened(event.opened)
            case "open_refused":
                if self.owners.of_request(event.open_refused.request_id) is link:
                    self._open_refused(event.open_refused, link)
            case "ended":
                if self.owners.of_room(event.ended.ticket.room_id) is link:
                    self._room_ended(event.ended)

    def refresh(self, worker_id: str | None = None) -> None:
        """Put the view together anew, that of one worker or of all."""
        links = [link for link in self.up if link.complete]
        if not links:
            return
        everybody = set(self.workers).union(*(link.workers for link in links)) if worker_id is None else {worker_id}
        for name in everybody:
            told = [link.workers[name] for link in links if name in link.workers]
            if told:
                self.workers[name] = merge(told)
            elif not any(name in link.expected for link in links):
                self.workers.pop(name, None)
        if self.on_workers_changed:
            self.on_workers_changed()

    def later_refresh(self) -> None:
        self._later(KEEP_WORKER_S, self.refresh)

    # ---------------------------------------------------------------------------------- rooms

    def _send(self, ticket: Ticket, event: pb.RouterEvent, *, hurry: bool = True) -> None:
        self._send_to_owner(shard_of_room(ticket.room_id), event, hurry=hurry)

    def _send_to_owner(self, shard: int, event: pb.RouterEvent, *, hurry: bool) -> None:
        if owner := self.owners.of(shard):
            put = owner.outbox.put if hurry else owner.outbox.put_at_leisure
            put(event)
        else:
            unsent = self._unsent[shard]
            unsent.append(event)
            del unsent[:-MAX_UNSENT]

    def _unwanted(self, ticket: Ticket) -> None:
        self.abort_room(ticket, Reason.ABORTED, "whoever opened the room has left")
        self.close_room(ticket)

    def _room_opened(self, opened: pb.RoomOpened) -> None:
        ticket = ticket_from(opened.ticket)
        answer, room = self._opening.get((opened.request_id, opened.index, ticket.attempt), (None, None))
        if answer is not None and room is not None and not answer.done():
            self._open[ticket] = room
            answer.set_result(ticket)
        elif ticket not in self._open:
            self._unwanted(ticket)

    def _open_refused(self, refused: pb.OpenRefused, link: RouterLink) -> None:
        if refused.reason == Reason.NOT_OWNER:
            return  # the shard is moving: its next owner is asked as soon as it tells
        key = (refused.request_id, refused.index, refused.attempt)
        answer, wanted = self._opening.get(key, (None, None))
        if answer is not None and wanted is not None and not answer.done():
            if refused.reason == Reason.NO_WORKER and link.expects(wanted):
                self._later(ASK_AGAIN_S, lambda: self._ask_again(key))
                return
            answer.set_exception(MeshError(Reason(refused.reason), refused.message))
            return
        for ticket, room in self._open.items():
            if (room.request_id, room.index, room.attempt) == key:
                self._begun_refused(ticket, room, refused, link)
                return

    def _begun_refused(self, ticket: Ticket, room: pb.OpenRoom, refused: pb.OpenRefused, link: RouterLink) -> None:
        """The owner does not take a room that was opened without waiting, or under an owner before it."""
        if ticket.epoch < self.owners.epoch(shard_of_room(ticket.room_id)):
            self._end(ticket, refused.message)
        elif refused.reason == Reason.NO_WORKER and link.expects(room):
            self._later(ASK_AGAIN_S, lambda: self._begin_again(ticket))
        else:
            self._end(ticket, refused.message, Reason(refused.reason))

    def _begin_again(self, ticket: Ticket) -> None:
        if room := self._open.get(ticket):
            self._send(ticket, pb.RouterEvent(open=room))

    def _ask_again(self, key: Opening) -> None:
        if key in self._opening:
            room = self._opening[key][1]
            if owner := self.owners.of_request(room.request_id):
                owner.outbox.put(pb.RouterEvent(open=room))

    def _room_ended(self, ended: pb.RoomEnded) -> None:
        if self._open.pop(ticket_from(ended.ticket), None) is not None and self.on_room_ended:
            self.on_room_ended(ended)

    def _end(self, ticket: Ticket, message: str, reason: Reason = Reason.BOOTSTRAP_UNREACHABLE) -> None:
        """The room is lost to bootstrap, or was refused by it."""
        ended = pb.RoomEnded(ticket=ticket_to(ticket), state=types_pb2.ROOM_STATE_FAILED, message=message)
        ended.reason = reason
        self._room_ended(ended)

    def _sweep(self) -> None:
        """End rooms whose shard has had no owner for too long."""
        now = asyncio.get_running_loop().time()
        for ticket in list(self._open):
            shard = shard_of_room(ticket.room_id)
            if self.owners.of(shard) is None and now - self._vacant.setdefault(shard, now) >= OWNERLESS_S:
                self._end(ticket, unreachable(self.address, f"no owner for {OWNERLESS_S:g} s").message)
        self._later(SWEEP_S, self._sweep)

    def _fail_opening(self, error: MeshError) -> None:
        for answer, _ in self._opening.values():
            if not answer.done():
                answer.set_exception(error)

    def _later(self, seconds: float, what: Callable[[], None]) -> None:
        def run() -> None:
            self._timers.discard(timer)
            what()

        timer = asyncio.get_running_loop().call_later(seconds, run)
        self._timers.add(timer)


class RouterLink(Link):
    """A router's session with one replica. `workers` is that replica's view, `complete` once all of it is here.

    `expected` are workers that were known before, and that a replica which has just begun may not know yet.
    """

    def __init__(self, session: RouterSession, address: str) -> None:
        super().__init__(address, session.tls)
        self._session = session
        self.workers: dict[str, types_pb2.Worker] = {}
        self.expected: set[str] = set()
        self.complete = False

    def open(self, stub: Any) -> Any:
        return stub.RouterSession()

    def request(self, events: list[pb.RouterEvent]) -> pb.RouterSessionRequest:
        return pb.RouterSessionRequest(events=events)

    def opened(self) -> None:
        self.workers, self.expected = {}, set()

    def receive(self, event: pb.MeshEvent) -> None:
        match event.WhichOneof("event"):
            case "worker":
                self.workers[event.worker.worker_id] = event.worker
                self._changed(event.worker.worker_id)
            case "gone":
                self.expected.discard(event.gone.worker_id)
                if self.workers.pop(event.gone.worker_id, None) is not None:
                    self._changed(event.gone.worker_id)
            case "snapshot_end":
                self._snapshot_ended()
            case "ownership":
                self.up = True
                self._session.told(self, event.ownership)
            case _:
                self._session.link_told(self, event)

    def lost(self, error: MeshError) -> None:
        self.up = self.complete = False
        self._session.link_lost(self, error)

    def expects(self, room: pb.OpenRoom) -> bool:
        """Whether a worker of the room is about to register with this replica."""
        names = (room.prefill_worker_id, room.decode_worker_id)
        return any(name in self.expected and name not in self.workers for name in names)

    def _changed(self, worker_id: str) -> None:
        if self.complete:
            self._session.refresh(worker_id)

    def _snapshot_ended(self) -> None:
        self.complete = True
        self.expected = set(self._session.workers) - set(self.workers)
        if self.expected:
            loop = asyncio.get_running_loop()
            loop.call_later(KEEP_WORKER_S - 1, self.expected.clear)
            self._session.later_refresh()
        self.established()
        self._session.link_ready()


def merge(told: list[types_pb2.Worker]) -> types_pb2.Worker:
    """One record of what several replicas told of a worker: of its latest life, in its best state."""
    latest = max(record.epoch for record in told)
    return min((record for record in told if record.epoch == latest), key=lambda record: STATES.index(record.state))
