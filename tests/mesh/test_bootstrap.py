"""Bootstrap over real sockets, driven by the sessions that workers and routers use."""

from __future__ import annotations

import asyncio
import os
import select
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from grpc_health.v1 import health_pb2, health_pb2_grpc

from common.config.temporary import remove_leftovers
from common.errors.base import MeshError, Reason
from common.mesh import router_session
from common.mesh.router_session import RouterSession
from common.mesh.ticket import Ticket
from common.mesh.wire import ticket_from, ticket_to
from common.mesh.worker_session import WorkerSession
from common.rpc.announce import READY_FD, parse
from common.rpc.channel import connect, error_from
from pdmesh.v1 import bootstrap_service_pb2 as pb
from pdmesh.v1 import bootstrap_service_pb2_grpc as pb_grpc
from pdmesh.v1 import types_pb2 as types
from services.bootstrap.config import BootstrapConfig
from services.bootstrap.control import room_key
from services.bootstrap.main import Bootstrap
from services.bootstrap.store import etcd_server
from services.bootstrap.store.etcd import EtcdStore
from services.bootstrap.store.etcd_client import EtcdClient
from services.bootstrap.store.etcd_server import EtcdServer

pytestmark = pytest.mark.mesh

CONFIG = BootstrapConfig(port=0)
PATIENCE_S = 20.0


class Told:
    """What a session was told; `next` waits for the next item of a kind and skips no other."""

    def __init__(self) -> None:
        self.items: asyncio.Queue[Any] = asyncio.Queue()

    async def next(self) -> Any:
        async with asyncio.timeout(PATIENCE_S):
            return await self.items.get()

    async def kind(self, kind: str) -> Any:
        event = await self.next()
        assert event.WhichOneof("event") == kind, event
        return getattr(event, kind)


class Worker:
    """A worker's session with what it was told."""

    def __init__(self, address: str, role: types.WorkerRole.ValueType, name: str, **layout: int) -> None:
        self.record = types.Worker(worker_id=name, role=role, address="127.0.0.1:1")
        self.record.model.fingerprint = "f"
        self.record.kv_layout.CopyFrom(types.KvLayout(kind="mha", dtype="float32", page_size=16))
        for field, value in layout.items():
            setattr(self.record.kv_layout, field, value)
        self.told = Told()
        self.lost: asyncio.Queue[MeshError] = asyncio.Queue()
        self.session = WorkerSession(
            address, lambda: self.record, types.WorkerLoad, self.told.items.put_nowait, self.lost.put_nowait
        )

    def say(self, **event: Any) -> None:
        self.session.send(pb.WorkerEvent(**event))


class Mesh:
    """A bootstrap, and sessions that end with the test."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self.stack = stack
        self.bootstrap: Bootstrap

    async def start(self, config: BootstrapConfig = CONFIG, **options: Any) -> Bootstrap:
        self.bootstrap = Bootstrap(config, **options)
        self.stack.push_async_callback(self.bootstrap.stop)
        await self.bootstrap.start()
        await self.bootstrap.serve()
        return self.bootstrap

    async def worker(self, role: str, name: str, **layout: int) -> Worker:
        worker = Worker(self.bootstrap.address, types.WorkerRole.Value(f"WORKER_ROLE_{role}"), name, **layout)
        worker.session.start()
        self.stack.push_async_callback(worker.session.close)
        await until(worker.session.registered)
        return worker

    async def router(self) -> tuple[RouterSession, Told, asyncio.Event]:
        ended, changed = Told(), asyncio.Event()
        router = RouterSession(self.bootstrap.address, changed.set, ended.items.put_nowait)
        router.start()
        self.stack.push_async_callback(router.close)
        await until(router.ready)
        return router, ended, changed

    async def all(self) -> tuple[Worker, Worker, RouterSession, Told]:
        prefill, decode = await self.worker("PREFILL", "p"), await self.worker("DECODE", "d")
        router, ended, _ = await self.router()
        return prefill, decode, router, ended

    def stub(self) -> pb_grpc.BootstrapServiceAsyncStub:
        channel = connect(self.bootstrap.address)
        self.stack.push_async_callback(channel.close)
        return pb_grpc.BootstrapServiceStub(channel)

    async def room(self, ticket: Ticket) -> types.Room:
        return (await self.stub().GetRoom(pb.GetRoomRequest(room_id=ticket.room_id), timeout=5)).room


@pytest.fixture
async def mesh() -> AsyncIterator[Mesh]:
    async with AsyncExitStack() as stack:
        yield Mesh(stack)


async def until(event: asyncio.Event) -> None:
    async with asyncio.timeout(PATIENCE_S):
        await event.wait()


async def became(changed: asyncio.Event, condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            changed.clear()
            await changed.wait()


def wanted(request_id: str = "q", attempt: int = 1, **more: Any) -> pb.OpenRoom:
    return pb.OpenRoom(request_id=request_id, attempt=attempt, prefill_worker_id="p", decode_worker_id="d", **more)


def reserved(ticket: Ticket) -> pb.RoomReserved:
    rank = types.RankReservation(extents=[types.Extent(first_page=3, page_count=2)])
    return pb.RoomReserved(ticket=ticket_to(ticket), reservation=types.Reservation(ranks=[rank]))


async def test_a_room_from_open_to_close(mesh: Mesh) -> None:
    await mesh.start()
    prefill, decode, router, ended = await mesh.all()
    ticket = await router.open_room(wanted(), 5)
    assert ticket.attempt == 1
    assert ticket == await router.open_room(wanted(), 5)  # idempotent
    assert ticket != await router.open_room(wanted(attempt=2), 5)
    assert (await mesh.room(ticket)).state == types.ROOM_STATE_BOOTSTRAPPING

    decode.say(reserved=reserved(ticket))
    pushed = await prefill.told.kind("reserved")
    assert pushed == reserved(ticket)
    prefill.say(transferring=pb.RoomTransferring(ticket=ticket_to(ticket)))
    decode.say(transferred=pb.RoomTransferred(ticket=ticket_to(ticket)))
    end = await ended.next()
    assert (ticket_from(end.ticket), end.state) == (ticket, types.ROOM_STATE_SUCCESS)

    router.close_room(ticket)
    stub = mesh.stub()
    rooms = (await stub.ListRooms(pb.ListRoomsRequest(state=types.ROOM_STATE_SUCCESS), timeout=5)).rooms
    assert [room.ticket.room_id for room in rooms] == [ticket.room_id]
    assert prefill.told.items.empty()
    assert decode.told.items.empty()


async def test_a_room_that_its_router_names_needs_no_answer(mesh: Mesh) -> None:
    await mesh.start()
    prefill, decode, router, ended = await mesh.all()
    ticket = router.begin_room(wanted())
    assert ticket is not None
    again = router.begin_room(wanted("r"))
    assert again is not None
    assert again != ticket
    for each in (ticket, again):  # at once: the opening may still be on its way
        decode.say(reserved=reserved(each))
    assert {ticket_from((await prefill.told.kind("reserved")).ticket) for _ in range(2)} == {ticket, again}
    decode.say(transferred=pb.RoomTransferred(ticket=ticket_to(ticket)))
    end = await ended.next()
    assert (ticket_from(end.ticket), end.state) == (ticket, types.ROOM_STATE_SUCCESS)
    router.abort_room(again, Reason.ABORTED, "enough")
    assert (await ended.next()).message == "enough"
    assert (await prefill.told.kind("ended")).reason == "ABORTED"


async def test_a_named_room_that_is_refused_fails(mesh: Mesh) -> None:
    await mesh.start()
    await mesh.worker("PREFILL", "p")
    await mesh.worker("DECODE", "d", page_size=32)
    router, ended, _ = await mesh.router()
    ticket = router.begin_room(wanted())
    assert ticket is not None
    end = await ended.next()
    assert (ticket_from(end.ticket), end.reason) == (ticket, "LAYOUT_MISMATCH")
    assert "kv_layout.page_size" in end.message
    router.begin_room(pb.OpenRoom(request_id="x", attempt=1, prefill_worker_id="nobody"))
    assert (await ended.next()).reason == "NO_WORKER"
    assert mesh.bootstrap.servicer.control.rooms.find(ticket.room_id) is None
    await router.close()
    assert router.begin_room(wanted("later")) is None


async def test_a_room_may_be_closed_before_decodes_news_of_it_is_here(mesh: Mesh) -> None:
    await mesh.start()
    prefill, decode, router, _ = await mesh.all()
    ticket = await router.open_room(wanted(), 5)
    decode.say(reserved=reserved(ticket))
    await prefill.told.kind("reserved")
    router.close_room(ticket)
    await router.open_room(wanted("next"), 5)  # the close has been heard
    decode.say(transferred=pb.RoomTransferred(ticket=ticket_to(ticket)))
    decode.say(transferred=pb.RoomTransferred(ticket=ticket_to(Ticket(ticket.room_id, 1, 1))))
    assert (await decode.told.kind("refused")).reason == "STALE_TICKET"  # and so have the words before
    assert (await mesh.room(ticket)).state == types.ROOM_STATE_SUCCESS


async def test_abort_before_the_reservation_releases_at_once_and_refuses_it_later(mesh: Mesh) -> None:
    await mesh.start()
    prefill, decode, router, ended = await mesh.all()
    ticket = await router.open_room(wanted(), 5)
    router.abort_room(ticket, Reason.ABORTED, "no longer wanted")
    assert (await ended.next()).reason == "ABORTED"
    assert (await prefill.told.kind("ended")).message == "no longer wanted"
    assert (await decode.told.kind("ended")).ticket == ticket_to(ticket)
    await decode.told.kind("released")
    decode.say(reserved=reserved(ticket))
    await decode.told.kind("ended")
    await decode.told.kind("released")
    assert (await decode.told.kind("refused")).reason == "WRONG_STATE"


async def test_abort_after_the_push_releases_when_prefill_is_quiet(mesh: Mesh) -> None:
    await mesh.start()
    prefill, decode, router, ended = await mesh.all()
    ticket = await router.open_room(wanted(), 5)
    decode.say(reserved=reserved(ticket))
    await prefill.told.kind("reserved")
    router.abort_room(ticket, Reason.ABORTED, "the client left")
    router.close_room(ticket)
    await prefill.told.kind("ended")
    await decode.told.kind("ended")
    prefill.say(quiet=pb.RoomQuiet(ticket=ticket_to(ticket)))
    assert (await decode.told.kind("released")).ticket == ticket_to(ticket)
    assert ended.items.empty()


async def test_a_lost_prefill_worker_fails_its_rooms_and_releases_them(mesh: Mesh) -> None:
    await mesh.start()
    prefill, decode, router, ended = await mesh.all()
    ticket = await router.open_room(wanted(), 5)
    decode.say(reserved=reserved(ticket))
    await prefill.told.kind("reserved")
    await prefill.session.close()
    assert (await ended.next()).reason == "WORKER_LOST"
    await decode.told.kind("ended")
    await decode.told.kind("released")
    await became_state(router, "p", types.WORKER_STATE_OFFLINE)
    with pytest.raises(MeshError) as caught:
        await router.open_room(wanted("q2"), 5)
    assert caught.value.reason is Reason.NO_WORKER


async def became_state(router: RouterSession, name: str, state: types.WorkerState.ValueType) -> None:
    changed = asyncio.Event()
    router.on_workers_changed = changed.set
    await became(changed, lambda: router.workers[name].state == state)


async def test_a_silent_worker_goes_offline_and_comes_back_with_a_higher_epoch(mesh: Mesh) -> None:
    await mesh.start(replace(CONFIG, disaggregation_heartbeat_interval=1.0))
    prefill, decode, router, ended = await mesh.all()
    epoch = decode.session.epoch
    ticket = await router.open_room(wanted(), 5)
    [link] = decode.session.up
    assert link.heartbeats
    link.heartbeats.cancel()
    assert (await ended.next()).reason == "WORKER_LOST"
    assert (await prefill.told.kind("ended")).ticket == ticket_to(ticket)
    async with asyncio.timeout(PATIENCE_S):
        await decode.lost.get()
    await until(decode.session.registered)
    assert decode.session.epoch > epoch
    await became_state(router, "d", types.WORKER_STATE_READY)


async def test_what_does_not_fit_is_refused_by_name(mesh: Mesh) -> None:
    await mesh.start()
    await mesh.worker("PREFILL", "p")
    await mesh.worker("DECODE", "d", page_size=32)
    router, _, _ = await mesh.router()
    with pytest.raises(MeshError) as caught:
        await router.open_room(wanted(), 5)
    assert caught.value.reason is Reason.LAYOUT_MISMATCH
    assert "kv_layout.page_size" in caught.value.message
    with pytest.raises(MeshError) as caught:
        await router.open_room(pb.OpenRoom(request_id="x", attempt=1, prefill_worker_id="nobody"), 5)
    assert caught.value.reason is Reason.NO_WORKER


async def test_a_stale_ticket_and_a_strangers_word_change_nothing(mesh: Mesh) -> None:
    await mesh.start()
    prefill, decode, router, _ = await mesh.all()
    ticket = await router.open_room(wanted(), 5)
    stale = Ticket(ticket.room_id, ticket.attempt, ticket.epoch - 1)
    decode.say(transferred=pb.RoomTransferred(ticket=ticket_to(stale)))
    refused = await decode.told.kind("refused")
    assert (refused.reason, ticket_from(refused.ticket)) == ("STALE_TICKET", stale)
    prefill.say(reserved=reserved(ticket))
    assert (await prefill.told.kind("refused")).reason == "NOT_FOUND"
    assert (await mesh.room(ticket)).state == types.ROOM_STATE_BOOTSTRAPPING


async def test_only_bootstrap_expires_a_room(mesh: Mesh) -> None:
    await mesh.start(replace(CONFIG, disaggregation_bootstrap_timeout=0.05))
    prefill, decode, router, ended = await mesh.all()
    await router.open_room(wanted(), 5)
    assert (await ended.next()).reason == "BOOTSTRAP_TIMEOUT"
    assert (await prefill.told.kind("ended")).reason == (await decode.told.kind("ended")).reason == "BOOTSTRAP_TIMEOUT"
    past = Timestamp(seconds=1)
    with pytest.raises(MeshError) as caught:
        await router.open_room(wanted("late", deadline=past), 5)
    assert caught.value.reason is Reason.DEADLINE_EXCEEDED


async def test_a_router_that_breaks_leaves_no_room_behind(mesh: Mesh) -> None:
    await mesh.start()
    prefill, decode, router, _ = await mesh.all()
    await router.open_room(wanted(), 5)
    await router.close()
    await prefill.told.kind("ended")
    await decode.told.kind("ended")
    with pytest.raises(MeshError) as caught:
        await router.open_room(wanted("later"), 5)
    assert caught.value.reason is Reason.BOOTSTRAP_UNREACHABLE


async def test_draining_is_seen_and_a_drained_worker_is_forgotten(mesh: Mesh) -> None:
    await mesh.start()
    _, decode, router, _ = await mesh.all()
    decode.session.draining()
    await became_state(router, "d", types.WORKER_STATE_DRAINING)
    changed = asyncio.Event()
    router.on_workers_changed = changed.set
    await decode.session.close()
    await became(changed, lambda: "d" not in router.workers)


@pytest.mark.parametrize("durable", [False, True], ids=["memory", "etcd"])
async def test_a_restart_raises_the_epoch_and_a_room_goes_on(mesh: Mesh, durable: bool) -> None:
    def store() -> Any:
        return EtcdStore(EtcdClient([server.endpoint])) if durable else None

    server = EtcdServer()
    if durable:
        await server.start()
        mesh.stack.push_async_callback(server.stop)
    first = await mesh.start(store=store())
    prefill, decode, router, ended = await mesh.all()
    old = await router.open_room(wanted(), 5)
    decode.say(reserved=reserved(old))
    await prefill.told.kind("reserved")
    epochs = prefill.session.epoch, decode.session.epoch
    await first.stop()
    for worker in (prefill, decode):
        async with asyncio.timeout(PATIENCE_S):
            await worker.lost.get()
    opening = asyncio.create_task(router.open_room(wanted("while away"), PATIENCE_S))

    await mesh.start(replace(CONFIG, port=first.server.port), store=store())
    await until(prefill.session.registered)
    await until(decode.session.registered)
    await until(router.ready)
    assert (prefill.session.epoch, decode.session.epoch) == epochs, "the same lives go on"
    assert (await opening).epoch > old.epoch
    assert ended.items.empty()
    if not durable:  # as a worker does that tells what it holds
        decode.say(reserved=reserved(old))
        await prefill.told.kind("reserved")
    prefill.say(transferring=pb.RoomTransferring(ticket=ticket_to(old)))
    decode.say(transferred=pb.RoomTransferred(ticket=ticket_to(old)))
    end = await ended.next()
    assert (ticket_from(end.ticket), end.state) == (old, types.ROOM_STATE_SUCCESS)
    if durable:
        assert (await mesh.room(old)).state == types.ROOM_STATE_SUCCESS


async def test_a_room_without_an_owner_for_too_long_has_failed(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_session, "SWEEP_S", 0.02)
    monkeypatch.setattr(router_session, "OWNERLESS_S", 0.2)
    bootstrap = await mesh.start()
    _, _, router, ended = await mesh.all()
    ticket = await router.open_room(wanted(), 5)
    await bootstrap.stop()
    end = await ended.next()
    assert (ticket_from(end.ticket), end.reason) == (ticket, "BOOTSTRAP_UNREACHABLE")
    with pytest.raises(MeshError) as caught:
        await router.open_room(wanted("next"), 0.1)
    assert caught.value.reason is Reason.BOOTSTRAP_UNREACHABLE


async def test_rooms_and_workers_are_written_to_etcd(mesh: Mesh) -> None:
    bootstrap = await mesh.start(replace(CONFIG, store="etcd", room_history=1))
    prefill, decode, router, ended = await mesh.all()
    tickets = []
    for n in range(3):
        ticket = await router.open_room(wanted(f"q{n}"), 5)
        decode.say(reserved=reserved(ticket))
        await prefill.told.kind("reserved")
        decode.say(transferred=pb.RoomTransferred(ticket=ticket_to(ticket)))
        await ended.next()
        router.close_room(ticket)
        tickets.append(ticket)
    last = await router.open_room(wanted("last"), 5)
    control = bootstrap.servicer.control
    await control.records.flush()
    entries, _ = await bootstrap.store.scan("/pdmesh/rooms/")
    rooms = [types.Room.FromString(entry.value) for entry in entries]
    assert {room.ticket.room_id: room.state for room in rooms} == {
        tickets[-1].room_id: types.ROOM_STATE_SUCCESS,  # the one that the history has room for
        last.room_id: types.ROOM_STATE_BOOTSTRAPPING,
    }
    entries, _ = await bootstrap.store.scan("/pdmesh/workers/")
    assert [entry.key for entry in entries] == ["/pdmesh/workers/d", "/pdmesh/workers/p"]


async def test_health_tells_whether_the_store_is_reached(mesh: Mesh) -> None:
    server = EtcdServer()
    await server.start()
    mesh.stack.push_async_callback(server.stop)
    await server.stop(remove=False)
    store = EtcdStore(EtcdClient([server.endpoint], timeout_s=0.3))
    bootstrap = mesh.bootstrap = Bootstrap(CONFIG, store)
    mesh.stack.push_async_callback(bootstrap.stop)
    await bootstrap.start()
    serving = asyncio.create_task(bootstrap.serve())
    async with connect(bootstrap.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        watch = health.Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await mesh.stub().ListWorkers(pb.ListWorkersRequest(), timeout=5)
        error = error_from(caught.value)
        assert (error.reason, error.retryable) == (Reason.STORE_FAILED, True)
        await server.start()
        async with asyncio.timeout(PATIENCE_S):
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()
    await serving


async def test_rooms_go_on_while_etcd_is_away(mesh: Mesh) -> None:
    server = EtcdServer()
    await server.start()
    mesh.stack.push_async_callback(server.stop)
    bootstrap = await mesh.start(store=EtcdStore(EtcdClient([server.endpoint], timeout_s=0.5)))
    _, decode, router, ended = await mesh.all()
    await server.stop(remove=False)
    ticket = await router.open_room(wanted(), 5)
    decode.say(reserved=reserved(ticket))
    decode.say(transferred=pb.RoomTransferred(ticket=ticket_to(ticket)))
    assert (await ended.next()).state == types.ROOM_STATE_SUCCESS
    await server.start()
    async with asyncio.timeout(PATIENCE_S):
        await bootstrap.servicer.control.records.flush()
    entry = await bootstrap.store.get(room_key(ticket.room_id))
    assert entry
    assert types.Room.FromString(entry.value).state == types.ROOM_STATE_SUCCESS


async def test_bad_calls_get_clear_answers(mesh: Mesh) -> None:
    await mesh.start()
    stub = mesh.stub()
    for call, reason in (
        (stub.GetRoom(pb.GetRoomRequest(room_id="none"), timeout=5), Reason.NOT_FOUND),
        (stub.ListRooms(pb.ListRoomsRequest(page_size=5000), timeout=5), Reason.INVALID_PARAMETER),
        (stub.ListRooms(pb.ListRoomsRequest(page_token="x"), timeout=5), Reason.INVALID_PARAMETER),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert error_from(caught.value).reason is reason
    session = stub.WorkerSession(iter([pb.WorkerSessionRequest()]))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await session.read()
    assert error_from(caught.value).reason is Reason.INVALID_PARAMETER


async def test_rooms_are_listed_in_pages(mesh: Mesh) -> None:
    await mesh.start()
    _, _, router, _ = await mesh.all()
    tickets = await asyncio.gather(*(router.open_room(wanted(f"q{n}"), 5) for n in range(5)))
    stub, token, seen = mesh.stub(), "", []
    for size in (2, 2, 1):
        answer = await stub.ListRooms(pb.ListRoomsRequest(page_size=2, page_token=token), timeout=5)
        assert len(answer.rooms) == size
        seen += [ticket_from(room.ticket) for room in answer.rooms]
        token = answer.next_page_token
    assert token == ""
    assert seen == sorted(tickets, key=lambda ticket: int(ticket.room_id.split("-")[1], 16), reverse=True)
    assert not (await stub.ListRooms(pb.ListRoomsRequest(worker_id="x"), timeout=5)).rooms
    workers = (await stub.ListWorkers(pb.ListWorkersRequest(role=types.WORKER_ROLE_DECODE), timeout=5)).workers
    assert [worker.worker_id for worker in workers] == ["d"]


async def test_a_taken_port_is_refused(mesh: Mesh) -> None:
    bootstrap = await mesh.start()
    with pytest.raises(MeshError) as caught:
        Bootstrap(replace(CONFIG, port=bootstrap.server.port))
    assert caught.value.reason is Reason.BAD_CONFIG
    assert bootstrap.address in caught.value.message


async def test_a_session_that_cannot_take_what_it_is_told_begins_anew(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    await mesh.start()
    defects = ["one"]
    receive = router_session.RouterLink.receive

    def defective(link: Any, event: Any) -> None:
        if defects:
            raise KeyError(defects.pop())
        receive(link, event)

    monkeypatch.setattr(router_session.RouterLink, "receive", defective)
    router, *_ = await mesh.router()
    assert not defects
    await until(router.ready)


async def test_a_killed_bootstrap_takes_its_private_etcd_along() -> None:
    process, reader = start_process()
    try:
        with os.fdopen(reader) as announced:
            address = parse(await asyncio.to_thread(announced.readline)).grpc
        async with connect(str(address)) as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
            while (await watch.read()).status != health_pb2.HealthCheckResponse.SERVING:
                pass
            watch.cancel()
        [etcd] = children(process.pid)
        with os.fdopen(os.pidfd_open(etcd)) as end:  # readable once it has ended
            process.kill()
            await asyncio.to_thread(select.select, [end], [], [], PATIENCE_S)
            assert select.select([end], [], [], 0)[0]
    finally:
        process.kill()
        process.wait()
        remove_leftovers(etcd_server.PREFIX)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def start_process() -> tuple[subprocess.Popen[bytes], int]:
    """A bootstrap with a private etcd, and the descriptor on which it announces itself."""
    reader, writer = os.pipe()
    script = (
        "from services.bootstrap.main import *; from services.bootstrap.config import BootstrapConfig;"
        "run(BootstrapProcessConfig(BootstrapConfig(port=0, store='etcd')))"
    )
    command, environ = [sys.executable, "-c", script], os.environ | {READY_FD: str(writer)}
    process = subprocess.Popen(command, env=environ, pass_fds=(writer,), stderr=subprocess.DEVNULL)
    os.close(writer)
    return process, reader
