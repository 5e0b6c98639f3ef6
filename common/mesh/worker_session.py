"""A worker's sessions with bootstrap: registration, heartbeats, and room events both ways."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from common.config.tls import Credentials
from common.errors.base import MeshError
from common.mesh.replicas import Link, Replicas
from common.mesh.shards import shard_of_room
from common.obs.log import get_logger
from pdmesh.v1 import bootstrap_service_pb2 as pb
from pdmesh.v1 import types_pb2

log = get_logger(__name__)

# Room events that wait for their shard to get an owner; beyond that the oldest are lost, and `held` has to do.
MAX_UNSENT = 10_000

# Nobody goes on because of these: decode and prefill have told each other.
UNHURRIED = {"transferring", "transferred"}


class WorkerSession(Replicas["WorkerLink"]):
    """Keeps a worker registered from `start` to `close`, with every replica, through restarts of bootstrap.

    `describe` gives the record for a registration, `load` the figures for a heartbeat. `on_event` gets every event
    of a room's owner, and what concerns the worker itself. `on_registered` is called when there is a session again,
    and when the worker's epoch has changed, which begins a new life: bootstrap has failed the rooms of the one
    before. `on_lost` is called when no session is left. `held` tells which rooms the worker holds, for an owner that
    is new to them; without it nothing is told. All callbacks run in the event loop.
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
        held: Callable[[], list[pb.HeldRoom]] | None = None,
    ) -> None:
        super().__init__(bootstrap_address, tls)
        self.describe = describe
        self.load = load
        self.on_event = on_event
        self.on_lost = on_lost
        self.on_registered = on_registered
        self.held = held
        self.registered = asyncio.Event()
        self.worker_id = ""
        self.epoch = 0
        self.birth = asyncio.Lock()  # held by the one session that asks for the first epoch
        self.is_draining = False
        self._unsent: defaultdict[int, list[pb.WorkerEvent]] = defaultdict(list)

    def send(self, event: pb.WorkerEvent) -> None:
        """Queue an event about a room for its owner; while there is none, it waits for the next."""
        kind = str(event.WhichOneof("event"))
        shard = shard_of_room(getattr(event, kind).ticket.room_id)
        if link := self.owners.of(shard):
            put = link.outbox.put_at_leisure if kind in UNHURRIED else link.outbox.put
            put(event)
        else:
            unsent = self._unsent[shard]
            unsent.append(event)
            del unsent[:-MAX_UNSENT]

    def draining(self) -> None:
        """Tell that the worker takes no new work, now and after every reconnection."""
        self.is_draining = True
        self._tell_all(pb.WorkerEvent(draining=pb.WorkerDraining()))

    def heartbeat(self) -> None:
        """Tell the load now; the session does so by itself at the interval that bootstrap gave."""
        self._tell_all(pb.WorkerEvent(heartbeat=pb.WorkerHeartbeat(load=self.load())))

    def _tell_all(self, event: pb.WorkerEvent) -> None:
        for link in self.up:
            link.outbox.put(event)

    # ---------------------------------------------------------------------------------- of the links

    def make_link(self, address: str) -> WorkerLink:
        return WorkerLink(self, address)

    def gained(self, link: WorkerLink, shards: list[int]) -> None:
        """What is held goes first: the owner must know the rooms before it hears more of them."""
        if self.held is not None:
            wanted = set(shards)
            rooms = [held for held in self.held() if shard_of_room(held.ticket.room_id) in wanted]
            link.outbox.put(pb.WorkerEvent(held=pb.HeldRooms(shards=shards, rooms=rooms)))
        for shard in shards:
            for event in self._unsent.pop(shard, ()):
                link.outbox.put(event)

    def link_registered(self, link: WorkerLink, registered: pb.WorkerRegistered) -> None:
        """A replica knows the worker. A higher epoch than ours says that our life has ended there: begin another."""
        first = not self.registered.is_set() or registered.epoch > self.epoch
        ended = 0 < self.epoch < registered.epoch
        self.worker_id, self.epoch = registered.worker_id, max(self.epoch, registered.epoch)
        self.registered.set()
        if ended:
            log.warning("bootstrap had given this worker up; it begins anew", worker=self.worker_id, epoch=self.epoch)
            for other in self.up:
                if other is not link:
                    other.outbox.close()  # its stream ends, and the next one bears the new epoch
        if first and self.on_registered:
            self.on_registered()

    def link_lost(self, link: WorkerLink, error: MeshError) -> None:
        self.owners.lost(link)
        if not self.up and self.registered.is_set():
            self.registered.clear()
            if self.on_lost and not self.closing:
                self.on_lost(error)

    def link_told(self, link: WorkerLink, event: pb.ControlEvent) -> None:
        """Pass an event on, unless it is about a room that another replica owns by now."""
        said = getattr(event, str(event.WhichOneof("event")))
        if "ticket" not in said.DESCRIPTOR.fields_by_name or self.owners.of_room(said.ticket.room_id) is link:
            self.on_event(event)
        else:
            log.info("not the owner's word", room_id=said.ticket.room_id, address=link.address)


class WorkerLink(Link):
    """A worker's session with one replica."""

    def __init__(self, session: WorkerSession, address: str) -> None:
        super().__init__(address, session.tls)
        self._session = session
        self._first = False  # it is this link that asks for the first epoch
        self.heartbeats: asyncio.Task[None] | None = None

    async def turn(self) -> None:
        """The first registration comes alone: the epoch that it gets goes for all the others."""
        if not self._session.epoch:
            await self._session.birth.acquire()
            self._first = True
            if self._session.epoch:
                self._born()

    def open(self, stub: Any) -> Any:
        return stub.WorkerSession()

    def request(self, events: list[pb.WorkerEvent]) -> pb.WorkerSessionRequest:
        return pb.WorkerSessionRequest(events=events)

    def opened(self) -> None:
        session = self._session
        worker = types_pb2.Worker()
        worker.CopyFrom(session.describe())
        worker.worker_id = worker.worker_id or session.worker_id
        worker.epoch = session.epoch
        worker.load.CopyFrom(session.load())
        self.outbox.put(pb.WorkerEvent(register=pb.WorkerRegister(worker=worker)))

    def receive(self, event: pb.ControlEvent) -> None:
        match event.WhichOneof("event"):
            case "registered":
                self._registered(event.registered)
            case "ownership":
                self._session.told(self, event.ownership)
            case _:
                self._session.link_told(self, event)

    def lost(self, error: MeshError) -> None:
        self._born()
        self.up = False
        if self.heartbeats:
            self.heartbeats.cancel()
            self.heartbeats = None
        self._session.link_lost(self, error)

    def _registered(self, registered: pb.WorkerRegistered) -> None:
        self.up = True
        self.established()
        self._session.link_registered(self, registered)
        self._born()
        if self._session.is_draining:
            self.outbox.put(pb.WorkerEvent(draining=pb.WorkerDraining()))
        interval_s = registered.heartbeat_interval.ToNanoseconds() / 1e9
        self.heartbeats = asyncio.create_task(self._beat(interval_s))

    def _born(self) -> None:
        if self._first:
            self._first = False
            self._session.birth.release()

    async def _beat(self, interval_s: float) -> None:
        while True:
            self.outbox.put(pb.WorkerEvent(heartbeat=pb.WorkerHeartbeat(load=self._session.load())))
            await asyncio.sleep(interval_s)
