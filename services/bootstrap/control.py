"""The control plane as a whole: workers, rooms and routers, without any I/O of their own."""

from __future__ import annotations

import time
from collections.abc import Callable

from common.mesh.room import Room
from pdmesh.v1 import bootstrap_service_pb2 as pb
from pdmesh.v1 import types_pb2 as types
from services.bootstrap import metrics, wire
from services.bootstrap.config import BootstrapConfig
from services.bootstrap.records import Records
from services.bootstrap.rooms import Rooms, RouterOutbox
from services.bootstrap.timeline import Journal
from services.bootstrap.timers import Timers
from services.bootstrap.workers import Workers

WORKER_PREFIX, ROOM_PREFIX = "/pdmesh/workers/", "/pdmesh/rooms/"


def steady_clock() -> Callable[[], float]:
    """A clock that shows the time of day and never jumps."""
    offset = time.time() - time.monotonic()
    return lambda: offset + time.monotonic()


class ControlPlane:
    """Puts the parts together; `epoch` is this bootstrap's, above that of every earlier one."""

    def __init__(self, config: BootstrapConfig, epoch: int, records: Records) -> None:
        self.epoch = epoch
        self.now = steady_clock()
        self.timers: Timers[tuple[str, str]] = Timers(self.now)
        self.records = records
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
        self.journal = Journal(self.now, self.workers.figures, config.room_history)
        self.rooms = Rooms(
            self.now,
            self.timers,
            epoch=epoch,
            timeouts=config.timeouts,
            history=config.room_history,
            workers=self.workers,
            journal=self.journal,
            persist=self._persist_room,
            forget=lambda room_id: records.delete(ROOM_PREFIX + room_id),
        )

    async def run_timers(self) -> None:
        """Fire alarms, for ever."""
        await self.timers.run(self._alarm)

    def router_joined(self, outbox: RouterOutbox) -> None:
        """Tell a router all workers, and from now on every change."""
        for record in self.workers.records():
            outbox.put(pb.MeshEvent(worker=record))
        outbox.put(pb.MeshEvent(snapshot_end=pb.SnapshotEnd()))
        self._routers.add(outbox)
        metrics.ROUTERS.inc()

    def router_left(self, outbox: RouterOutbox) -> None:
        self._routers.discard(outbox)
        metrics.ROUTERS.dec()
        self.rooms.router_lost(outbox)

    def close(self) -> None:
        """End all sessions after what is queued for them."""
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
        else:
            self.workers.alarm(name)

    def _worker_changed(self, record: types.Worker, stored: bool) -> None:
        for outbox in self._routers:
            outbox.put(pb.MeshEvent(worker=record))
        if stored:
            self.records.set(WORKER_PREFIX + record.worker_id, record.SerializeToString)

    def _worker_gone(self, worker_id: str) -> None:
        for outbox in self._routers:
            outbox.put(pb.MeshEvent(gone=pb.WorkerGone(worker_id=worker_id)))
        self.records.delete(WORKER_PREFIX + worker_id)

    def _worker_lost(self, worker_id: str, message: str) -> None:
        self.journal.worker_lost(worker_id, message)
        self.rooms.worker_lost(worker_id, message)

    def _persist_room(self, room: Room) -> None:
        self.records.set(ROOM_PREFIX + room.ticket.room_id, lambda: wire.room_to(room).SerializeToString())
