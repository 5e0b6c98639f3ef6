"""The gRPC face of bootstrap: translates messages, decides nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import Any

from common.errors.base import MeshError, Reason
from common.mesh.outbox import Outbox
from common.mesh.wire import ticket_from
from common.obs.log import get_logger
from pdmesh.v1 import bootstrap_service_pb2 as pb
from pdmesh.v1 import bootstrap_service_pb2_grpc as pb_grpc
from services.bootstrap import inspection, wire
from services.bootstrap.control import ControlPlane
from services.bootstrap.workers import Member

log = get_logger(__name__)

SERVICE = "pdmesh.v1.BootstrapService"
# A lost connection looks like the stream's end; that the call is cancelled comes a moment later.
CANCEL_S = 0.05


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
        member = control.register(first.events[0].register.worker, outbox)
        broke = True

        async def read() -> None:
            nonlocal broke
            take(control, member, first.events[1:])
            async for request in request_iterator:
                take(control, member, request.events)
            await asyncio.sleep(CANCEL_S)
            broke = False

        try:
            async with reading(read(), outbox):
                async for batch in outbox.batches():
                    yield pb.WorkerSessionResponse(events=batch)
        finally:
            control.worker_left(member, broke=broke)

    async def RouterSession(
        self, request_iterator: AsyncIterator[pb.RouterSessionRequest], context: Any
    ) -> AsyncIterator[pb.RouterSessionResponse]:
        control = self.control
        outbox: Outbox[pb.MeshEvent] = Outbox()
        broke = True

        async def read() -> None:
            nonlocal broke
            async for request in request_iterator:
                for event in request.events:
                    match event.WhichOneof("event"):
                        case "open":
                            control.rooms.open(outbox, event.open)
                        case "abort":
                            control.rooms.abort(event.abort)
                        case "close":
                            control.rooms.close(ticket_from(event.close.ticket), event.close.message)
                        case "request_failed":
                            control.journal.request_failed(event.request_failed)
                        case "request_queued":
                            control.journal.request_queued(event.request_queued)
            await asyncio.sleep(CANCEL_S)
            broke = False

        control.router_joined(outbox)
        try:
            async with reading(read(), outbox):
                async for batch in outbox.batches():
                    yield pb.RouterSessionResponse(events=batch)
        finally:
            control.router_left(outbox, broke=broke)

    # ---------------------------------------------------------------------------------- inspection

    async def ListWorkers(self, request: pb.ListWorkersRequest, context: Any) -> pb.ListWorkersResponse:
        return inspection.list_workers(self.control, request)

    async def ListRooms(self, request: pb.ListRoomsRequest, context: Any) -> pb.ListRoomsResponse:
        return inspection.list_rooms(self.control, request)

    async def GetRoom(self, request: pb.GetRoomRequest, context: Any) -> pb.GetRoomResponse:
        return inspection.get_room(self.control, request.room_id)

    async def WatchRooms(self, request: pb.WatchRoomsRequest, context: Any) -> AsyncIterator[pb.WatchRoomsResponse]:
        control = self.control
        watcher = control.journal.watch(request)
        try:
            await context.send_initial_metadata(())  # so that a caller knows from when on it hears all
            if request.with_open:
                yield pb.WatchRoomsResponse(changes=inspection.open_rooms(control, request))
            async for batch in watcher.batches():
                changes = [pb.RoomChange(room=wire.brief_to(room), moment=wire.moment_to(m)) for room, m in batch]
                yield pb.WatchRoomsResponse(changes=changes)
        finally:
            control.journal.unwatch(watcher)

    async def GetLedger(self, request: pb.GetLedgerRequest, context: Any) -> pb.GetLedgerResponse:
        return inspection.get_ledger(self.control, request.worker_id)

    async def Explain(self, request: pb.ExplainRequest, context: Any) -> pb.ExplainResponse:
        if bool(request.room_id) == bool(request.request_id):
            raise MeshError(Reason.INVALID_PARAMETER, "set either request_id or room_id", parameter="request_id")
        if request.room_id:
            return inspection.explain_room(self.control, request.room_id)
        return inspection.explain_request(self.control, request.request_id)

    async def ListReplicas(self, request: pb.ListReplicasRequest, context: Any) -> pb.ListReplicasResponse:
        return inspection.list_replicas(self.control)

    # ---------------------------------------------------------------------------------- verbs

    async def DrainWorker(self, request: pb.DrainWorkerRequest, context: Any) -> pb.DrainWorkerResponse:
        return await inspection.drain_worker(self.control, request)

    async def AbortRoom(self, request: pb.AbortRoomRequest, context: Any) -> pb.AbortRoomResponse:
        return inspection.abort_room(self.control, request)

    async def SetWorkerRole(self, request: pb.SetWorkerRoleRequest, context: Any) -> pb.SetWorkerRoleResponse:
        return inspection.set_worker_role(self.control, request)


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
            case "held":
                control.recovery.told(member.worker_id, event.held)
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
