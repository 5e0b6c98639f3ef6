"""What an operator can ask and tell: lists, ledgers, explanations, and the verbs. Knows messages, not gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from itertools import islice

from common.errors.base import MeshError, Reason
from common.mesh.room import Room, State
from common.mesh.shards import shard_of_request, shard_of_room
from common.mesh.wire import ticket_to
from pdmesh.v1 import bootstrap_service_pb2 as pb
from pdmesh.v1 import types_pb2 as types
from services.bootstrap import timeline, wire
from services.bootstrap.control import ControlPlane
from services.bootstrap.inspection_cause import Cause, Scene, explain, pending, plural, router_failure, seconds
from services.bootstrap.rooms import Entry
from services.bootstrap.timeline import matches

DEFAULT_PAGE, LARGEST_PAGE = 100, 1000
# How long a worker has to say that it drains.
DRAIN_ACK_S = 5.0


# ------------------------------------------------------------------------------------------ lists


def list_workers(control: ControlPlane, request: pb.ListWorkersRequest) -> pb.ListWorkersResponse:
    records = control.workers.records()
    chosen = [record for record in records if request.role in (types.WORKER_ROLE_UNSPECIFIED, record.role)]
    response = pb.ListWorkersResponse(workers=chosen)
    wire.set_time(response.at, control.now())
    return response


def list_rooms(control: ControlPlane, request: pb.ListRoomsRequest) -> pb.ListRoomsResponse:
    """A page of rooms. Raises `MeshError` (INVALID_PARAMETER)."""
    if request.page_size > LARGEST_PAGE:
        raise MeshError(Reason.INVALID_PARAMETER, f"at most {LARGEST_PAGE} rooms a page", parameter="page_size")
    if request.page_token and not request.page_token.isdecimal():
        raise MeshError(Reason.INVALID_PARAMETER, "not a token of an earlier page", parameter="page_token")
    before = int(request.page_token) if request.page_token else None
    opened_before = control.now() - request.min_age.ToNanoseconds() / 1e9
    wanted = (
        (number, room)
        for number, room in control.rooms.newest_first(before)
        if room.opened_at <= opened_before and matches(room, request)
    )
    size = request.page_size or DEFAULT_PAGE
    page = list(islice(wanted, size + 1))
    token = str(page[size - 1][0]) if len(page) > size else ""
    return pb.ListRoomsResponse(rooms=[wire.room_to(room) for _, room in page[:size]], next_page_token=token)


def get_room(control: ControlPlane, room_id: str) -> pb.GetRoomResponse:
    """Raises `MeshError` (NOT_FOUND)."""
    entry = entry_of(control, room_id)
    return pb.GetRoomResponse(room=wire.room_to(entry.room), timeline=wire.timeline_to(entry.timeline))


def entry_of(control: ControlPlane, room_id: str) -> Entry:
    """Raises `MeshError` (NOT_FOUND), which names the replica that may know the room."""
    if entry := control.rooms.find(room_id):
        return entry
    message = f"no room {room_id!r}{elsewhere(control, shard_of_room(room_id))}"
    raise MeshError(Reason.NOT_FOUND, message, parameter="room_id")


def elsewhere(control: ControlPlane, shard: int) -> str:
    """Where else to ask about the rooms of a shard; empty when they would be ours."""
    known = control.shards.known.get(shard)
    if known is None or known.claim.owner in ("", control.shards.replica_id):
        return ""
    address = control.shards.replicas.get(known.claim.owner, known.claim.owner)
    return f"; it would belong to the bootstrap at {address}"


def open_rooms(control: ControlPlane, request: pb.WatchRoomsRequest) -> Iterator[pb.RoomChange]:
    """The rooms that a watcher hears of first, oldest first."""
    for _, room in reversed(list(control.rooms.newest_first())):
        if not room.state.terminal and matches(room, request):
            yield pb.RoomChange(room=wire.brief_to(room))


def get_ledger(control: ControlPlane, worker_id: str) -> pb.GetLedgerResponse:
    """The workers' pages. Raises `MeshError` (NOT_FOUND) for a worker that is not known."""
    records = [record for record in control.workers.records() if worker_id in ("", record.worker_id)]
    if worker_id and not records:
        raise no_worker(worker_id)
    response = pb.GetLedgerResponse(workers=[ledger_of(control, record) for record in records])
    wire.set_time(response.at, control.now())
    return response


def ledger_of(control: ControlPlane, record: types.Worker) -> pb.WorkerLedger:
    ledger = record.load.ledger
    message = pb.WorkerLedger(worker_id=record.worker_id, role=record.role, state=record.state, ledger=ledger)
    message.pages = ledger.free + ledger.reserved + ledger.in_use + ledger.cached + ledger.quarantined
    if record.load.HasField("audit"):
        message.audit.CopyFrom(record.load.audit)
    if figures := control.workers.figures(record.worker_id):
        wire.set_time(message.told_at, figures.told_at)
    return message


# ------------------------------------------------------------------------------------------ explanations


def explain_room(control: ControlPlane, room_id: str) -> pb.ExplainResponse:
    """Raises `MeshError` (NOT_FOUND)."""
    scene = scene_of(control, entry_of(control, room_id))
    cause = explain(scene)
    return pb.ExplainResponse(summary=cause.sentence, reason=cause.reason, rooms=[explained(scene, cause)])


def explain_request(control: ControlPlane, request_id: str) -> pb.ExplainResponse:
    """All that is known of a request. Raises `MeshError` (NOT_FOUND) when that is nothing."""
    journal = control.journal
    entries, refusals, failure = (
        control.rooms.of_request(request_id),
        journal.refusals_of(request_id),
        journal.failure_of(request_id),
    )
    if not entries and not refusals and failure is None:
        if queued := journal.queued_of(request_id):
            ago = seconds(control.now() - queued.at)
            waited = f"It waited in a router's queue {ago} ago, and got no room since: {queued.message}."
            return pb.ExplainResponse(summary=waited)
        shard = shard_of_request(request_id, control.shards.count)
        message = (
            f"no room or failure of request {request_id!r} is remembered: it has just come to a router's queue, "
            f"was never heard of, or is older than --room-history or than this bootstrap, which began "
            f"{seconds(control.now() - control.began_at)} ago{elsewhere(control, shard)}"
        )
        raise MeshError(Reason.NOT_FOUND, message, parameter="request_id")
    scenes = [scene_of(control, entry, failure.reason if failure else "") for entry in entries]
    causes = [explain(scene) for scene in scenes]
    summary = summarize(entries, causes)
    if summary is None and refusals:
        summary = Cause(f"No room was opened: {refusals[0].message}.", refusals[0].reason)
    if failure and (summary is None or not summary.reason):
        summary = router_failure(failure)
    assert summary is not None
    response = pb.ExplainResponse(summary=summary.sentence, reason=summary.reason)
    response.rooms.extend(explained(scene, cause) for scene, cause in zip(scenes, causes, strict=True))
    for refused in refusals:
        opening = response.refused.add(wanted=refused.wanted, reason=refused.reason, message=refused.message)
        wire.set_time(opening.at, refused.at)
    if failure:
        response.failure.reason, response.failure.message = failure.reason, failure.message
        wire.set_time(response.failure.at, failure.at)
    return response


def summarize(entries: list[Entry], causes: list[Cause]) -> Cause | None:
    """One cause for all rooms: of the sequences' last attempts the first that failed, or the longest under way."""
    last = {entry.room.index: (entry, cause) for entry, cause in zip(entries, causes, strict=True)}
    if not last:
        return None
    sequences = list(last.values())
    failures = [cause for _, cause in sequences if cause.reason]
    if failures:
        # of a request's sequences the others are aborted when the first fails
        first = min(failures, key=lambda cause: (cause.reason == Reason.ABORTED, cause.at))
        return Cause(first.sentence + among(len(failures), len(sequences)), first.reason, first.at)
    running = [(entry, cause) for entry, cause in sequences if not entry.room.state.terminal]
    if running:
        return min(running, key=lambda pair: pair[0].room.opened_at)[1]
    if retried := [cause for cause in causes if cause.reason]:
        return Cause(f"{sequences[0][1].sentence} An earlier attempt had failed: {retried[0].sentence}")
    return sequences[0][1]


def among(failed: int, sequences: int) -> str:
    return f" ({failed} of {plural(sequences, 'sequence')} failed.)" if sequences > 1 else ""


def scene_of(control: ControlPlane, entry: Entry, request_reason: str = "") -> Scene:
    member = control.workers.get(entry.room.decode_worker_id)
    page_size = max(member.record.kv_layout.page_size, 1) if member else 1
    return Scene(
        entry,
        control.journal,
        control.now(),
        pages_for=lambda tokens: -(-tokens // page_size),
        silent_after_s=control.workers.silent_after_s,
        request_reason=request_reason,
    )


def explained(scene: Scene, cause: Cause) -> pb.ExplainedRoom:
    entry = scene.entry
    return pb.ExplainedRoom(
        room=wire.brief_to(entry.room),
        timeline=wire.timeline_to(entry.timeline),
        summary=cause.sentence,
        reason=cause.reason,
        pending=pending(scene),
        transfer=entry.timeline.transfer,
    )


# ------------------------------------------------------------------------------------------ verbs


async def drain_worker(control: ControlPlane, request: pb.DrainWorkerRequest) -> pb.DrainWorkerResponse:
    """Tell a worker to drain, and wait until it says that it does.

    Raises `MeshError`: NOT_FOUND, WRONG_STATE for a worker that is offline, DEADLINE_EXCEEDED without an answer.
    """
    member = control.workers.get(request.worker_id)
    if member is None:
        raise no_worker(request.worker_id)
    if not member.online:
        raise MeshError(Reason.WRONG_STATE, f"worker {request.worker_id} is offline", parameter="worker_id")
    drain = pb.Drain(timeout=request.timeout if request.HasField("timeout") else None)
    member.send(pb.ControlEvent(drain=drain))
    try:
        async with asyncio.timeout(DRAIN_ACK_S):
            await member.drain_told.wait()
    except TimeoutError:
        message = f"worker {request.worker_id} did not answer within {DRAIN_ACK_S:g} s; it may still hear of it"
        raise MeshError(Reason.DEADLINE_EXCEEDED, message) from None
    return pb.DrainWorkerResponse(worker=member.record)


def abort_room(control: ControlPlane, request: pb.AbortRoomRequest) -> pb.AbortRoomResponse:
    """Raises `MeshError`: NOT_FOUND, WRONG_STATE for a room that has ended."""
    room = entry_of(control, request.room_id).room
    if room.state.terminal:
        raise MeshError(Reason.WRONG_STATE, ended_words(room), parameter="room_id")
    message = request.message or "an operator aborted the room"
    wanted = pb.AbortRoom(ticket=ticket_to(room.ticket), reason=Reason.ABORTED, message=message)
    control.rooms.abort(wanted, timeline.OPERATOR)
    return pb.AbortRoomResponse(room=wire.room_to(control.rooms.get(request.room_id).room))


def ended_words(room: Room) -> str:
    if room.state is State.FAILED:
        return f"room {room.ticket.room_id} has failed already: {room.reason}"
    return (
        f"the hand-over of room {room.ticket.room_id} is complete; to stop the sequence, "
        f"abort request {room.request_id} at its router"
    )


def set_worker_role(control: ControlPlane, request: pb.SetWorkerRoleRequest) -> pb.SetWorkerRoleResponse:
    """Always raises `MeshError`: UNIMPLEMENTED, or NOT_FOUND."""
    if control.workers.get(request.worker_id) is None:
        raise no_worker(request.worker_id)
    message = "a worker's role is fixed when it starts: drain it, and start it again in the other role"
    raise MeshError(Reason.UNIMPLEMENTED, message)


def no_worker(worker_id: str) -> MeshError:
    return MeshError(Reason.NOT_FOUND, f"no worker {worker_id!r}", parameter="worker_id")


def list_replicas(control: ControlPlane) -> pb.ListReplicasResponse:
    """The replicas that are announced, and who owns which shard, as this one last heard."""
    shards = control.shards
    response = pb.ListReplicasResponse(shards=shards.count, replica_id=shards.replica_id)
    for name in sorted(shards.replicas):
        owned = [shard for shard in shards.known.values() if shard.claim.owner == name]
        status = response.replicas.add(replica=pb.Replica(replica_id=name, address=shards.replicas[name]))
        for shard in sorted(owned, key=lambda shard: shard.number):
            status.owned.add(shard=shard.number, epoch=shard.claim.epoch)
    return response
