"""A router's session with bootstrap: a live view of the workers, and rooms opened, aborted and closed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from common.config.tls import Credentials
from common.errors.base import MeshError, Reason
from common.mesh.session import Session, unreachable
from common.mesh.ticket import Ticket
from common.mesh.wire import ticket_from, ticket_to
from pdmesh.v1 import bootstrap_service_pb2 as pb
from pdmesh.v1 import types_pb2

Opening = tuple[str, int, int]  # request, index and attempt


class RouterSession(Session[pb.RouterEvent, pb.MeshEvent]):
    """Keeps a router in touch with bootstrap from `start` to `close`.

    `workers` is the view of the mesh by worker id, kept up to date by bootstrap; while bootstrap is away it stays
    as it was. `ready` is set while there is a session and the view is complete. `on_workers_changed` is called
    after each change of the view, `on_room_ended` once for every open room that reached a terminal state, also
    (as FAILED, BOOTSTRAP_UNREACHABLE) when the session breaks. Both run in the event loop.
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
        self._snapshot: set[str] | None = None
        self._opening: dict[Opening, asyncio.Future[Ticket]] = {}
        self._open: set[Ticket] = set()

    async def open_room(self, room: pb.OpenRoom, timeout_s: float) -> Ticket:
        """Open a room and return its ticket; to be repeated with the same request, index and attempt at will.

        Raises `MeshError`: BOOTSTRAP_UNREACHABLE without a session or within `timeout_s`, NO_WORKER,
        LAYOUT_MISMATCH, DEADLINE_EXCEEDED, WRONG_STATE for a room that was closed already.
        """
        if not self.ready.is_set():
            raise unreachable(self.address, "there is no session")
        key = (room.request_id, room.index, room.attempt)
        if key in self._opening:
            raise MeshError(Reason.WRONG_STATE, f"request {room.request_id}/{room.index} is being opened already")
        answer: asyncio.Future[Ticket] = asyncio.get_running_loop().create_future()
        self._opening[key] = answer
        self.outbox.put(pb.RouterEvent(open=room))
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
        self.outbox.put(pb.RouterEvent(abort=abort))

    def close_room(self, ticket: Ticket) -> None:
        """The sequence is over: nothing more is told about the room. To give one up, abort it first."""
        self._open.discard(ticket)
        self.outbox.put(pb.RouterEvent(close=pb.CloseRoom(ticket=ticket_to(ticket))))

    def request_failed(self, request_id: str, error: MeshError) -> None:
        """Tell that a request failed, for whoever asks bootstrap to explain it. Without a session nobody is told."""
        if self.ready.is_set():
            failed = pb.RequestFailed(request_id=request_id, reason=error.reason, message=error.message)
            self.outbox.put(pb.RouterEvent(request_failed=failed))

    # ---------------------------------------------------------------------------------- of the stream

    def open(self, stub: Any) -> Any:
        return stub.RouterSession()

    def request(self, events: list[pb.RouterEvent]) -> pb.RouterSessionRequest:
        return pb.RouterSessionRequest(events=events)

    def opened(self) -> None:
        self._snapshot = set()

    def receive(self, event: pb.MeshEvent) -> None:
        match event.WhichOneof("event"):
            case "worker":
                self.workers[event.worker.worker_id] = event.worker
                if self._snapshot is None:
                    self._changed()
                else:
                    self._snapshot.add(event.worker.worker_id)
            case "snapshot_end":
                self._snapshot_ended()
            case "gone":
                if self.workers.pop(event.gone.worker_id, None) is not None:
                    self._changed()
            case "opened":
                self._room_opened(event.opened)
            case "open_refused":
                self._open_refused(event.open_refused)
            case "ended":
                self._room_ended(event.ended)

    def lost(self, error: MeshError) -> None:
        self.ready.clear()
        opening, self._opening = self._opening, {}
        for answer in opening.values():
            if not answer.done():
                answer.set_exception(unreachable(self.address, error.message))
        opened, self._open = self._open, set()
        for ticket in opened:
            ended = pb.RoomEnded(ticket=ticket_to(ticket), state=types_pb2.ROOM_STATE_FAILED)
            ended.reason, ended.message = Reason.BOOTSTRAP_UNREACHABLE, error.message
            if self.on_room_ended and not self.closing:
                self.on_room_ended(ended)

    def _unwanted(self, ticket: Ticket) -> None:
        self.abort_room(ticket, Reason.ABORTED, "whoever opened the room has left")
        self.close_room(ticket)

    def _changed(self) -> None:
        if self.on_workers_changed:
            self.on_workers_changed()

    def _snapshot_ended(self) -> None:
        for worker_id in self.workers.keys() - (self._snapshot or set()):
            del self.workers[worker_id]
        self._snapshot = None
        self.ready.set()
        self.established()
        self._changed()

    def _room_opened(self, opened: pb.RoomOpened) -> None:
        ticket = ticket_from(opened.ticket)
        answer = self._opening.get((opened.request_id, opened.index, ticket.attempt))
        if answer is not None and not answer.done():
            self._open.add(ticket)
            answer.set_result(ticket)
        elif ticket not in self._open:
            self._unwanted(ticket)

    def _open_refused(self, refused: pb.OpenRefused) -> None:
        answer = self._opening.get((refused.request_id, refused.index, refused.attempt))
        if answer is not None and not answer.done():
            answer.set_exception(MeshError(Reason(refused.reason), refused.message))

    def _room_ended(self, ended: pb.RoomEnded) -> None:
        ticket = ticket_from(ended.ticket)
        if ticket in self._open:
            self._open.discard(ticket)
            if self.on_room_ended:
                self.on_room_ended(ended)
