"""The emulated engine in a whole mesh: the whole protocol, and nothing computed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from common.cli.launch import wait_serving
from common.engine.emulated_times import DecodeTimes, PrefillTimes, Times, TransferTimes
from common.rpc.announce import READY_FD, Listening, parse
from pdmesh.v1 import bootstrap_service_pb2 as bootstrap_pb
from pdmesh.v1 import bootstrap_service_pb2_grpc as bootstrap_grpc
from pdmesh.v1 import types_pb2 as pb
from tests.mesh.harness import STOP_TIMEOUT_S, Client, Mesh, Result, running, wait_until

pytestmark = pytest.mark.mesh

PROMPT = list(range(40))
NEW_TOKENS = 24
ZERO = ("--engine", "emulated", "--emulated-preset", "zero")


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with running(*ZERO, "--prefill", "2", "--decode", "2") as up:
        yield up


async def ask(mesh: Mesh, count: int, **sampling: object) -> list[Result]:
    async with Client(mesh.grpc) as client:
        given = {"max_new_tokens": NEW_TOKENS, "temperature": 1.0, "seed": 3, **sampling}
        return await client.generate_all([PROMPT] * count, **given)


async def test_it_serves_through_the_hand_over_and_every_worker_gives_the_same_tokens(mesh: Mesh) -> None:
    results = await ask(mesh, 64)
    assert {result.finish for result in results} == {"length"}
    assert len({tuple(result.token_ids) for result in results}) == 1
    assert len(results[0].token_ids) == NEW_TOKENS
    wait_until(mesh.at_rest, 10, "all pages are free")
    with running(*ZERO, "--unified", "1") as other:
        assert (await ask(other, 1))[0].token_ids == results[0].token_ids


async def test_requests_that_are_given_up_leave_nothing_behind(mesh: Mesh) -> None:
    async with Client(mesh.grpc) as client:
        for _ in range(20):
            stream = client.stream(PROMPT, max_new_tokens=400)
            async for _ in stream:
                break
            stream.cancel()  # type: ignore[attr-defined]
    wait_until(mesh.at_rest, 10, "all pages are free")


def test_no_rank_has_torch_in_it(mesh: Mesh) -> None:
    for worker in mesh.workers:
        for pid in (worker["pid"], *children(worker["pid"])):
            assert "libtorch" not in Path(f"/proc/{pid}/maps").read_text()


def children(pid: int) -> list[int]:
    found = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return found + [grandchild for child in found for grandchild in children(child)]


async def test_it_takes_the_time_that_its_profile_says(tmp_path: Path) -> None:
    """Lower bounds alone: how much longer it takes is the machine's affair."""
    profile = tmp_path / "times.toml"
    profile.write_text("[prefill]\nbase_s = 0.1\n[decode]\nbase_s = 0.02\n[transfer]\nlatency_s = 0.15\n")
    expected = Times(PrefillTimes(0.1), DecodeTimes(0.02), TransferTimes(0.15))
    with running("--engine", "emulated", "--emulated-profile", str(profile)) as mesh:
        loop = asyncio.get_running_loop()
        start = loop.time()
        first_at = None
        async with Client(mesh.grpc) as client:
            async for response in client.stream(PROMPT, max_new_tokens=NEW_TOKENS):
                if response.token_ids and first_at is None:
                    first_at = loop.time()
        assert first_at is not None
        assert first_at - start >= expected.prefill.base_s + expected.transfer.latency_s
        assert loop.time() - first_at >= (NEW_TOKENS - 2) * expected.decode.base_s
        wait_until(mesh.at_rest, 10, "all pages are free")


async def test_an_abort_is_heard_during_a_long_step(tmp_path: Path) -> None:
    profile = tmp_path / "times.json"
    profile.write_text('{"prefill": {"base_s": 600.0}}')
    with running("--engine", "emulated", "--emulated-profile", str(profile)) as mesh:
        async with Client(mesh.grpc) as client:
            asked = asyncio.create_task(client.generate(PROMPT, max_new_tokens=4))
            await asyncio.to_thread(wait_until, lambda: any_reserved(mesh), 10, "the room is reserved")
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)
        await asyncio.to_thread(wait_until, mesh.at_rest, 10, "all pages are free")


def any_reserved(mesh: Mesh) -> bool:
    return any(pages["reserved"] for pages in mesh.pages())


# ------------------------------------------------------------------------------------- many in one process

WORKERS = 24
HEARTBEATS = ("--disaggregation-heartbeat-interval", "0.3", "--disaggregation-heartbeat-max-failure", "2")


@pytest.fixture(scope="module")
def bootstrap() -> Iterator[str]:
    with process("bootstrap", "--port", "0", "--metrics-port", "0", *HEARTBEATS) as (_, listening):
        yield str(listening.grpc)


@pytest.fixture(scope="module")
def crowd(bootstrap: str) -> Iterator[subprocess.Popen[bytes]]:
    flags = ("--workers", str(WORKERS), "--emulated-preset", "zero", "--bootstrap", bootstrap)
    with process("emulate", *flags) as (emulate, _):
        yield emulate


async def workers_of(bootstrap: str, role: pb.WorkerRole.ValueType) -> list[pb.Worker]:
    async with grpc.aio.insecure_channel(bootstrap) as channel:
        stub: bootstrap_grpc.BootstrapServiceAsyncStub = bootstrap_grpc.BootstrapServiceStub(channel)
        return list((await stub.ListWorkers(bootstrap_pb.ListWorkersRequest(role=role), timeout=10)).workers)


async def test_many_workers_in_one_process_serve(bootstrap: str, crowd: subprocess.Popen[bytes]) -> None:
    prefills, decodes = [await workers_of(bootstrap, role) for role in (pb.WORKER_ROLE_PREFILL, pb.WORKER_ROLE_DECODE)]
    assert len(prefills) == len(decodes) == WORKERS // 2
    assert len({worker.address for worker in (*prefills, *decodes)}) == WORKERS
    assert not children(crowd.pid)
    policies = ("--prefill-policy", "round_robin", "--decode-policy", "round_robin")
    with process("router", "--bootstrap", bootstrap, "--port", "0", "--grpc-port", "0", *policies) as (_, listening):
        await wait_serving(str(listening.grpc))
        async with Client(str(listening.grpc)) as client:
            sampling = {"max_new_tokens": NEW_TOKENS, "temperature": 1.0, "seed": 3}
            results = await client.generate_all([PROMPT] * 3 * WORKERS, **sampling)
    assert len({tuple(result.token_ids) for result in results}) == 1
    assert {result.finish for result in results} == {"length"}
    assert len(results[0].token_ids) == NEW_TOKENS
    for _ in range(500):
        ledgers = [worker.load.ledger for worker in await workers_of(bootstrap, pb.WORKER_ROLE_UNSPECIFIED)]
        if all(ledger.free and not (ledger.reserved or ledger.in_use or ledger.quarantined) for ledger in ledgers):
            return
        await asyncio.sleep(0.02)
    raise AssertionError(f"not at rest: {ledgers}")


@pytest.mark.fault
async def test_a_worker_that_falls_silent_is_offline_soon_and_the_others_are_not(
    bootstrap: str, crowd: subprocess.Popen[bytes]
) -> None:
    """How soon exactly is the benchmark's (`benchmarks/emulated_scale.py`); here it is a bound that noise keeps."""
    flags = ("--workers", "1", "--role", "unified", "--emulated-preset", "zero", "--bootstrap", bootstrap)
    with process("emulate", *flags) as (emulate, _):
        emulate.send_signal(signal.SIGSTOP)
        for _ in range(500):
            (worker,) = await workers_of(bootstrap, pb.WORKER_ROLE_UNIFIED)
            if worker.state == pb.WORKER_STATE_OFFLINE:
                break
            await asyncio.sleep(0.02)
        assert worker.state == pb.WORKER_STATE_OFFLINE
        others = await workers_of(bootstrap, pb.WORKER_ROLE_PREFILL)
        assert all(worker.state != pb.WORKER_STATE_OFFLINE for worker in others)
        emulate.send_signal(signal.SIGCONT)


def test_a_crowd_that_cannot_register_says_why() -> None:
    flags = ("--workers", "3", "--bootstrap", "127.0.0.1:1", "--bootstrap-connect-timeout", "0.2")
    command = [sys.executable, "-m", "common.cli.main", "emulate", *flags]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith("pdmesh: BOOTSTRAP_UNREACHABLE: no bootstrap answered at")


@contextlib.contextmanager
def process(command: str, *flags: str) -> Iterator[tuple[subprocess.Popen[bytes], Listening]]:
    """`pdmesh COMMAND FLAGS`, once it has announced itself, until the block ends."""
    reader, writer = os.pipe()
    started = subprocess.Popen(
        [sys.executable, "-m", "common.cli.main", command, "--log-level", "warning", *flags],
        env={**os.environ, READY_FD: str(writer)},
        pass_fds=(writer,),
    )
    os.close(writer)
    try:
        with os.fdopen(reader) as file:
            yield started, parse(file.readline())
    finally:
        started.terminate()
        assert started.wait(STOP_TIMEOUT_S) == 0
