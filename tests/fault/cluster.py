"""Services as processes of their own, to be killed and started again one by one; and an etcd of three members."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from common.errors.base import MeshError
from common.rpc.announce import READY_FD, Listening, parse
from common.rpc.status import error_from
from services.bootstrap.store.etcd_server import find_etcd, free_port, is_healthy
from tests.mesh.harness import Client, Result, pages_of, wait_until
from tests.mesh.reflect import ask

SOAK = os.environ.get("PDMESH_SOAK", "") not in ("", "0")
STOP_TIMEOUT_S = 15.0


@dataclass
class Service:
    """A running process of the mesh."""

    name: str
    process: subprocess.Popen[bytes]
    listening: Listening

    @property
    def pid(self) -> int:
        return self.process.pid

    def kill(self) -> None:
        """SIGKILL to it and to what it started."""
        os.killpg(self.pid, signal.SIGKILL)
        self.process.wait()


@dataclass
class Cluster:
    """A mesh whose processes nobody supervises."""

    folder: Path
    services: dict[str, Service] = field(default_factory=dict)

    def start(self, name: str, *flags: str) -> Service:
        """Start `pdmesh ROLE`, the role being what stands before the name's hyphen; returns once it listens."""
        reader, writer = os.pipe()
        command = [sys.executable, "-m", "common.cli.main", name.partition("-")[0], *flags]
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                command,
                env=os.environ | {READY_FD: str(writer), "OMP_NUM_THREADS": "1"},
                pass_fds=(writer,),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        os.close(writer)
        with os.fdopen(reader) as announced:
            line = announced.readline()
        if not line:
            process.wait()
            raise AssertionError(f"{name} did not start: {self.log(name)[-2000:]}")
        service = self.services[name] = Service(name, process, parse(line))
        return service

    def start_mesh(self, bootstrap: str, model: str, *, decodes: int = 1) -> None:
        """Workers and a router for the bootstrap at these addresses; returns when requests can be sent."""
        common = ("--bootstrap", bootstrap, "--port", "0")
        worker = (*common, "--metrics-port", "0", "--model-path", model, "--mem-fraction-static", "0.05")
        self.start("prefill-0", *worker, "--worker-id", "prefill-0")
        for index in range(decodes):
            self.start(f"decode-{index}", *worker, "--worker-id", f"decode-{index}")
        self.start("router", *common, "--grpc-port", "0")
        asyncio.run(self._wait_for_model())

    async def _wait_for_model(self) -> None:
        async with self.client() as client, asyncio.timeout(120):
            while True:
                try:
                    await client.generate("What is 1 + 2?", temperature=0, max_new_tokens=2)
                    return
                except grpc.aio.AioRpcError:
                    await asyncio.sleep(0.2)

    def client(self) -> Client:
        return Client(str(self.services["router"].listening.grpc))

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def rooms(self, bootstrap: str = "bootstrap-0", **wanted: Any) -> list[dict[str, Any]]:
        """Rooms as an operator sees them, newest first, such as those of `workerId`."""
        address = str(self.services[bootstrap].listening.grpc)
        rooms: list[dict[str, Any]] = ask(address, "ListRooms", pageSize=1000, **wanted).get("rooms", [])
        return rooms

    def explained(self, room: dict[str, Any], bootstrap: str = "bootstrap-0") -> dict[str, Any]:
        """What `Explain` says of a room: `summary`, `reason` (absent when nothing failed), `pending`."""
        address = str(self.services[bootstrap].listening.grpc)
        (explained,) = ask(address, "Explain", roomId=room["ticket"]["roomId"])["rooms"]
        return dict(explained)

    def at_rest(self) -> bool:
        """Whether no page of any worker is reserved, in use or quarantined."""
        workers = [service for name, service in self.services.items() if name.startswith(("prefill", "decode"))]
        pages = [pages_of({"metrics": worker.listening.metrics}) for worker in workers]
        return all(each["reserved"] == each["in_use"] == each["quarantined"] == 0 for each in pages)

    def workers_alive(self) -> bool:
        return all(
            service.process.poll() is None
            for name, service in self.services.items()
            if not name.startswith("bootstrap")
        )

    def stop(self) -> None:
        """Stop all in order: router, workers, bootstrap. One that does not stop is killed and fails the test."""
        stuck = []
        order = ("router", "prefill", "decode", "bootstrap")
        for name in sorted(self.services, key=lambda name: order.index(name.partition("-")[0])):
            service = self.services[name]
            if service.process.poll() is None:
                service.process.terminate()
                try:
                    service.process.wait(STOP_TIMEOUT_S)
                except subprocess.TimeoutExpired:
                    stuck.append(name)
            with contextlib.suppress(ProcessLookupError):
                service.kill()
        assert not stuck, f"did not stop: {stuck}"


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """Its logs are shown when something fails."""
    made = Cluster(folder)
    try:
        yield made
    except BaseException:
        for name in made.services:
            print(f"--- {name}\n{made.log(name)[-6000:]}")
        with contextlib.suppress(AssertionError):
            made.stop()
        raise
    made.stop()


class EtcdCluster:
    """Several members on loopback that sync nothing to disk; each can be killed and started again."""

    def __init__(self, folder: Path, members: int) -> None:
        self._folder = folder
        self._peers = [free_port() for _ in range(members)]
        self._clients = [free_port() for _ in range(members)]
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._new = True

    @property
    def store(self) -> str:
        """For --store."""
        return "etcd://" + ",".join(f"127.0.0.1:{port}" for port in self._clients)

    def start(self) -> EtcdCluster:
        """Start the members that do not run; returns when all are healthy."""
        for member in range(len(self._peers)):
            if member not in self._processes:
                self._spawn(member)
        self._new = False
        for port in self._clients:
            wait_until(lambda port=port: asyncio.run(is_healthy(port)), 60, "etcd is healthy")  # type: ignore[misc]
        return self

    def kill(self, *members: int) -> None:
        """SIGKILL to these members, or to all."""
        for member in members or list(self._processes):
            process = self._processes.pop(member)
            process.kill()
            process.wait()

    def _spawn(self, member: int) -> None:
        client, peer = (f"http://127.0.0.1:{ports[member]}" for ports in (self._clients, self._peers))
        peers = ",".join(f"m{index}=http://127.0.0.1:{port}" for index, port in enumerate(self._peers))
        arguments: list[Any] = [
            *(find_etcd(), "--name", f"m{member}", "--data-dir", self._folder / f"m{member}", "--log-level", "error"),
            *("--listen-client-urls", client, "--advertise-client-urls", client),
            *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", peers),
            *("--initial-cluster-state", "new", "--unsafe-no-fsync"),
            *("--heartbeat-interval", "50", "--election-timeout", "500"),
        ]
        with (self._folder / f"m{member}.log").open("ab") as log:
            self._processes[member] = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


@contextlib.contextmanager
def etcd(folder: Path, members: int = 1) -> Iterator[EtcdCluster]:
    made = EtcdCluster(folder, members)
    try:
        yield made.start()
    finally:
        made.kill()


@dataclass
class Outcome:
    """What became of a request."""

    result: Result | None
    error: MeshError | None
    seconds: float


@dataclass
class Load:
    """Requests of a fixed number of clients, each sending its next one when the last is answered."""

    client: Client
    concurrency: int
    tokens: int
    outcomes: dict[int, Outcome] = field(default_factory=dict)
    begun: set[int] = field(default_factory=set)  # those that have had a token

    def prompt(self, number: int) -> str:
        return f"What is {number % 900 + 1} + {number * 7 % 900}?"

    async def run(self, requests: int, at: int = 0, fault: Callable[[], Awaitable[None]] | None = None) -> None:
        """Send at least so many, beginning anew with the first prompts after these.

        Once `at` of them are answered `fault` happens, and requests go on for as long as it takes.
        """
        numbers = itertools.count()
        reached, over = asyncio.Event(), asyncio.Event()

        async def one_client() -> None:
            while (number := next(numbers)) < requests or not over.is_set():
                self.outcomes[number] = await self._one(number, number % requests)
                if len(self.outcomes) >= at:
                    reached.set()

        async def break_it() -> None:
            try:
                await reached.wait()
                if fault is not None:
                    await fault()
            finally:
                over.set()

        await asyncio.gather(break_it(), *(one_client() for _ in range(self.concurrency)))

    async def _one(self, number: int, prompt: int) -> Outcome:
        started = time.monotonic()
        result = Result()
        sampling = {"temperature": 0, "max_new_tokens": self.tokens, "ignore_eos": True}
        try:
            async for response in self.client.stream(self.prompt(prompt), **sampling):
                result.token_ids += response.token_ids
                if response.token_ids:
                    self.begun.add(number)
        except grpc.aio.AioRpcError as error:
            return Outcome(None, error_from(error), time.monotonic() - started)
        return Outcome(result, None, time.monotonic() - started)

    def failures(self) -> dict[int, MeshError]:
        return {number: outcome.error for number, outcome in self.outcomes.items() if outcome.error}

    def slowest(self) -> float:
        return max(outcome.seconds for outcome in self.outcomes.values())
