"""A worker's session with bootstrap: registration, heartbeats, and room events both ways."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from common.config.tls import Credentials
from common.errors.base import MeshError
from common.mesh.session import Session
from common.obs.log import get_logger
from pdmesh.v1 import bootstrap_service_pb2 as pb
from pdmesh.v1 import types_pb2

log = get_logger(__name__)


class WorkerSession(Session[pb.WorkerEvent, pb.ControlEvent]):
    """Keeps a worker registered from `start` to `close`, through restarts of bootstrap.

    `describe` gives the record for a registration, `load` the figures for a heartbeat. `on_event` gets every event
    but `registered`. `on_registered` is called after each registration, `on_lost` whenever one breaks:
    bootstrap then fails the worker's rooms, and the worker must do the same with those not yet handed over.
    All callbacks run in the event loop.
    """

    def __init__(
        self,
        bootstrap_address: str,
        describe: Callable[[], types_pb2.Worker],
        load: Callable[[], types_pb2.WorkerLoad],
        on_event: Callable[[pb.ControlEvent], None],
        on_lost: Callable[[MeshError], None] | None = None,
        on_registered: Callable[[], None] | None = None,
        tls: Credentials | None = None,
    ) -> None:
        super().__init__(bootstrap_address, tls)
        self.describe = describe
        self.load = load
        self.on_event = on_event
        self.on_lost = on_lost
        self.on_registered = on_registered
        self.registered = asyncio.Event()
        self.worker_id = ""
        self.epoch = 0
        self._draining = False
        self._unsent: list[pb.WorkerEvent] = []
        self._heartbeats: asyncio.Task[None] | None = None

    def send(self, event: pb.WorkerEvent) -> None:
        """Queue a room event. Without a session it is dropped, for its room has failed; a `quiet` is kept."""
        if self.registered.is_set():
            self.outbox.put(event)
        elif event.WhichOneof("event") == "quiet":
            self._unsent.append(event)

    def draining(self) -> None:
        """Tell that the worker takes no new work, now and after every reconnection."""
        self._draining = True
        self.send(pb.WorkerEvent(draining=pb.WorkerDraining()))

    def heartbeat(self) -> None:
        """Tell the load now; the session does so by itself at the interval that bootstrap gave."""
        self.send(pb.WorkerEvent(heartbeat=pb.WorkerHeartbeat(load=self.load())))

    # ---------------------------------------------------------------------------------- of the stream

    def open(self, stub: Any) -> Any:
        return stub.WorkerSession()

    def request(self, events: list[pb.WorkerEvent]) -> pb.WorkerSessionRequest:
        return pb.WorkerSessionRequest(events=events)

    def opened(self) -> None:
        worker = types_pb2.Worker()
        worker.CopyFrom(self.describe())
        worker.worker_id = worker.worker_id or self.worker_id
        worker.load.CopyFrom(self.load())
        self.outbox.put(pb.WorkerEvent(register=pb.WorkerRegister(worker=worker)))

    def receive(self, event: pb.ControlEvent) -> None:
        if event.WhichOneof("event") != "registered":
            self.on_event(event)
            return
        self.worker_id, self.epoch = event.registered.worker_id, event.registered.epoch
        self.registered.set()
        self.established()
        unsent, self._unsent = self._unsent, []
        for waiting in unsent:
            self.send(waiting)
        if self._draining:
            self.draining()
        interval_s = event.registered.heartbeat_interval.ToNanoseconds() / 1e9
        self._heartbeats = asyncio.create_task(self._beat(interval_s))
        if self.on_registered:
            self.on_registered()

    def lost(self, error: MeshError) -> None:
        if self._heartbeats:
            self._heartbeats.cancel()
            self._heartbeats = None
        if self.registered.is_set():
            self.registered.clear()
            if self.on_lost and not self.closing:
                self.on_lost(error)

    async def _beat(self, interval_s: float) -> None:
        while True:
            self.heartbeat()
            await asyncio.sleep(interval_s)
