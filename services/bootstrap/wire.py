"""Between the protos and the state machine's words: one function a type, no decisions."""

from __future__ import annotations

from typing import cast

from common.mesh import room as machine
from common.mesh.room import Room
from common.mesh.wire import ticket_from, ticket_to
from pdmesh.v1 import bootstrap_service_pb2 as pb
from pdmesh.v1 import types_pb2 as types


def room_event_from(event: pb.WorkerEvent) -> machine.Event | None:
    """The machine's event; None for one that is not about a room."""
    match event.WhichOneof("event"):
        case "reserved":
            return machine.Reserved(ticket_from(event.reserved.ticket), event.reserved.reservation)
        case "transferring":
            return machine.Transferring(ticket_from(event.transferring.ticket))
        case "transferred":
            return machine.Transferred(ticket_from(event.transferred.ticket))
        case "failed":
            failed = event.failed
            return machine.RoomFailed(ticket_from(failed.ticket), failed.reason, failed.message)
        case "quiet":
            return machine.Quiet(ticket_from(event.quiet.ticket))
    return None


def state_to(state: machine.State) -> types.RoomState.ValueType:
    return types.RoomState.Value(f"ROOM_STATE_{state}")


def ended_to(room: Room) -> pb.RoomEnded:
    return pb.RoomEnded(
        ticket=ticket_to(room.ticket), state=state_to(room.state), reason=room.reason, message=room.message
    )


def reserved_to(room: Room) -> pb.RoomReserved:
    return pb.RoomReserved(ticket=ticket_to(room.ticket), reservation=cast(types.Reservation, room.reservation))


def room_to(room: Room) -> types.Room:
    """The whole record."""
    record = types.Room(
        ticket=ticket_to(room.ticket),
        request_id=room.request_id,
        index=room.index,
        prefill_worker_id=room.prefill_worker_id,
        decode_worker_id=room.decode_worker_id,
        state=state_to(room.state),
        reason=room.reason,
        message=room.message,
        reservation=cast(types.Reservation | None, room.reservation),
    )
    record.opened_at.FromNanoseconds(round(room.opened_at * 1e9))
    record.changed_at.FromNanoseconds(round(room.changed_at * 1e9))
    return record


def room_from(record: types.Room) -> Room:
    """A room as it was persisted."""
    return Room(
        ticket=ticket_from(record.ticket),
        request_id=record.request_id,
        index=record.index,
        prefill_worker_id=record.prefill_worker_id,
        decode_worker_id=record.decode_worker_id,
        opened_at=record.opened_at.ToNanoseconds() / 1e9,
        changed_at=record.changed_at.ToNanoseconds() / 1e9,
        state=machine.State(types.RoomState.Name(record.state).removeprefix("ROOM_STATE_")),
        reservation=record.reservation if record.HasField("reservation") else None,
        reason=record.reason,
        message=record.message,
    )
