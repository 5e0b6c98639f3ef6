"""The control plane as a whole: workers, rooms and routers, without any I/O of their own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from common.errors.base import MeshError, Reason
from common.mesh.outbox import Outbox
from common.mesh.room import Room
from common.mesh.shards import shard_of_request, shard_of_room
from pdmesh.v1 import bootstrap_service_pb2 as pb
from pdmesh.v1 import types_pb2 as types
from services.bootstrap import metrics, wire
from services.bootstrap.config import BootstrapConfig
from services.bootstrap.records import Records
from services.bootstrap.recovery import Recovery
from services.bootstrap.rooms import Rooms, RouterOutbox
from services.bootstrap.shards import Shard, Shards
from services.bootstrap.store.base import Store
from services.bootstrap.timeline import Journal
from services.bootstrap.timers import Timers
from services.bootstrap.workers import REATTACH_S, SLACK_S, Member, Workers

WORKER_PREFIX, ROOM_PREFIX = "/pdmesh/workers/", "/pdmesh/rooms/"


def steady_clock() -> Callable[[], float]:
    """A clock that shows the time of day and never jumps."""
    offset = time.time() - time.monotonic()
    return lambda: offset + time.monotonic()


class ControlPlane:
    """Puts the parts together; `epoch` is this bootstrap's, above that of every earlier one.

    What it owns comes from `shards`, which is told to be followed by `attach`.
    """

    def __init__(self, config: BootstrapConfig, epoch: int, store: Store, address: str) -> None:
        self.epoch = epoch
        self._store = store
        self._refuse_without_store = config.on_store_loss == "refuse"
        self._closing = False
        self._ownership = pb.Ownership()
        self.now = steady_clock()
        self.began_at = self.now()
        self.timers: Timers[tuple[str, str]] = Timers(self.now)
        self.shards = Shards(
            store,
            f"{epoch:x}",
            address,
            epoch,
            on_gained=self._shard_gained,
            on_leaving=self._shard_leaving,
            on_lost=self._shard_lost,
            on_changed=self._ownership_changed,
        )
        self.records = Records(
            store,
            [],
            self.shards.fenced,
            on_away=lambda seconds: self.journal.store_lost(seconds),
            on_back=lambda: self.journal.store_back(),
        )
        self._routers: set[RouterOutbox] = set()
        self.workers = Workers(
            self.now,
            self.timers,
            epoch=epoch,
            heartbeat_interval_s=config.disaggregation_heartbeat_interval,
            heartbeat_max_failure=config.disaggregation_heartbeat_max_failure,
            on_changed=self._worker_changed,
            on_gone=self._worker_gone,
            on_lost=self._worker_lost,
        )
        self.journal = Journal(self.now, self.workers.figures, self.workers.decode_figures, config.room_history)
        self.rooms = Rooms(
            self.now,
            self.timers,
            shard_of=lambda request_id: shard_of_request(request_id, self.shards.count),
            epoch_of=self._epoch_of,
            timeouts=config.timeouts,
            history=config.room_history,
            workers=self.workers,
            journal=self.journal,
            persist=self._persist_room if store.durable else lambda room: None,
            forget=self._forget_room if store.durable else lambda room_id: None,
        )
        grace_s = config.disaggregation_heartbeat_interval * config.disaggregation_heartbeat_max_failure + SLACK_S
        owned = self.shards.owned
        self.recovery = Recovery(
            self.now, self.timers, self.rooms, self.workers, owned=lambda shard: shard in owned, grace_s=grace_s
        )

    async def run_timers(self) -> None:
        """Fire alarms, for ever."""
        await self.timers.run(self._alarm)

    def router_joined(self, outbox: RouterOutbox) -> None:
        """Tell a router what is owned here and all workers, and from now on every change."""
        outbox.put(pb.MeshEvent(ownership=self._ownership))
        for record in self.workers.records():
            outbox.put(pb.MeshEvent(worker=record))
        outbox.put(pb.MeshEvent(snapshot_end=pb.SnapshotEnd()))
        self._routers.add(outbox)
        metrics.ROUTERS.inc()

    def router_left(self, outbox: RouterOutbox, *, broke: bool = False) -> None:
        """A router's session ended. After one that broke it has a moment to come back and follow its rooms again."""
        self._routers.discard(outbox)
        metrics.ROUTERS.dec()
        if self._closing:
            return
        if broke:
            asyncio.get_running_loop().call_later(REATTACH_S, self.rooms.router_lost, outbox)
        else:
            self.rooms.router_lost(outbox)

    def register(self, worker: types.Worker, outbox: Outbox[pb.ControlEvent]) -> Member:
        """Begin a worker's session. Raises `MeshError` (INVALID_PARAMETER)."""
        member = self.workers.register(worker, outbox)
        member.send(pb.ControlEvent(ownership=self._ownership))
        return member

    def worker_left(self, member: Member, *, broke: bool) -> None:
        """A worker's session ended."""
        if self._closing:
            return
        if broke:
            self.workers.broken(member, "its session broke")
        else:
            self.workers.lost(member, "it closed its session")

    def close(self) -> None:
        """End all sessions after what is queued for them. No room ends of it: another bootstrap takes them over."""
        self._closing = True
        for record in self.workers.records():
            if member := self.workers.get(record.worker_id):
                member.outbox.close()
        for outbox in self._routers:
            outbox.close()
        self.journal.close()

    def _alarm(self, key: tuple[str, str]) -> None:
        kind, name = key
        if kind == "room":
            self.rooms.alarm(name)
        elif kind == "early":
            self.rooms.early.alarm()
        elif kind == "shard":
            self.recovery.alarm(int(name))
        else:
            self.workers.alarm(name)

    def _worker_changed(self, record: types.Worker, stored: bool) -> None:
        for outbox in self._routers:
            outbox.put(pb.MeshEvent(worker=record))
        if stored and (shard := self._shard_of_worker(record.worker_id)):
            self.records.set(WORKER_PREFIX + record.worker_id, record.SerializeToString, shard.guard)

    def _worker_gone(self, worker_id: str) -> None:
        for outbox in self._routers:
            outbox.put(pb.MeshEvent(gone=pb.WorkerGone(worker_id=worker_id)))
        if shard := self._shard_of_worker(worker_id):
            self.records.delete(WORKER_PREFIX + worker_id, shard.guard)

    def _worker_lost(self, worker_id: str, message: str) -> None:
        self.journal.worker_lost(worker_id, message)
        self.rooms.worker_lost(worker_id, message)

    # ---------------------------------------------------------------------------------- shards

    def _epoch_of(self, shard: int) -> int:
        """The epoch of our claim on a shard. Raises `MeshError` when no room may be opened in it here."""
        if (owned := self.shards.owned.get(shard)) is None:
            raise MeshError(Reason.NOT_OWNER, f"shard {shard} is not of replica {self.shards.replica_id}")
        if self._refuse_without_store and not self._store.in_touch:
            raise MeshError(Reason.STORE_FAILED, "the store is away", retry_after_s=1.0)
        return owned.claim.epoch

    def _shard_of_worker(self, worker_id: str) -> Shard | None:
        """The shard whose owner writes a worker's record; None when that is not us, or nothing is written at all."""
        if not self._store.durable:
            return None
        return self.shards.owned.get(shard_of_request(worker_id, self.shards.count))

    async def _shard_gained(self, shard: Shard) -> None:
        """Load what the last owner wrote. Nobody asks for the shard before this returns."""
        if how := self.shards.taken_from(shard.number):
            ours = f"replica {self.shards.replica_id} (epoch {shard.claim.epoch})"
            self.journal.took_over(shard.number, f"{ours} {how}")
        rooms, _ = await self._store.scan(room_prefix(shard.number))
        self.records.know(rooms)
        self.recovery.gained(shard.number, [types.Room.FromString(entry.value) for entry in rooms])

    async def _shard_leaving(self, shard: Shard) -> None:
        self.recovery.dropped(shard.number)
        await self.records.settled(shard.guard)

    def _shard_lost(self, shard: Shard) -> None:
        self.recovery.dropped(shard.number)
        self.records.drop(shard.guard)

    def _ownership_changed(self) -> None:
        shards = self.shards
        ownership = pb.Ownership(replica_id=shards.replica_id, shards=shards.count)
        for number in sorted(shards.owned):
            ownership.owned.add(shard=number, epoch=shards.owned[number].claim.epoch)
        for name in sorted(shards.replicas):
            ownership.replicas.add(replica_id=name, address=shards.replicas[name])
        if ownership == self._ownership:
            return
        self._ownership = ownership
        for outbox in self._routers:
            outbox.put(pb.MeshEvent(ownership=ownership))
        for record in self.workers.records():
            if member := self.workers.get(record.worker_id):
                member.send(pb.ControlEvent(ownership=ownership))

    def _persist_room(self, room: Room) -> None:
        shard = self.shards.owned.get(shard_of_room(room.ticket.room_id))
        if shard is not None:
            self.records.set(room_key(room.ticket.room_id), lambda: wire.room_to(room).SerializeToString(), shard.guard)

    def _forget_room(self, room_id: str) -> None:
        if shard := self.shards.owned.get(shard_of_room(room_id)):
            self.records.delete(room_key(room_id), shard.guard)


def room_prefix(shard: int) -> str:
    return f"{ROOM_PREFIX}{shard:04x}/"


def room_key(room_id: str) -> str:
    return room_prefix(shard_of_room(room_id)) + room_id
