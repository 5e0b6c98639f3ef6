"""Between the protos and the state machine's words: one function a type, no decisions."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from common.mesh import room as machine
from common.mesh.room import Room
from common.mesh.wire import ticket_from, ticket_to
from pdmesh.v1 import bootstrap_service_pb2 as pb
from pdmesh.v1 import types_pb2 as types
from services.bootstrap.timeline import Figures, Moment, Timeline


def room_event_from(event: pb.WorkerEvent) -> machine.Event | None:
    """The machine's event; None for one that is not about a room."""
    match event.WhichOneof("event"):
        case "reserved":
            return machine.Reserved(ticket_from(event.reserved.ticket), event.reserved.reservation)
        case "transferring":
            return machine.Transferring(ticket_from(event.transferring.ticket))
        case "transferred":
            transferred = event.transferred
            return machine.Transferred(ticket_from(transferred.ticket), transfer_of(transferred))
        case "failed":
            failed = event.failed
            return machine.RoomFailed(ticket_from(failed.ticket), failed.reason, failed.message)
        case "quiet":
            return machine.Quiet(ticket_from(event.quiet.ticket), transfer_of(event.quiet))
        case "fenced":
            return machine.Fenced(ticket_from(event.fenced.ticket))
    return None


def transfer_of(event: pb.RoomTransferred | pb.RoomQuiet) -> types.TransferStats | None:
    return event.transfer if event.HasField("transfer") else None


def state_to(state: machine.State) -> types.RoomState.ValueType:
    return types.RoomState.Value(f"ROOM_STATE_{state}")


def ended_to(room: Room) -> pb.RoomEnded:
    return pb.RoomEnded(
        ticket=ticket_to(room.ticket), state=state_to(room.state), reason=room.reason, message=room.message
    )


def fence_to(room: Room, told: types.Writer | None) -> pb.RoomReleased:
    """The room is released once its writer is gone: the one that was lost, or if it was not known, that `told`."""
    writer = cast(types.Writer, room.writer)
    if not writer.endpoints and told is not None:
        writer = told
    return pb.RoomReleased(ticket=ticket_to(room.ticket), when_gone=writer.endpoints, epoch=writer.epoch)


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
        prompt_tokens=room.prompt_tokens,
        max_new_tokens=room.max_new_tokens,
        quarantined=room.quarantined,
        writer=cast(types.Writer | None, room.writer),
        decode_lost=room.decode_lost,
    )
    set_time(record.opened_at, room.opened_at)
    set_time(record.changed_at, room.changed_at)
    if room.request_deadline is not None:
        set_time(record.request_deadline, room.request_deadline)
    if room.admission_deadline is not None:
        set_time(record.admission_deadline, room.admission_deadline)
    return record


def set_time(message: Timestamp, seconds: float) -> None:
    """Seconds since 1970, in place."""
    message.FromNanoseconds(round(seconds * 1e9))


def time_of(record: Message, field: str) -> float | None:
    """A timestamp in seconds since 1970; None when it is absent."""
    return getattr(record, field).ToNanoseconds() / 1e9 if record.HasField(field) else None


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
        request_deadline=time_of(record, "request_deadline"),
        admission_deadline=time_of(record, "admission_deadline"),
        prompt_tokens=record.prompt_tokens,
        max_new_tokens=record.max_new_tokens,
        state=machine.State(types.RoomState.Name(record.state).removeprefix("ROOM_STATE_")),
        reservation=record.reservation if record.HasField("reservation") else None,
        quarantined=record.quarantined,
        writer=record.writer if record.HasField("writer") else None,
        decode_lost=record.decode_lost,
        reason=record.reason,
        message=record.message,
    )


def brief_to(room: Room) -> types.Room:
    """The record without the reservation, which may be long."""
    return room_to(replace(room, reservation=None))


def figures_to(figures: Figures | None) -> pb.WorkerFigures | None:
    if figures is None:
        return None
    message = pb.WorkerFigures(state=figures.state, load=figures.load)
    set_time(message.told_at, figures.told_at)
    return message


def moment_to(moment: Moment) -> pb.Moment:
    message = pb.Moment(
        event=moment.event,
        by=moment.by,
        state=state_to(moment.state),
        reason=moment.reason,
        message=moment.message,
        refused=moment.refusal.reason if moment.refusal else "",
        refusal=moment.refusal.message if moment.refusal else "",
        count=moment.times,
        prefill=figures_to(moment.prefill),
        decode=figures_to(moment.decode),
        transfer=moment.transfer,
    )
    set_time(message.at, moment.at)
    return message


def timeline_to(timeline: Timeline) -> pb.Timeline:
    return pb.Timeline(moments=map(moment_to, timeline.moments), dropped=timeline.dropped)
