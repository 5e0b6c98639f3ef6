"""Workers die, or stop and come back, under load: what they had a part in fails softly and at once; no page leaks."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from common.cli.default_model import default_model_path
from common.rpc.channel import connect
from pdmesh.v1 import bootstrap_service_pb2 as pb
from pdmesh.v1 import bootstrap_service_pb2_grpc as pb_grpc
from pdmesh.v1 import types_pb2 as types
from tests.fault.cluster import SOAK, Cluster, Load, cluster
from tests.mesh.harness import pages_of, scrape, wait_until

pytestmark = [pytest.mark.fault, pytest.mark.slow]

MODEL = str(default_model_path())
REQUESTS = 320 if SOAK else 48
CONCURRENCY = 16 if SOAK else 8
TOKENS = 24
HEARTBEAT_S = 1.0
# Chunks that take 3 s on the wire: whoever is stopped is stopped in the middle of a write.
SLOW_TRANSFER = "[transfer]\nlatency_s = 3.0\n"


class Mesh:
    """A cluster of two prefill and two decode workers, and what bootstrap says of them."""

    def __init__(self, cluster: Cluster, *worker: str) -> None:
        self.cluster = cluster
        interval = ("--disaggregation-heartbeat-interval", str(HEARTBEAT_S))
        bootstrap = cluster.start("bootstrap-0", "--port", "0", "--metrics-port", "0", *interval)
        self.address = str(bootstrap.listening.grpc)
        self._worker = ("--model-path", MODEL, "--mem-fraction-static", "0.05", *worker)
        for name in ("prefill-0", "prefill-1", "decode-0", "decode-1"):
            self.start(name)
        cluster.start("router", "--bootstrap", self.address, "--port", "0", "--grpc-port", "0")
        self.wait_for_all()

    def start(self, name: str) -> None:
        flags = ("--bootstrap", self.address, "--port", "0", "--metrics-port", "0", "--worker-id", name)
        self.cluster.start(name, *flags, *self._worker)

    def wait_for_all(self) -> None:
        wait_until(
            lambda: [self.record(name).state for name in self.names()] == [types.WORKER_STATE_READY] * 4, 120, "up"
        )
        asyncio.run(self.cluster._wait_for_model())

    def names(self) -> list[str]:
        return [name for name in self.cluster.services if name.startswith(("prefill", "decode"))]

    def record(self, name: str) -> types.Worker:
        """A worker as bootstrap knows it; an empty record if it does not."""

        async def ask() -> types.Worker:
            channel = connect(self.address)
            try:
                stub: pb_grpc.BootstrapServiceAsyncStub = pb_grpc.BootstrapServiceStub(channel)
                response = await stub.ListWorkers(pb.ListWorkersRequest(), timeout=10)
            finally:
                await channel.close()
            found = [worker for worker in response.workers if worker.worker_id == name]
            return found[0] if found else types.Worker()

        return asyncio.run(ask())

    def pages(self, name: str) -> dict[str, int]:
        return pages_of({"metrics": self.cluster.services[name].listening.metrics})

    def quarantined(self) -> int:
        return sum(self.pages(name)["quarantined"] for name in self.names() if name.startswith("decode"))

    def check_ledgers(self, *names: str) -> None:
        """They are at rest within seconds, and their audits have found nothing."""

        def at_rest() -> bool:
            pages = [self.pages(name) for name in names or self.names()]
            return all(each["reserved"] == each["in_use"] == each["quarantined"] == 0 for each in pages)

        wait_until(at_rest, 30, "the ledgers are at rest")
        for name in names or self.names():
            figures = scrape(str(self.cluster.services[name].listening.metrics))
            assert "pdmesh_kv_leaked_pages 0.0" in figures
            assert "pdmesh_kv_disputed_pages 0.0" in figures
            wait_until(lambda name=name: self.record(name).load.audit.runs > 0, 30, "its audit is known")  # type: ignore[misc]
            audit = self.record(name).load.audit
            assert (audit.leaked_pages, audit.disputed_pages) == (0, 0)

    def load(self, requests: int = REQUESTS, fault: Callable[[], Awaitable[None]] | None = None) -> Load:
        async def run() -> Load:
            async with self.cluster.client() as client:
                load = Load(client, CONCURRENCY, TOKENS)
                await load.run(requests, at=requests // 3, fault=fault)
                return load

        return asyncio.run(run())


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Mesh]:
    with cluster(tmp_path) as started:
        yield Mesh(started)


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[Mesh]:
    times = tmp_path / "times.toml"
    times.write_text(SLOW_TRANSFER)
    with cluster(tmp_path) as started:
        yield Mesh(started, "--engine", "emulated", "--emulated-profile", str(times))


def rank_of(front: int) -> int:
    (rank,) = Path(f"/proc/{front}/task/{front}/children").read_text().split()
    return int(rank)


@pytest.mark.parametrize("part", ["worker", "front", "rank"])
@pytest.mark.parametrize("victim", ["prefill-0", "decode-0"])
def test_a_worker_is_killed_under_load(mesh: Mesh, victim: str, part: str) -> None:
    service = mesh.cluster.services[victim]
    before = mesh.record(victim)

    async def kill() -> None:
        if part == "worker":
            service.kill()
        else:
            os.kill(service.pid if part == "front" else rank_of(service.pid), signal.SIGKILL)
            await asyncio.to_thread(service.process.wait, 30)

    load = mesh.load(fault=kill)
    assert len(load.outcomes) >= REQUESTS
    failures = load.failures()
    assert all(error.retryable for error in failures.values()), failures
    assert len(failures) <= 2 * CONCURRENCY, "about those that were running there"
    survivors = [name for name in mesh.names() if name != victim]
    mesh.check_ledgers(*survivors)
    for room in mesh.cluster.rooms(workerId=victim, state="ROOM_STATE_FAILED")[:3]:
        said = mesh.cluster.explained(room)
        assert said["reason"] == "WORKER_LOST", said
        assert f"{victim} is gone" in said["summary"]

    mesh.start(victim)
    mesh.wait_for_all()
    after = mesh.record(victim)
    assert after.epoch > before.epoch
    assert after.endpoints != before.endpoints
    assert not mesh.load().failures()
    mesh.check_ledgers()


async def until(condition: Callable[[], bool], what: str) -> None:
    await asyncio.to_thread(wait_until, condition, 60, what)


@pytest.mark.parametrize("ending", ["goes on", "is killed"])
def test_a_prefill_worker_stops_in_the_middle_of_its_writes(slow: Mesh, ending: str) -> None:
    """Bootstrap gives it up; its rooms' pages wait for its process, not for bootstrap's patience."""
    service = slow.cluster.services["prefill-0"]
    before = slow.record("prefill-0")

    def lost() -> bool:
        return slow.record("prefill-0").state == types.WORKER_STATE_OFFLINE

    def check_explanations() -> None:
        failed = slow.cluster.rooms(workerId="prefill-0", state="ROOM_STATE_FAILED")
        written = next(room for room in failed if room.get("quarantined"))
        said = slow.cluster.explained(written)
        assert said["reason"] == "WORKER_LOST"
        assert "prefill-0 is gone" in said["summary"]
        assert "no sign of life" in said["summary"]
        assert "prefill-0 is gone, and decode-" in said["pending"]
        assert said["pending"].endswith("has not fenced it off yet.")

    async def stop() -> None:
        os.killpg(service.pid, signal.SIGSTOP)
        await until(lost, "bootstrap has given it up")
        await until(lambda: slow.quarantined() > 0, "what it was granted is in quarantine")
        await asyncio.to_thread(check_explanations)
        for _ in range(5):  # it stays there while others work
            await asyncio.sleep(HEARTBEAT_S)
            assert slow.quarantined() > 0
        if ending == "goes on":
            os.killpg(service.pid, signal.SIGCONT)
        else:
            service.kill()
        await until(lambda: slow.quarantined() == 0, "the quarantine ends")

    load = slow.load(24, fault=stop)
    fenced = any("the writer of a failed room is gone" in slow.cluster.log(name) for name in ("decode-0", "decode-1"))
    assert fenced or ending == "goes on", "a dead process says nothing: decode's endpoint has seen its end"
    assert all(error.retryable for error in load.failures().values()), load.failures()
    if ending == "is killed":
        slow.start("prefill-0")
    slow.wait_for_all()
    after = slow.record("prefill-0")
    assert after.epoch > before.epoch
    assert (after.endpoints == before.endpoints) == (ending == "goes on")
    assert not slow.load(16).failures(), "it serves again"
    slow.check_ledgers()
