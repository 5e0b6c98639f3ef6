"""Faults in the middle of a transfer, and an owner that dies under it: what `Explain` says, asked with JSON."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from common.mesh.wire import ticket_to
from common.mesh.worker_session import WorkerSession
from pdmesh.v1 import bootstrap_service_pb2 as pb
from pdmesh.v1 import bootstrap_service_pb2_grpc as bootstrap_grpc
from pdmesh.v1 import prefill_service_pb2 as prefill_pb
from pdmesh.v1 import prefill_service_pb2_grpc as prefill_grpc
from pdmesh.v1 import types_pb2 as types
from services.bootstrap.store.etcd_server import free_port
from tests.fault.cluster import etcd
from tests.mesh.harness import scrape
from tests.mesh.inspected import BEATS, PATIENCE_S, PROMPT, Mesh, channel_to, opened, ready, until
from tests.mesh.processes import services
from tests.mesh.reflect import Refused, ask

pytestmark = [pytest.mark.mesh, pytest.mark.fault, pytest.mark.slow]

# Nothing arrives while a test looks.
ENDLESS = "[transfer]\nlatency_s = 60.0\n"
# Long enough to break something in its middle.
LONG = "[transfer]\nlatency_s = 3.0\n"
ROUTE = "from prefill-0 to decode-0"


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Mesh]:
    with services(tmp_path, Mesh) as mesh:
        yield mesh


@pytest.fixture
def store(tmp_path: Path) -> Iterator[str]:
    with etcd(tmp_path) as started:
        yield started.store


@pytest.mark.parametrize("victim", ["prefill-0", "decode-0"])
async def test_a_worker_is_killed_in_the_middle_of_a_transfer(mesh: Mesh, victim: str) -> None:
    mesh.whole(prefill=mesh.profile("endless", ENDLESS))
    await ready(mesh)
    async with mesh.ask("killed") as asked:
        await mesh.room("killed", "TRANSFERRING")
        mesh[victim].kill()
        assert await asked.failure() is grpc.StatusCode.UNAVAILABLE
        said, reason = await mesh.explained("killed", f"{victim} is gone", "its session broke")
    assert reason == "WORKER_LOST"
    assert f"while pages went {ROUTE}" in said


async def test_a_transfer_that_does_not_end(mesh: Mesh) -> None:
    mesh.whole("--disaggregation-transfer-timeout", "1", prefill=mesh.profile("endless", ENDLESS))
    await ready(mesh)
    async with mesh.ask("endless") as asked:
        assert await asked.failure() is grpc.StatusCode.UNAVAILABLE
        said, reason = await mesh.explained("endless", f"The transfer {ROUTE} did not end for 1.0 s")
    assert reason == "TRANSFER_TIMEOUT"
    assert "both workers were alive" in said
    await until(lambda: not pending(mesh, "endless"))  # the writer is told, and stops


async def test_a_write_that_fails_at_the_writer(mesh: Mesh) -> None:
    mesh.whole(prefill=(*mesh.profile("endless", ENDLESS), "--transfer-timeout", "0.5"))
    await ready(mesh)
    async with mesh.ask("broken") as asked:
        assert await asked.failure() is grpc.StatusCode.UNAVAILABLE
        said, reason = await mesh.explained("broken", "prefill-0 gave the room up", "it did not end within 0.5 s")
    assert reason == "TRANSFER_FAILED"
    assert f"while pages went {ROUTE}" in said


async def test_a_backend_that_refuses_a_write(mesh: Mesh) -> None:
    """Decode grants pages that its pool does not have."""
    mesh.whole()
    await ready(mesh)
    record = await record_of(mesh, "decode-0")
    record.worker_id, record.epoch = "decode-1", 0
    liar = WorkerSession(mesh["bootstrap"].grpc, lambda: record, types.WorkerLoad, lambda event: None)
    liar.start()
    try:
        async with asyncio.timeout(PATIENCE_S):
            await liar.registered.wait()
        async with opened(mesh, "refused", len(PROMPT), decode="decode-1") as ticket:
            rank = types.RankReservation(endpoint=record.endpoints[0])
            rank.extents.add(first_page=record.pool_pages, page_count=3)
            reserved = pb.RoomReserved(ticket=ticket_to(ticket), reservation=types.Reservation(ranks=[rank]))
            liar.send(pb.WorkerEvent(reserved=reserved))
            async with channel_to(mesh["prefill-0"].grpc) as channel:
                call: Any = prefill_grpc.PrefillServiceStub(channel).Session()
                start = prefill_pb.PrefillStart(sequence_id=1, ticket=ticket_to(ticket), prompt_ids=PROMPT)
                start.sampling.max_new_tokens = 3
                command = prefill_pb.PrefillCommand(start=start)
                await call.write(prefill_pb.PrefillServiceSessionRequest(commands=[command]))
                said, reason = await mesh.explained("refused", "prefill-0 gave the room up", "pool")
                call.cancel()
    finally:
        await liar.close()
    assert reason == "TRANSFER_FAILED"
    assert "after the room was opened" in said


async def test_pages_that_are_not_what_was_sent(mesh: Mesh) -> None:
    """Real engines: the pages are spoilt in decode's pool after they arrived and before decode looks at them."""
    real = ("--engine", "torch", "--max-total-tokens", "512", "--kv-checksum", "full")
    mesh.whole(prefill=real, decode=real)
    await ready(mesh)
    async with mesh.ask("first", max_new_tokens=3) as asked:  # to connect takes both
        await asked.rest()
    mesh["prefill-0"].signal(signal.SIGSTOP)
    async with mesh.ask("spoilt", max_new_tokens=3) as asked:
        await mesh.room("spoilt", "WAITING_FOR_INPUT")
        mesh["decode-0"].signal(signal.SIGSTOP)
        mesh["prefill-0"].signal(signal.SIGCONT)
        written = 'pdmesh_transfer_rooms_total{backend="local",outcome="done"} 2.0'
        await until(lambda: written in scrape(str(mesh["prefill-0"].listening.metrics)))
        spoil_pool(mesh["decode-0"].process.pid)
        mesh["decode-0"].signal(signal.SIGCONT)
        await asked.rest()
    said, reason = await mesh.explained("spoilt", "An earlier attempt had failed: decode-0 gave the room up")
    assert reason == ""
    assert said.startswith("The hand-over succeeded in")
    assert "checksums differ from prefill's" in said
    spoilt, _ = mesh.call("Explain", requestId="spoilt")["rooms"]
    assert spoilt["reason"] == "CHECKSUM_MISMATCH"


async def test_an_abort_while_the_writer_stands_still_in_the_middle_of_a_write(mesh: Mesh) -> None:
    mesh.whole(prefill=mesh.profile("long", LONG))
    await ready(mesh)
    async with mesh.ask("given-up"):
        await mesh.room("given-up", "TRANSFERRING")
        mesh["prefill-0"].signal(signal.SIGSTOP)
    said, reason = await mesh.explained("given-up", "The router gave the request up", "the client left")
    assert reason == "ABORTED"
    assert f"while pages went {ROUTE}" in said
    waits = pending(mesh, "given-up")
    assert waits.startswith("3 pages of decode-0 are in quarantine since")
    assert waits.endswith("prefill-0 has not said that it writes no more.")
    mesh["prefill-0"].signal(signal.SIGCONT)
    await until(lambda: not pending(mesh, "given-up"))
    assert transfer_told(mesh, "given-up", "Quiet")["backend"] == "emulated"


async def test_the_only_bootstrap_is_killed_under_a_transfer(mesh: Mesh) -> None:
    port = ("--port", str(free_port()))
    mesh.whole(*port, prefill=mesh.profile("long", LONG))
    await ready(mesh)
    async with mesh.ask("before", max_new_tokens=3) as asked:
        await asked.rest()
    async with mesh.ask("under-way", max_new_tokens=3) as asked:
        await mesh.room("under-way", "TRANSFERRING")
        mesh["bootstrap"].kill()
        mesh.bootstrap(*BEATS, *port)
        await asked.rest()
        said, reason = await mesh.explained("under-way", "Its router brought it from an earlier bootstrap")
    assert reason == ""
    assert said.startswith("The hand-over succeeded in")
    first = mesh.call("Explain", requestId="under-way")["rooms"][0]["timeline"]["moments"][0]
    assert (first["event"], first["by"]) == ("Restored", "router")
    with pytest.raises(Refused, match=r"older than .* this bootstrap, which began \d"):
        mesh.call("Explain", requestId="before")
    await ready(mesh)
    async with mesh.ask("after", max_new_tokens=3) as asked:
        await asked.rest()
    said, reason = await mesh.explained("after", "The hand-over succeeded in")
    assert (reason, "bootstrap" in said) == ("", False)


async def test_a_replica_of_bootstrap_is_killed_under_a_transfer(store: str, mesh: Mesh) -> None:
    flags = ("--store", store, "--lease-ttl", "1")
    mesh.whole(*flags, prefill=mesh.profile("long", LONG))
    mesh.start("bootstrap", "bootstrap-1", "--port", "0", *BEATS, *flags)
    await ready(mesh)
    async with mesh.ask("under-way", max_new_tokens=3) as asked:
        owner = await until(lambda: owner_of(mesh, "under-way"))
        heir = ({"bootstrap", "bootstrap-1"} - {owner}).pop()
        gone = mesh[owner].grpc
        mesh[owner].kill()
        mesh.by_name["bootstrap"], mesh.by_name["bootstrap-1"] = mesh[heir], mesh[owner]  # it is asked from now on
        await asked.rest()
        await until(lambda: owner_of(mesh, "under-way", state="ROOM_STATE_SUCCESS"))
    said, reason = await mesh.explained("under-way", " took over from replica ", f" at {gone}, epoch ")
    assert reason == ""
    assert said.startswith("The hand-over succeeded in")
    assert "s after it was TRANSFERRING." in said
    (room,) = mesh.call("Explain", requestId="under-way")["rooms"]
    events = [(moment["event"], moment["state"]) for moment in room["timeline"]["moments"]]
    assert events[0] == ("Restored", "ROOM_STATE_TRANSFERRING")


# ------------------------------------------------------------------------------------------ helpers


def owner_of(mesh: Mesh, request_id: str, state: str = "ROOM_STATE_TRANSFERRING") -> str | None:
    """Which replica has the request's room in `state`."""
    for name in ("bootstrap", "bootstrap-1"):
        if mesh[name].process.poll() is None:
            with contextlib.suppress(Refused):  # it has not reached its store yet
                if ask(mesh[name].grpc, "ListRooms", requestId=request_id, state=state).get("rooms"):
                    return name
    return None


def pending(mesh: Mesh, request_id: str) -> str:
    """What is still waited for after the end of the request's room."""
    (room,) = mesh.call("Explain", requestId=request_id)["rooms"]
    return str(room.get("pending", ""))


def transfer_told(mesh: Mesh, request_id: str, event: str) -> dict[str, Any]:
    """How the pages of the request's room travelled, as told with `event`."""
    (room,) = mesh.call("Explain", requestId=request_id)["rooms"]
    (told,) = [moment["transfer"] for moment in room["timeline"]["moments"] if moment["event"] == event]
    return dict(told)


def spoil_pool(front: int) -> None:
    """Overwrite all that is in the pool of a worker's rank."""
    (rank,) = Path(f"/proc/{front}/task/{front}/children").read_text().split()
    for link in Path(f"/proc/{rank}/fd").iterdir():
        if "/memfd:pdmesh" in str(link.readlink()):
            with link.open("r+b", buffering=0) as pool:
                pool.write(b"\x11" * os.fstat(pool.fileno()).st_size)
            return
    raise AssertionError("the rank has no pool")


async def record_of(mesh: Mesh, worker_id: str) -> types.Worker:
    async with channel_to(mesh["bootstrap"].grpc) as channel:
        stub = bootstrap_grpc.BootstrapServiceStub(channel)
        answer = await stub.ListWorkers(pb.ListWorkersRequest(), timeout=10)
    (record,) = [worker for worker in answer.workers if worker.worker_id == worker_id]
    return record
