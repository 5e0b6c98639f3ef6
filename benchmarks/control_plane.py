"""Full room lifecycles through one bootstrap process, and what it adds to a request's first token.

    make bench BENCH=control_plane ARGS="--seconds 20 --pin"

Bootstrap is a process of its own; this process is all of its routers and workers, over real gRPC sessions. A room is
opened, reserved by decode, pushed to prefill, transferring, transferred, closed. The first part keeps so many rooms in
flight and counts. The second opens rooms at a steady rate, at random times, and measures what a request waits for:
from the wish to open a room to its ticket, which the router makes itself, and from decode's reservation, sent at once,
to prefill's knowing it. Beside them stand the floors of the same run: a message to another Python process and back on
an open gRPC stream (a request pays about one of these), and one put to etcd. `rooms per CPU second` is bootstrap's
own: what one core would carry; `unwritten` is how many records waited for the store at the end of the first part.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from processes import ROOT, cpu_s, service

sys.path.insert(0, str(ROOT))

import grpc
from rich.console import Console
from rich.table import Table

from common.mesh.router_session import RouterSession
from common.mesh.ticket import Ticket
from common.mesh.wire import ticket_from, ticket_to
from common.mesh.worker_session import WorkerSession
from common.rpc.loop import new_event_loop
from pdmesh.etcd.v1 import etcd_pb2
from pdmesh.v1 import bootstrap_service_pb2 as pb
from pdmesh.v1 import types_pb2 as types
from services.bootstrap.store.etcd_client import EtcdClient
from services.bootstrap.store.etcd_server import EtcdServer

ECHO = "/pdmesh.benchmark/Echo"
PAYLOAD = b"x" * 200


@dataclass
class Figures:
    """Times in seconds of one part."""

    open_s: list[float] = field(default_factory=list)
    push_s: list[float] = field(default_factory=list)
    rooms: int = 0
    seconds: float = 0.0
    cpu_s: float = 0.0
    unwritten: int = 0  # records that waited for the store at the end

    @property
    def added_s(self) -> list[float]:
        return [opened + pushed for opened, pushed in zip(self.open_s, self.push_s, strict=False)]


class Mesh:
    """Routers and workers as bootstrap sees them."""

    def __init__(self, address: str, pairs: int) -> None:
        self.router = RouterSession(address, on_room_ended=self._ended)
        self._count = 0
        self._pushed: dict[str, asyncio.Future[float]] = {}
        self._over: dict[str, asyncio.Future[None]] = {}
        self.prefills = [self._worker(address, f"p{n}", types.WORKER_ROLE_PREFILL) for n in range(pairs)]
        self.decodes = [self._worker(address, f"d{n}", types.WORKER_ROLE_DECODE) for n in range(pairs)]

    def _worker(self, address: str, name: str, role: types.WorkerRole.ValueType) -> WorkerSession:
        record = types.Worker(worker_id=name, role=role, address="127.0.0.1:1")
        record.kv_layout.CopyFrom(types.KvLayout(kind="mha", dtype="bfloat16", page_size=16))
        return WorkerSession(address, lambda: record, types.WorkerLoad, self._told, held=list)

    async def start(self) -> None:
        for session in (*self.prefills, *self.decodes):
            session.start()
            await session.registered.wait()
        self.router.start()
        await self.router.ready.wait()

    async def close(self) -> None:
        await asyncio.gather(*(session.close() for session in (self.router, *self.prefills, *self.decodes)))

    async def room(self, figures: Figures) -> None:
        """One room from its opening to its close."""
        self._count += 1
        pair = self._count % len(self.prefills)
        clock, loop = time.perf_counter, asyncio.get_running_loop()
        wanted = pb.OpenRoom(
            request_id=f"request-{self._count}",
            attempt=1,
            prefill_worker_id=f"p{pair}",
            decode_worker_id=f"d{pair}",
            prompt_tokens=512,
            max_new_tokens=128,
        )
        began = clock()
        ticket = self.router.begin_room(wanted) or await self.router.open_room(wanted, 30.0)
        figures.open_s.append(clock() - began)
        pushed = self._pushed[ticket.room_id] = loop.create_future()
        over = self._over[ticket.room_id] = loop.create_future()
        began = clock()
        self.decodes[pair].send(pb.WorkerEvent(reserved=reserved(ticket)))
        figures.push_s.append(await pushed - began)
        self.prefills[pair].send(pb.WorkerEvent(transferring=pb.RoomTransferring(ticket=ticket_to(ticket))))
        self.decodes[pair].send(pb.WorkerEvent(transferred=pb.RoomTransferred(ticket=ticket_to(ticket), bytes=1 << 20)))
        await over
        self.router.close_room(ticket)
        figures.rooms += 1

    def _told(self, event: pb.ControlEvent) -> None:
        if event.WhichOneof("event") == "reserved":
            self._pushed.pop(event.reserved.ticket.room_id).set_result(time.perf_counter())

    def _ended(self, ended: pb.RoomEnded) -> None:
        over = self._over.pop(ticket_from(ended.ticket).room_id)
        if ended.state == types.ROOM_STATE_SUCCESS:
            over.set_result(None)
        else:
            over.set_exception(RuntimeError(f"a room failed: {ended.reason}: {ended.message}"))


def reserved(ticket: Ticket) -> pb.RoomReserved:
    """32 pages in three runs, as a decode worker of one rank grants them."""
    extents = [types.Extent(first_page=first, page_count=count) for first, count in ((10, 20), (50, 8), (70, 4))]
    endpoint = types.RankEndpoint(backend="local", descriptor=b"d" * 64)
    return pb.RoomReserved(
        ticket=ticket_to(ticket),
        reservation=types.Reservation(ranks=[types.RankReservation(endpoint=endpoint, extents=extents)]),
    )


async def closed_loop(mesh: Mesh, pid: int, in_flight: int, seconds: float) -> Figures:
    """As many rooms as go through with `in_flight` at a time."""
    figures = Figures()
    ends = time.perf_counter() + seconds

    async def client() -> None:
        while time.perf_counter() < ends:
            await mesh.room(figures)

    began, cpu = time.perf_counter(), cpu_s(pid)
    await asyncio.gather(*(client() for _ in range(in_flight)))
    figures.seconds, figures.cpu_s = time.perf_counter() - began, cpu_s(pid) - cpu
    return figures


async def open_loop(mesh: Mesh, pid: int, rate: float, seconds: float, seed: int = 1) -> Figures:
    """Rooms at exponential intervals, whether or not earlier ones are over."""
    figures, intervals = Figures(), random.Random(seed)
    began, cpu, tasks, due = time.perf_counter(), cpu_s(pid), [], 0.0
    while due < seconds:
        await asyncio.sleep(max(0.0, began + due - time.perf_counter()))
        tasks.append(asyncio.create_task(mesh.room(figures)))
        due += intervals.expovariate(rate)
    await asyncio.gather(*tasks)
    figures.seconds, figures.cpu_s = time.perf_counter() - began, cpu_s(pid) - cpu
    return figures


# ------------------------------------------------------------------------------------------ floors


async def serve_echo() -> None:
    """What `--echo` runs: says its port, and everything that it is told."""

    async def echo(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        async for request in requests:
            yield request

    server = grpc.aio.server()
    handler = grpc.stream_stream_rpc_method_handler(echo)
    service_name, method = ECHO.strip("/").split("/")
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service_name, {method: handler}),))
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    await server.start()
    await server.wait_for_termination()


@contextmanager
def echo_server() -> Iterator[str]:
    process = subprocess.Popen([sys.executable, __file__, "--echo"], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    try:
        yield f"127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


async def echo_times(count: int) -> list[float]:
    """One message there and back at a time."""
    times = []
    with echo_server() as address:
        async with grpc.aio.insecure_channel(address) as channel:
            call = channel.stream_stream(ECHO)()
            for _ in range(count):
                began = time.perf_counter()
                await call.write(PAYLOAD)
                await call.read()
                times.append(time.perf_counter() - began)
            call.cancel()
    return times[count // 10 :]


async def put_times(endpoint: str, count: int) -> list[float]:
    """One put of 256 bytes at a time."""
    client, times = EtcdClient([endpoint]), []
    for n in range(count):
        began = time.perf_counter()
        await client.put(etcd_pb2.PutRequest(key=b"/benchmark/%d" % (n % 100), value=b"x" * 256))
        times.append(time.perf_counter() - began)
    await client.close()
    return times[count // 10 :]


# ------------------------------------------------------------------------------------------ the run


async def measure(kind: str, arguments: argparse.Namespace, table: Table) -> None:
    """Both parts with one store."""
    with ExitStack() as stack:
        async with AsyncExitStack() as later:
            store = "memory"
            if kind == "etcd":
                etcd = EtcdServer()
                await etcd.start()
                later.push_async_callback(etcd.stop)
                store = f"etcd://{etcd.endpoint}"
            flags = ("--port", "0", "--metrics-port", "0", "--store", store)
            listening = stack.enter_context(service("bootstrap", *flags))
            if arguments.pin:
                os.sched_setaffinity(listening.pid, {min(os.sched_getaffinity(0))})
            mesh = Mesh(str(listening.grpc), arguments.pairs)
            await mesh.start()
            later.push_async_callback(mesh.close)
            await closed_loop(mesh, listening.pid, 16, min(1.0, arguments.seconds))  # everything is warm
            full = await closed_loop(mesh, listening.pid, arguments.in_flight, arguments.seconds)
            full.unwritten = unwritten(str(listening.metrics))
            steady = await open_loop(mesh, listening.pid, arguments.rate, arguments.seconds)
            add(table, kind, full, steady)
            if kind == "etcd":
                put = await put_times(etcd.endpoint, 500)
                table.add_row("floor: etcd put", "", "", "", "", "", "", both(put))


def unwritten(metrics: str) -> int:
    with urllib.request.urlopen(f"http://{metrics}/metrics", timeout=10) as page:
        lines = page.read().decode().splitlines()
    return int(float(next(line for line in lines if line.startswith("pdmesh_store_pending ")).split()[1]))


def add(table: Table, kind: str, full: Figures, steady: Figures) -> None:
    table.add_row(
        kind,
        f"{full.rooms / full.seconds:,.0f}",
        f"{full.cpu_s / full.seconds:.0%}",
        f"{full.rooms / full.cpu_s:,.0f}",
        f"{full.unwritten:,}",
        both(steady.open_s),
        both(steady.push_s),
        both(steady.added_s),
    )


def both(times_s: list[float]) -> str:
    """p50 and p99 in ms."""
    cuts = statistics.quantiles(times_s, n=100)
    return f"{cuts[49] * 1e3:.2f} / {cuts[98] * 1e3:.2f}"


async def main(arguments: argparse.Namespace) -> None:
    table = Table(title=f"one bootstrap process; times at {arguments.rate:g} rooms/s, p50 / p99 in ms")
    columns = ("store", "rooms/s", "its CPU", "rooms per CPU second", "unwritten")
    for column in (*columns, "open → ticket", "reserve → push", "added"):
        table.add_column(column, justify="left" if column == "store" else "right")
    echo = await echo_times(1000)
    for kind in arguments.stores.split(","):
        await measure(kind, arguments, table)
    table.add_row("floor: echo on a stream", "", "", "", "", "", "", both(echo))
    Console().print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stores", default="memory,etcd", help="memory, etcd or both")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of each part")
    parser.add_argument("--in-flight", type=int, default=128, help="rooms at a time in the first part")
    parser.add_argument("--rate", type=float, default=200.0, help="rooms per second in the second part")
    parser.add_argument("--pairs", type=int, default=4, help="prefill workers, and as many decode workers")
    parser.add_argument("--pin", action="store_true", help="keep bootstrap on one core")
    parser.add_argument("--echo", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(serve_echo() if chosen.echo else main(chosen))
