"""A shard that came from an earlier owner: what the store, the workers and the routers say of its rooms, put together.

The store is behind by what its last owner had not written yet, so each side tells again. Routers bring back the rooms
that they follow, under their old tickets. Workers tell which rooms they hold and how far these have come; what they
do not tell of, they do not have. Whatever is then still without a worker or a router, or is held by a worker though
nobody knows it, is ended when the time is up by which everybody who is alive has told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from common.errors.base import Reason
from common.mesh import room as machine
from common.mesh.room import Party, State
from common.mesh.shards import shard_of_room
from common.mesh.ticket import Ticket
from common.mesh.wire import ticket_from, ticket_to
from common.obs.log import get_logger
from pdmesh.v1 import bootstrap_service_pb2 as pb
from pdmesh.v1 import types_pb2 as types
from services.bootstrap import timeline
from services.bootstrap.rooms import Entry, Rooms
from services.bootstrap.timers import Timers
from services.bootstrap.workers import Member, Workers

log = get_logger(__name__)

HELD = {pb.HELD_PHASE_WAITING, pb.HELD_PHASE_RESERVED, pb.HELD_PHASE_QUARANTINED}


@dataclass
class Unknown:
    """What workers said of a room that neither the store nor a router has told of yet."""

    held: dict[str, pb.HeldRoom] = field(default_factory=dict)
    said: list[tuple[str, pb.WorkerEvent]] = field(default_factory=list)


class Recovery:
    """Brings shards from their earlier owners to rest or to work.

    `owned` tells which shards are ours; `grace_s` is the time for everybody to tell.
    """

    def __init__(
        self,
        now: Callable[[], float],
        timers: Timers[tuple[str, str]],
        rooms: Rooms,
        workers: Workers,
        *,
        owned: Callable[[int], bool],
        grace_s: float,
    ) -> None:
        self._now = now
        self._timers = timers
        self._rooms = rooms
        self._workers = workers
        self._owned = owned
        self._grace_s = grace_s
        self._until: dict[int, float] = {}  # shards under recovery
        self._unknown: dict[Ticket, Unknown] = {}
        self._last: dict[str, types.Worker] = {}  # workers as the store knew them
        self._written: set[Ticket] = set()  # rooms under transfer that prefill is done with
        rooms.on_unknown = self._on_unknown
        rooms.on_adopted = self._adopted

    def gained(self, shard: int, rooms: Iterable[types.Room]) -> None:
        """The shard is ours; its rooms as the store has them."""
        self._rooms.load(rooms)
        self._begin(shard)

    def dropped(self, shard: int) -> None:
        """The shard is another's."""
        self._rooms.drop(shard)
        self._until.pop(shard, None)
        self._unknown = {t: unknown for t, unknown in self._unknown.items() if shard_of_room(t.room_id) != shard}

    def knew(self, workers: Iterable[types.Worker]) -> None:
        """Workers as an earlier owner wrote them: how to fence one off that does not come back."""
        self._last.update((worker.worker_id, worker) for worker in workers)

    def told(self, worker_id: str, told: pb.HeldRooms) -> None:
        """A worker told all that it holds of some shards."""
        tickets = set()
        for held in told.rooms:
            ticket = ticket_from(held.ticket)
            tickets.add(ticket)
            entry = self._rooms.find(ticket.room_id)
            if entry is not None and entry.room.ticket == ticket:
                self._match(entry, worker_id, held)
            else:
                self._unknown_room(ticket).held[worker_id] = held
        shards = set(told.shards)
        for entry in self._rooms.of_worker(worker_id):
            ticket = entry.room.ticket
            if ticket not in tickets and shard_of_room(ticket.room_id) in shards:
                self._absent(entry, worker_id)

    def alarm(self, shard: int) -> None:
        """Everybody who is alive has told: end what is incomplete."""
        if self._until.get(shard, self._now() + 1) > self._now():
            return
        del self._until[shard]
        written = {ticket for ticket in self._written if shard_of_room(ticket.room_id) == shard}
        self._written -= written
        for entry in self._rooms.in_shard(shard):
            if entry.room.recovered and not entry.retired:
                self._settle(entry)
            if entry.room.ticket in written and entry.room.state is State.TRANSFERRING:
                message = "prefill is done with the room, and decode has not got all of it"
                failed = machine.RoomFailed(entry.room.ticket, Reason.TRANSFER_FAILED, message)
                self._rooms.apply(entry, failed, timeline.BOOTSTRAP)
        for ticket in [ticket for ticket in self._unknown if shard_of_room(ticket.room_id) == shard]:
            self._end_unknown(ticket, self._unknown.pop(ticket))

    # ---------------------------------------------------------------------------------- rooms that are known

    def _match(self, entry: Entry, worker_id: str, held: pb.HeldRoom) -> None:
        if worker_id == entry.room.decode_worker_id:
            self._match_decode(entry, worker_id, held)
        elif worker_id == entry.room.prefill_worker_id:
            self._match_prefill(entry, worker_id, held)

    def _match_decode(self, entry: Entry, worker_id: str, held: pb.HeldRoom) -> None:
        ticket = entry.room.ticket
        if held.HasField("writer"):
            entry.writer = self._in_all_its_lives(held.writer)
        if held.HasField("reservation") and entry.room.state is State.BOOTSTRAPPING:
            self._rooms.apply(entry, machine.Reserved(ticket, held.reservation), worker_id)
        if held.phase == pb.HELD_PHASE_ARRIVED and not entry.room.state.terminal:
            self._rooms.apply(entry, machine.Transferred(ticket), worker_id)
        elif held.phase in (pb.HELD_PHASE_QUARANTINED, pb.HELD_PHASE_OVER) and not entry.room.state.terminal:
            reason = held.reason or Reason.WORKER_LOST
            message = held.message or "decode gave the room up while it had no owner"
            self._rooms.apply(entry, machine.RoomFailed(ticket, reason, message), worker_id)
        elif held.phase in HELD:
            self._rooms.remind_decode(entry)

    def _match_prefill(self, entry: Entry, worker_id: str, held: pb.HeldRoom) -> None:
        ticket = entry.room.ticket
        if held.reason and not entry.room.state.terminal:
            self._rooms.apply(entry, machine.RoomFailed(ticket, held.reason, held.message), worker_id)
        if held.phase == pb.HELD_PHASE_OVER:
            self._absent(entry, worker_id)
        else:
            self._rooms.remind_prefill(entry)

    def _absent(self, entry: Entry, worker_id: str) -> None:
        """The worker does not hold the room, or not any more."""
        room = entry.room
        if worker_id == room.prefill_worker_id:
            if room.quarantined and not self._rooms.may_speak_for_writer(worker_id, entry):
                return  # another process, which says nothing of the one that may still write
            if room.quarantined:
                self._rooms.apply(entry, machine.Quiet(room.ticket), worker_id)
            else:  # its prompt may be on its way
                self._rooms.remind_prefill(entry)
            if room.state is State.TRANSFERRING:
                self._written.add(room.ticket)
        elif room.state in (State.WAITING_FOR_INPUT, State.TRANSFERRING):
            message = f"decode worker {worker_id} does not hold the room any more"
            self._rooms.apply(entry, machine.RoomFailed(room.ticket, Reason.WORKER_LOST, message), worker_id)

    def _adopted(self, entry: Entry) -> None:
        """A router brought a room back: take note of what workers said of it before."""
        unknown = self._unknown.pop(entry.room.ticket, None)
        if unknown is None:
            return
        for worker_id, held in unknown.held.items():
            self._match(entry, worker_id, held)
        for worker_id, event in unknown.said:
            self._rooms.worker_event(worker_id, event)

    def _settle(self, entry: Entry) -> None:
        """The time is up for a room: fail it if one of its parties has not come back."""
        for worker_id in (entry.room.prefill_worker_id, entry.room.decode_worker_id):
            message = f"worker {worker_id} did not come back after bootstrap had changed"
            member, writes = self._workers.get(worker_id), worker_id == entry.room.prefill_worker_id
            if not (member and member.online):
                last = self._last.get(worker_id)
                if writes:  # it is fenced off in the life that it had
                    self._workers.gave_up(worker_id, last.epoch if last else 0)
                self._rooms.worker_lost(worker_id, message, last)
            elif writes and not self._rooms.may_speak_for_writer(worker_id, entry):
                lost = machine.WorkerLost(entry.room.ticket, Party.PREFILL, message, entry.writer)
                self._rooms.apply(entry, lost, timeline.BOOTSTRAP)  # another process has its name, and its other rooms
        if entry.router is None:
            if not entry.room.state.terminal:
                abort = machine.Abort(entry.room.ticket, Reason.ABORTED, "its router did not come back")
                self._rooms.apply(entry, abort, timeline.BOOTSTRAP)
            self._rooms.close(entry.room.ticket)

    # ---------------------------------------------------------------------------------- rooms that are not

    def _on_unknown(self, worker_id: str, event: pb.WorkerEvent) -> bool:
        """A worker speaks of a room that is not known; its router may yet bring it back."""
        ticket = ticket_from(getattr(event, str(event.WhichOneof("event"))).ticket)
        shard = shard_of_room(ticket.room_id)
        if not self._owned(shard):
            return True  # not ours to answer: the worker says it again to the owner
        if shard not in self._until or event.HasField("quiet"):
            return False
        self._unknown_room(ticket).said.append((worker_id, event))
        return True

    def _unknown_room(self, ticket: Ticket) -> Unknown:
        self._begin(shard_of_room(ticket.room_id))
        return self._unknown.setdefault(ticket, Unknown())

    def _end_unknown(self, ticket: Ticket, unknown: Unknown) -> None:
        """Nobody knows the room: whoever holds something of it lets go, the writer first.

        Every prefill worker that is alive has told what it holds by now. One that may still write to the room is
        told the end, and its answer, that it is quiet, releases the pages. Where there is none, nobody writes, unless
        decode knows of a writer that has not come back: that one has to be fenced off.
        """
        for worker_id, event in unknown.said:
            if event.HasField("reserved"):
                unknown.held.setdefault(worker_id, pb.HeldRoom(phase=pb.HELD_PHASE_RESERVED))
        message = "bootstrap has changed, and neither its store nor a router knows the room"
        ended = pb.RoomEnded(
            ticket=ticket_to(ticket), state=types.ROOM_STATE_FAILED, reason=Reason.WORKER_LOST, message=message
        )
        writers: list[Member] = []
        holders: list[tuple[Member, pb.HeldRoom]] = []
        for worker_id, held in unknown.held.items():
            member = self._workers.get(worker_id)
            if member and held.phase in HELD:
                if member.record.role == types.WORKER_ROLE_PREFILL:
                    writers.append(member)
                else:
                    holders.append((member, held))
                member.send(pb.ControlEvent(ended=ended))
        if not writers:
            for member, held in holders:
                lost = self._lost_writer(held)
                released = pb.RoomReleased(ticket=ticket_to(ticket), when_gone=lost.endpoints, epoch=lost.epoch)
                member.send(pb.ControlEvent(released=released))
        if writers or holders:
            log.warning("ended a room that nobody knows", room_id=ticket.room_id, writers=len(writers))

    def _lost_writer(self, held: pb.HeldRoom) -> types.Writer:
        """Who wrote to the room and has not come back; empty if it is here, and has said that it does not."""
        writer = held.writer
        member = self._workers.get(writer.worker_id)
        here = member and member.online and self._workers.is_process(writer.worker_id, writer)
        if here or not held.HasField("writer"):
            return types.Writer()
        self._workers.gave_up(writer.worker_id, writer.epoch)
        return self._in_all_its_lives(writer)

    def _in_all_its_lives(self, writer: types.Writer) -> types.Writer:
        """A writer as a router saw it, with the last epoch that it can have had since."""
        epoch = max(writer.epoch, self._workers.latest_epoch)
        return types.Writer(endpoints=writer.endpoints, epoch=epoch, worker_id=writer.worker_id)

    def _begin(self, shard: int) -> None:
        if shard not in self._until:
            self._until[shard] = self._now() + self._grace_s
            self._timers.set(("shard", str(shard)), self._until[shard])
