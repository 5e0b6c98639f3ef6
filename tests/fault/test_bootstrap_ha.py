"""The control plane dies, or its store does, under load: no request is lost that need not be.

PDMESH_SOAK=1 runs all at full size.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from common.cli.default_model import default_model_path
from common.mesh.shards import shard_of_room
from services.bootstrap.shards import DEFAULT_SHARDS as SHARDS
from services.bootstrap.store.etcd_server import free_port
from tests.fault.cluster import SOAK, Cluster, Load, cluster, etcd
from tests.mesh.harness import Client, running, scrape, wait_until

pytestmark = [pytest.mark.fault, pytest.mark.slow]

MODEL = str(default_model_path())
REQUESTS = 320 if SOAK else 48
CONCURRENCY = 16 if SOAK else 8
TOKENS = 24
AWAY_S = 20.0 if SOAK else 5.0
TURNS = 18 if SOAK else 3

Fault = Callable[[], Awaitable[None]]


def start_replicas(mesh: Cluster, store: str, count: int) -> str:
    flags = ("--port", "0", "--metrics-port", "0", "--store", store)
    replicas = [mesh.start(f"bootstrap-{index}", *flags) for index in range(count)]
    return ",".join(str(replica.listening.grpc) for replica in replicas)


def shards_of(mesh: Cluster, name: str) -> int:
    """How many shards the replica says that it owns."""
    return shards_at(str(mesh.services[name].listening.metrics))


def shards_at(metrics_address: str) -> int:
    metrics = scrape(metrics_address)
    [line] = [line for line in metrics.splitlines() if line.startswith("pdmesh_shards_owned ")]
    return int(float(line.split()[1]))


def under_load(mesh: Cluster, fault: Fault | None) -> Load:
    """Runs the load, with the fault in its first third, and hands it back with its outcomes."""

    async def run() -> Load:
        async with mesh.client() as client:
            load = Load(client, CONCURRENCY, TOKENS)
            await load.run(REQUESTS, at=REQUESTS // 3, fault=fault)
            return load

    return asyncio.run(run())


def check_that_none_was_lost(mesh: Cluster, fault: Fault) -> None:
    calm = under_load(mesh, None)
    assert not calm.failures()
    load = under_load(mesh, fault)
    assert not load.failures(), load.failures()
    for number, outcome in load.outcomes.items():
        expected = calm.outcomes[number % REQUESTS].result
        assert outcome.result
        assert expected
        assert outcome.result.token_ids == expected.token_ids
    assert mesh.workers_alive()
    wait_until(mesh.at_rest, 60, "the ledgers are at rest")


def check_explanations_of_takeover(mesh: Cluster) -> None:
    """bootstrap-1 has taken bootstrap-0's shards over, and says so of rooms of before and of right after."""
    found: list[dict[str, Any]] = []

    def has_both() -> bool:
        rooms = mesh.rooms("bootstrap-1")
        first = min(epoch_of(room) for room in rooms)
        before = [room for room in rooms if epoch_of(room) == first]
        shards = {shard_of(room) for room in before}
        later = [room for room in rooms if epoch_of(room) > first and shard_of(room) in shards]
        found[:] = [before[0], later[-1]] if later else []
        return bool(found)

    wait_until(has_both, 30, "a room was opened in a shard that was taken over")
    restored, later = found
    first = epoch_of(restored)
    gone = mesh.services["bootstrap-0"].listening.grpc
    for room in (restored, later):
        said: dict[str, Any] = {}

        def has_ended(said: dict[str, Any] = said, room: dict[str, Any] = room) -> bool:
            said.update(mesh.explained(room, "bootstrap-1"))
            return not said["summary"].startswith("Under way")

        wait_until(has_ended, 30, "the hand-over is over")
        assert "reason" not in said, said
        assert said["summary"].startswith("The hand-over succeeded in")
        assert f" took over from replica {first:x} at {gone}, epoch {first}" in said["summary"]
    assert mesh.explained(restored, "bootstrap-1")["timeline"]["moments"][0]["event"] == "Restored"


def epoch_of(room: dict[str, Any]) -> int:
    """That of the claim under which the room was opened."""
    return int(room["ticket"]["epoch"])


def shard_of(room: dict[str, Any]) -> int:
    return shard_of_room(room["ticket"]["roomId"])


def test_a_replica_is_killed(tmp_path: Path) -> None:
    with etcd(tmp_path) as store, cluster(tmp_path) as mesh:
        mesh.start_mesh(start_replicas(mesh, store.store, 2), MODEL)

        assert shards_of(mesh, "bootstrap-0") == shards_of(mesh, "bootstrap-1") == SHARDS // 2

        async def kill_one() -> None:
            mesh.services["bootstrap-0"].kill()

        check_that_none_was_lost(mesh, kill_one)
        assert shards_of(mesh, "bootstrap-1") == SHARDS
        check_explanations_of_takeover(mesh)


def test_replicas_are_killed_by_turns(tmp_path: Path) -> None:
    """Also before the other one has taken over, and while it does."""
    with etcd(tmp_path) as store, cluster(tmp_path) as mesh:
        ports = [free_port(), free_port()]

        def start(replica: int) -> None:
            flags = ("--port", str(ports[replica]), "--metrics-port", "0", "--store", store.store)
            mesh.start(f"bootstrap-{replica}", *flags)

        for replica in range(2):
            start(replica)
        mesh.start_mesh(",".join(f"127.0.0.1:{port}" for port in ports), MODEL)

        async def kill_by_turns() -> None:
            for turn in range(TURNS):
                mesh.services[f"bootstrap-{turn % 2}"].kill()
                await asyncio.sleep((0.2, 4.0, 1.5)[turn % 3])
                await asyncio.to_thread(start, turn % 2)
                await asyncio.sleep((3.0, 0.5)[turn % 2])

        check_that_none_was_lost(mesh, kill_by_turns)


def test_a_replica_that_slept_is_not_listened_to(tmp_path: Path) -> None:
    """Its lease lapses, its shards go to the other, and then it wakes up and takes itself for their owner."""
    with etcd(tmp_path) as store, cluster(tmp_path) as mesh:
        mesh.start_mesh(start_replicas(mesh, store.store, 2), MODEL)
        sleeper = mesh.services["bootstrap-0"]

        async def sleep() -> None:
            os.kill(sleeper.pid, signal.SIGSTOP)
            await asyncio.to_thread(wait_until, lambda: shards_of(mesh, "bootstrap-1") == SHARDS, 30, "it took over")
            await asyncio.to_thread(check_explanations_of_takeover, mesh)
            os.kill(sleeper.pid, signal.SIGCONT)

        check_that_none_was_lost(mesh, sleep)
        wait_until(lambda: shards_of(mesh, "bootstrap-0") == SHARDS // 2, 30, "the shards are shared again")
        assert not under_load(mesh, None).failures()


def test_etcd_stops_and_comes_back(tmp_path: Path) -> None:
    with etcd(tmp_path) as store, cluster(tmp_path) as mesh:
        mesh.start_mesh(start_replicas(mesh, store.store, 2), MODEL)

        replicas = ("bootstrap-0", "bootstrap-1")
        meanwhile: dict[str, dict[str, Any]] = {}  # a room of each that was opened while etcd was away

        def check_explanations(words: str) -> None:
            for replica, room in meanwhile.items():

                def says_so(replica: str = replica, room: dict[str, Any] = room) -> bool:
                    said = mesh.explained(room, replica)
                    assert "reason" not in said, said
                    return words in said["summary"]

                wait_until(says_so, 30, words)

        def check_explanations_meanwhile() -> None:
            meanwhile.update((replica, mesh.rooms(replica)[0]) for replica in replicas)
            check_explanations("The store is out of reach since")

        async def stop_for_a_while() -> None:
            store.kill()
            await asyncio.sleep(AWAY_S)
            await asyncio.to_thread(check_explanations_meanwhile)
            await asyncio.to_thread(store.start)

        check_that_none_was_lost(mesh, stop_for_a_while)
        check_explanations("The store was out of reach for")
        assert not under_load(mesh, None).failures()


def test_one_of_three_members_of_etcd_is_killed(tmp_path: Path) -> None:
    with etcd(tmp_path, 3) as store, cluster(tmp_path) as mesh:
        mesh.start_mesh(start_replicas(mesh, store.store, 2), MODEL)

        async def kill_one() -> None:
            store.kill(0)  # the endpoint that all clients use first

        check_that_none_was_lost(mesh, kill_one)


def test_the_only_bootstrap_is_killed_and_started_again(tmp_path: Path) -> None:
    flags = ("--port", str(free_port()), "--metrics-port", "0", "--disaggregation-heartbeat-interval", "1")
    with cluster(tmp_path) as mesh:
        mesh.start_mesh(str(mesh.start("bootstrap-0", *flags).listening.grpc), MODEL)
        streaming: set[int] = set()

        async def restart() -> None:
            mesh.services["bootstrap-0"].kill()
            streaming.update(load.begun)
            await asyncio.to_thread(mesh.start, "bootstrap-0", *flags)

        async def run() -> None:
            nonlocal load
            async with mesh.client() as client:
                load = Load(client, CONCURRENCY, TOKENS)
                await load.run(REQUESTS, at=REQUESTS // 3, fault=restart)

        load: Load
        asyncio.run(run())
        failures = load.failures()
        assert not streaming & failures.keys(), failures
        assert all(error.retryable for error in failures.values()), failures
        assert mesh.workers_alive()
        wait_until(mesh.at_rest, 60, "the ledgers are at rest")
        assert not under_load(mesh, None).failures()


def test_up_starts_several_replicas_and_outlives_one() -> None:
    with running("--bootstraps", "2", "--store", "etcd", "--unified", "1") as mesh:
        first, second = mesh.of("bootstrap")

        async def ask() -> str:
            async with Client(mesh.grpc) as client:
                return (await client.generate("What is 123 + 456?", temperature=0)).text

        assert "579" in asyncio.run(ask())
        os.kill(first["pid"], signal.SIGKILL)
        wait_until(lambda: "others go on" in mesh.log.read_text(), 20, "its end is noticed")
        assert "579" in asyncio.run(ask())
        assert scrape(second["metrics"])

        wait_until(lambda: "listens again" in mesh.log.read_text(), 60, "it was started again")
        status = mesh.log.with_name("status.json")
        wait_until(lambda: f'"pid": {first["pid"]},' not in status.read_text(), 20, "the status file tells of it")
        (again,) = [process for process in json.loads(status.read_text()) if process["name"] == first["name"]]
        assert again["grpc"] == first["grpc"], "where the others know it"
        wait_until(lambda: shards_at(again["metrics"]) == SHARDS // 2, 60, "it has its share again")
        os.kill(second["pid"], signal.SIGKILL)
        assert "579" in asyncio.run(ask())
