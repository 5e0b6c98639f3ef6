"""The gRPC face of bootstrap: translates messages, decides nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from itertools import islice
from typing import Any

from common.errors.base import MeshError, Reason
from common.mesh.outbox import Outbox
from common.mesh.wire import ticket_from
from common.obs.log import get_logger
from pdmesh.v1 import bootstrap_service_pb2 as pb
from pdmesh.v1 import bootstrap_service_pb2_grpc as pb_grpc
from pdmesh.v1 import types_pb2 as types
from services.bootstrap import wire
from services.bootstrap.control import ControlPlane
from services.bootstrap.workers import Member

log = get_logger(__name__)

SERVICE = "pdmesh.v1.BootstrapService"
DEFAULT_PAGE, LARGEST_PAGE = 100, 1000


class BootstrapServicer(pb_grpc.BootstrapServiceServicer):
    """Serves as soon as it has a control plane; until then every call is refused as retryable."""

    def __init__(self) -> None:
        self.control_plane: ControlPlane | None = None

    @property
    def control(self) -> ControlPlane:
        if self.control_plane is None:
            raise MeshError(Reason.STORE_FAILED, "bootstrap has not reached its store yet", retry_after_s=1.0)
        return self.control_plane

    # ---------------------------------------------------------------------------------- sessions

    async def WorkerSession(
        self, request_iterator: AsyncIterator[pb.WorkerSessionRequest], context: Any
    ) -> AsyncIterator[pb.WorkerSessionResponse]:
        control = self.control
        first = await first_message(request_iterator)
        if not first.events or first.events[0].WhichOneof("event") != "register":
            raise MeshError(Reason.INVALID_PARAMETER, "a worker's session begins with `register`")
        outbox: Outbox[pb.ControlEvent] = Outbox()
        member = control.workers.register(first.events[0].register.worker, outbox)
        why = "its session broke"

        async def read() -> None:
            nonlocal why
            take(control, member, first.events[1:])
            async for request in request_iterator:
                take(control, member, request.events)
            why = "it closed its session"

        try:
            async with reading(read(), outbox):
                async for batch in outbox.batches():
                    yield pb.WorkerSessionResponse(events=batch)
        finally:
            control.workers.lost(member, why)

    async def RouterSession(
        self, request_iterator: AsyncIterator[pb.RouterSessionRequest], context: Any
    ) -> AsyncIterator[pb.RouterSessionResponse]:
        control = self.control
        outbox: Outbox[pb.MeshEvent] = Outbox()

        async def read() -> None:
            async for request in request_iterator:
                for event in request.events:
                    match event.WhichOneof("event"):
                        case "open":
                            control.rooms.open(outbox, event.open)
                        case "abort":
                            control.rooms.abort(event.abort)
                        case "close":
                            control.rooms.close(ticket_from(event.close.ticket))

        control.router_joined(outbox)
        try:
            async with reading(read(), outbox):
                async for batch in outbox.batches():
                    yield pb.RouterSessionResponse(events=batch)
        finally:
            control.router_left(outbox)

    # ---------------------------------------------------------------------------------- inspection

    async def ListWorkers(self, request: pb.ListWorkersRequest, context: Any) -> pb.ListWorkersResponse:
        records = self.control.workers.records()
        chosen = [record for record in records if request.role in (types.WORKER_ROLE_UNSPECIFIED, record.role)]
        response = pb.ListWorkersResponse(workers=chosen)
        response.at.FromNanoseconds(round(self.control.now() * 1e9))
        return response

    async def ListRooms(self, request: pb.ListRoomsRequest, context: Any) -> pb.ListRoomsResponse:
        if request.page_size > LARGEST_PAGE:
            raise MeshError(Reason.INVALID_PARAMETER, f"at most {LARGEST_PAGE} rooms a page", parameter="page_size")
        if request.page_token and not request.page_token.isdecimal():
            raise MeshError(Reason.INVALID_PARAMETER, "not a token of an earlier page", parameter="page_token")
        before = int(request.page_token) if request.page_token else None
        wanted = (
            (number, room)
            for number, room in self.control.rooms.newest_first(before)
            if request.state in (types.ROOM_STATE_UNSPECIFIED, wire.state_to(room.state))
            and request.worker_id in ("", room.prefill_worker_id, room.decode_worker_id)
        )
        size = request.page_size or DEFAULT_PAGE
        page = list(islice(wanted, size + 1))
        token = str(page[size - 1][0]) if len(page) > size else ""
        return pb.ListRoomsResponse(rooms=[wire.room_to(room) for _, room in page[:size]], next_page_token=token)

    async def GetRoom(self, request: pb.GetRoomRequest, context: Any) -> pb.GetRoomResponse:
        return pb.GetRoomResponse(room=wire.room_to(self.control.rooms.get(request.room_id)))


def take(control: ControlPlane, member: Member, events: Any) -> None:
    """A worker's events, in order. One whose life has ended is not listened to."""
    for event in events:
        if not member.online:
            return
        match event.WhichOneof("event"):
            case "heartbeat":
                control.workers.heartbeat(member, event.heartbeat.load)
            case "draining":
                control.workers.draining(member)
            case "register":
                raise MeshError(Reason.WRONG_STATE, "a session registers once")
            case _:
                control.rooms.worker_event(member.worker_id, event)


async def first_message(requests: AsyncIterator[pb.WorkerSessionRequest]) -> pb.WorkerSessionRequest:
    async for request in requests:
        return request
    raise MeshError(Reason.INVALID_PARAMETER, "the session ended before it began")


@asynccontextmanager
async def reading(read: Awaitable[None], outbox: Outbox[Any]) -> AsyncIterator[None]:
    """Read beside the writing; when reading ends, so does the outbox, with the reader's error if there is one."""

    async def until_end() -> None:
        try:
            await read
        except Exception as error:
            outbox.close(error)
        else:
            outbox.close()

    task = asyncio.create_task(until_end())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
