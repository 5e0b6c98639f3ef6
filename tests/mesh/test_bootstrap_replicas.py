"""Replicas of bootstrap, and one that begins anew: rooms move with their shards, and what nobody knows comes to rest.

Processes that are killed are in tests/fault/test_bootstrap_ha.py; here replicas share this process.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import pytest

from common.errors.base import MeshError, Reason
from common.mesh.router_session import RouterSession
from common.mesh.shards import shard_of_room
from common.mesh.ticket import Ticket
from common.mesh.wire import ticket_from, ticket_to
from common.mesh.worker_session import WorkerSession
from common.rpc.channel import connect
from pdmesh.v1 import bootstrap_service_pb2 as pb
from pdmesh.v1 import bootstrap_service_pb2_grpc as pb_grpc
from pdmesh.v1 import types_pb2 as types
from services.bootstrap.config import BootstrapConfig
from services.bootstrap.main import Bootstrap
from services.bootstrap.shards import CLUSTER_PREFIX, DEFAULT_SHARDS
from services.bootstrap.store.base import Entry
from services.bootstrap.store.etcd import EtcdStore
from services.bootstrap.store.etcd_client import EtcdClient
from services.bootstrap.store.etcd_server import EtcdServer
from services.bootstrap.store.memory import MemoryStore
from tests.mesh.reflect import ask

pytestmark = pytest.mark.mesh

PATIENCE_S = 20.0
# Everybody has told after a second.
CONFIG = BootstrapConfig(port=0, disaggregation_heartbeat_interval=0.25)


class Worker:
    """A worker's session; `held` is what it tells a new owner, `told` what it was told."""

    def __init__(self, bootstrap: str, name: str, role: types.WorkerRole.ValueType) -> None:
        self.held: list[pb.HeldRoom] = []
        self.told: asyncio.Queue[pb.ControlEvent] = asyncio.Queue()
        record = types.Worker(worker_id=name, role=role, address="127.0.0.1:1")
        self.session = WorkerSession(
            bootstrap, lambda: record, types.WorkerLoad, self.told.put_nowait, held=lambda: self.held
        )

    def say(self, **event: Any) -> None:
        self.session.send(pb.WorkerEvent(**event))

    async def hear(self, kind: str) -> Any:
        """The next event, which must be of this kind."""
        async with asyncio.timeout(PATIENCE_S):
            event = await self.told.get()
        assert event.WhichOneof("event") == kind, event
        return getattr(event, kind)


class Mesh:
    """Replicas, workers and a router that end with the test."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self.stack = stack
        self.etcd = EtcdServer()
        self.ended: asyncio.Queue[pb.RoomEnded] = asyncio.Queue()
        self.router: RouterSession
        self.prefill: Worker
        self.decode: Worker
        self.named = False  # rooms, by the router

    async def replica(self, config: BootstrapConfig = CONFIG, *, durable: bool = True) -> Bootstrap:
        store = None
        if durable:
            if not self.etcd.process:
                await self.etcd.start()
                self.stack.push_async_callback(self.etcd.stop)
            store = EtcdStore(EtcdClient([self.etcd.endpoint], timeout_s=0.5), lease_ttl_s=2)
        bootstrap = Bootstrap(config, store)
        self.stack.push_async_callback(bootstrap.stop)
        await bootstrap.start()
        await bootstrap.serve()
        return bootstrap

    async def join(self, bootstrap: str) -> None:
        """A prefill worker, a decode worker and a router."""
        self.prefill = Worker(bootstrap, "p", types.WORKER_ROLE_PREFILL)
        self.decode = Worker(bootstrap, "d", types.WORKER_ROLE_DECODE)
        for worker in (self.prefill, self.decode):
            worker.session.start()
            self.stack.push_async_callback(worker.session.close)
            await until(worker.session.registered)
        self.router = RouterSession(bootstrap, on_room_ended=self.ended.put_nowait)
        self.router.start()
        self.stack.push_async_callback(self.router.close)
        await until(self.router.ready)

    async def open(self, request_id: str) -> Ticket:
        wanted = pb.OpenRoom(request_id=request_id, attempt=1, prefill_worker_id="p", decode_worker_id="d")
        return (self.named and self.router.begin_room(wanted)) or await self.router.open_room(wanted, PATIENCE_S)

    async def end(self) -> pb.RoomEnded:
        async with asyncio.timeout(PATIENCE_S):
            return await self.ended.get()


@pytest.fixture
async def mesh() -> AsyncIterator[Mesh]:
    async with AsyncExitStack() as stack:
        yield Mesh(stack)


async def until(event: asyncio.Event) -> None:
    async with asyncio.timeout(PATIENCE_S):
        await event.wait()


async def became(condition: Callable[[], bool]) -> None:
    """Wait for something that other tasks of this loop bring about."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            if condition():
                return
            await asyncio.sleep(0.01)


async def owns(bootstrap: Bootstrap, count: int) -> None:
    await became(lambda: len(bootstrap.servicer.control.shards.owned) == count)


def reserved(ticket: Ticket) -> pb.RoomReserved:
    rank = types.RankReservation(extents=[types.Extent(first_page=3, page_count=2)])
    return pb.RoomReserved(ticket=ticket_to(ticket), reservation=types.Reservation(ranks=[rank]))


def held(ticket: Ticket, phase: str, **more: Any) -> pb.HeldRoom:
    return pb.HeldRoom(ticket=ticket_to(ticket), phase=pb.HeldPhase.Value(f"HELD_PHASE_{phase}"), **more)


@pytest.mark.parametrize("named", [False, True], ids=["asked for", "named by the router"])
async def test_replicas_are_found_and_rooms_follow_their_shards(mesh: Mesh, named: bool) -> None:
    mesh.named = named
    first = await mesh.replica()
    await mesh.join(first.address)
    tickets = [await mesh.open(f"q{n}") for n in range(20)]
    for ticket in tickets:
        mesh.decode.say(reserved=reserved(ticket))
        await mesh.prefill.hear("reserved")
    mesh.decode.held = [held(ticket, "RESERVED", reservation=reserved(ticket).reservation) for ticket in tickets]
    mesh.prefill.held = [held(ticket, "RESERVED") for ticket in tickets]

    second = await mesh.replica()
    await owns(first, DEFAULT_SHARDS // 2)
    await owns(second, DEFAULT_SHARDS // 2)
    moved = [t for t in tickets if shard_of_room(t.room_id) in second.servicer.control.shards.owned]
    assert 0 < len(moved) < len(tickets)
    for ticket in tickets:
        mesh.decode.say(transferred=pb.RoomTransferred(ticket=ticket_to(ticket)))
    ends = [await mesh.end() for _ in tickets]
    assert {end.state for end in ends} == {types.ROOM_STATE_SUCCESS}
    assert {ticket_from(end.ticket) for end in ends} == set(tickets)
    assert len(mesh.router.up) == len(mesh.prefill.session.up) == 2

    async with connect(second.address) as channel:
        stub: pb_grpc.BootstrapServiceAsyncStub = pb_grpc.BootstrapServiceStub(channel)
        answer = await stub.ListReplicas(pb.ListReplicasRequest(), timeout=5)
    assert {status.replica.address: len(status.owned) for status in answer.replicas} == {
        first.address: 32,
        second.address: 32,
    }
    await first.stop()
    await owns(second, DEFAULT_SHARDS)
    assert (await mesh.open("after")).epoch > max(ticket.epoch for ticket in tickets)
    assert {worker.state for worker in mesh.router.workers.values()} == {types.WORKER_STATE_READY}


@pytest.mark.parametrize("named", [False, True], ids=["asked for", "named by the router"])
async def test_what_the_store_does_not_know_yet_is_told_by_router_and_workers(mesh: Mesh, named: bool) -> None:
    """The owner pushed a reservation and died before it had written a word."""
    mesh.named = named
    first = await mesh.replica(durable=False)
    await mesh.join(first.address)
    arrived, granted, failed = [await mesh.open(name) for name in ("arrived", "granted", "failed")]
    for ticket in (arrived, granted, failed):
        mesh.decode.say(reserved=reserved(ticket))
        await mesh.prefill.hear("reserved")
    mesh.decode.held = [
        held(arrived, "ARRIVED", reservation=reserved(arrived).reservation),
        held(granted, "RESERVED", reservation=reserved(granted).reservation),
        held(failed, "QUARANTINED", reservation=reserved(failed).reservation, reason="ABORTED", message="enough"),
    ]
    mesh.prefill.held = [held(granted, "RESERVED"), held(failed, "RESERVED")]
    await first.stop()
    await mesh.replica(replace(CONFIG, port=first.server.port), durable=False)
    ends = {ticket_from(end.ticket): end for end in (await mesh.end(), await mesh.end())}
    assert ends[arrived].state == types.ROOM_STATE_SUCCESS
    assert (ends[failed].reason, ends[failed].message) == ("ABORTED", "enough")
    seen = []
    while "ended" not in seen:
        async with asyncio.timeout(PATIENCE_S):
            seen.append(str((await mesh.prefill.told.get()).WhichOneof("event")))
    while not mesh.decode.told.empty():
        assert mesh.decode.told.get_nowait().WhichOneof("event") != "released", "the writer is not quiet yet"
    mesh.prefill.say(quiet=pb.RoomQuiet(ticket=ticket_to(failed)))
    while (event := await mesh.decode.told.get()).WhichOneof("event") != "released":
        pass
    assert ticket_from(event.released.ticket) == failed
    mesh.decode.say(transferred=pb.RoomTransferred(ticket=ticket_to(granted)))
    assert (await mesh.end()).state == types.ROOM_STATE_SUCCESS


async def test_pages_of_rooms_that_nobody_knows_come_back(mesh: Mesh) -> None:
    first = await mesh.replica(durable=False)
    await mesh.join(first.address)
    epoch = first.servicer.control.epoch
    written, quiet = (Ticket(f"{epoch:x}-{n}-1", 1, epoch) for n in (100, 200))
    mesh.decode.held = [held(written, "RESERVED"), held(quiet, "QUARANTINED")]
    mesh.prefill.held = [held(written, "RESERVED")]
    await first.stop()
    await mesh.replica(replace(CONFIG, port=first.server.port), durable=False)
    assert ticket_from((await mesh.prefill.hear("ended")).ticket) == written
    told = [await mesh.decode.hear(kind) for kind in ("ended", "ended", "released")]
    assert ticket_from(told[-1].ticket) == quiet, "no prefill worker holds it"
    mesh.prefill.say(quiet=pb.RoomQuiet(ticket=ticket_to(written)))
    assert ticket_from((await mesh.decode.hear("released")).ticket) == written


async def test_a_room_whose_worker_does_not_know_it_ends_with_a_reason(mesh: Mesh) -> None:
    first = await mesh.replica()
    await mesh.join(first.address)
    ticket = await mesh.open("q")
    mesh.decode.say(reserved=reserved(ticket))
    await mesh.prefill.hear("reserved")
    await first.servicer.control.records.flush()
    await first.stop()
    await mesh.replica(replace(CONFIG, port=first.server.port))
    end = await mesh.end()
    assert (end.reason, end.message) == ("WORKER_LOST", "decode worker d does not hold the room any more")


async def test_a_worker_and_a_router_that_do_not_come_back(mesh: Mesh) -> None:
    first = await mesh.replica()
    await mesh.join(first.address)
    followed, left = await mesh.open("followed"), await mesh.open("left")
    for ticket in (followed, left):
        mesh.decode.say(reserved=reserved(ticket))
        await mesh.prefill.hear("reserved")
    mesh.decode.held = [held(t, "RESERVED", reservation=reserved(t).reservation) for t in (followed, left)]
    await first.servicer.control.records.flush()
    mesh.router._open.pop(left)  # as if another router had opened it
    await first.stop()
    await mesh.prefill.session.close()
    second = await mesh.replica(replace(CONFIG, port=first.server.port))
    end = await mesh.end()
    assert end.reason == "WORKER_LOST"
    assert "did not come back" in end.message
    entry = second.servicer.control.rooms.get(left.room_id)
    await became(lambda: entry.room.state.name == "FAILED")
    assert entry.room.quarantined, "a prefill worker that is gone may still write"


@pytest.mark.parametrize("policy", ["serve", "refuse"])
async def test_new_requests_while_the_store_is_away(mesh: Mesh, policy: str) -> None:
    bootstrap = await mesh.replica(replace(CONFIG, on_store_loss=policy))
    await mesh.join(bootstrap.address)
    running = await mesh.open("running")
    await mesh.etcd.stop(remove=False)
    await became(lambda: not bootstrap.store.in_touch)
    if policy == "serve":
        await mesh.open("new")
        journal = bootstrap.servicer.control.journal
        await became(lambda: bool(journal.outages(0, float("inf"))))  # it is noticed
    else:
        with pytest.raises(MeshError) as caught:
            await mesh.open("new")
        assert caught.value.reason is Reason.STORE_FAILED
        assert caught.value.retryable
    explained = await asyncio.to_thread(ask, bootstrap.address, "Explain", requestId="new")
    if policy == "refuse":
        assert explained["summary"] == "No room was opened: the store is away."
        assert explained["reason"] == "STORE_FAILED"
    else:
        assert explained["summary"].endswith("what happens is in this replica's memory alone.")
    mesh.decode.say(reserved=reserved(running))
    await mesh.prefill.hear("reserved")
    mesh.decode.say(transferred=pb.RoomTransferred(ticket=ticket_to(running)))
    assert (await mesh.end()).state == types.ROOM_STATE_SUCCESS
    await mesh.etcd.start()
    async with asyncio.timeout(PATIENCE_S):
        await bootstrap.servicer.control.records.flush()
    await became(lambda: bootstrap.store.in_touch)
    assert len(bootstrap.servicer.control.shards.owned) == DEFAULT_SHARDS
    await mesh.open("later")


class Stumbling(MemoryStore):
    """Fails once, after the replica has announced itself."""

    failures = 1

    async def scan(self, prefix: str) -> tuple[list[Entry], int]:
        if prefix == CLUSTER_PREFIX and self.failures:
            self.failures -= 1
            raise MeshError(Reason.STORE_FAILED, "gone for a moment")
        return await super().scan(prefix)


async def test_a_start_that_failed_half_way_leaves_no_second_replica() -> None:
    bootstrap = Bootstrap(CONFIG, Stumbling())
    await bootstrap.start()
    await bootstrap.serve()
    shards = bootstrap.servicer.control.shards
    assert list(shards.replicas) == [shards.replica_id]
    assert len(shards.owned) == DEFAULT_SHARDS
    await bootstrap.stop()
