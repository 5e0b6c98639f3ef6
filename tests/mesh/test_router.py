"""The router between real bootstrap and scripted workers: streams, ends, failures, readiness."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from common.obs import metrics
from pdmesh.v1 import bootstrap_service_pb2 as bootstrap_pb
from pdmesh.v1 import bootstrap_service_pb2_grpc as bootstrap_grpc
from pdmesh.v1 import decode_service_pb2 as decode_pb
from pdmesh.v1 import router_service_pb2 as router_pb
from pdmesh.v1 import types_pb2 as pb
from services.router.request import derive_seed
from tests.mesh.harness import Client, request_of
from tests.mesh.scripted import (
    BOS,
    EOS,
    News,
    Scripted,
    failing,
    reason_of,
    saying,
    scripted,
    stalling,
    tokens,
    until,
)

pytestmark = pytest.mark.mesh


@pytest.fixture
async def unified(tmp_path: Path) -> AsyncIterator[Scripted]:
    async with scripted(tmp_path, "unified") as mesh:
        yield mesh


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[Scripted]:
    async with scripted(tmp_path, "prefill", "decode") as mesh:
        yield mesh


@pytest.fixture
async def client(unified: Scripted) -> AsyncIterator[Client]:
    async with Client(unified.grpc) as client:
        yield client


async def rooms(mesh: Scripted) -> list[pb.Room]:
    async with grpc.aio.insecure_channel(mesh.bootstrap.address) as channel:
        stub: bootstrap_grpc.BootstrapServiceAsyncStub = bootstrap_grpc.BootstrapServiceStub(channel)
        return list((await stub.ListRooms(bootstrap_pb.ListRoomsRequest(), timeout=5)).rooms)


async def refused(client: Client, request: router_pb.GenerateRequest, timeout_s: float = 20) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        _ = [response async for response in client.router.Generate(request, timeout=timeout_s)]
    return caught.value


# ---------------------------------------------------------------------------------------- streams


async def test_a_stream_and_what_the_worker_was_told(unified: Scripted, client: Client) -> None:
    unified.workers["unified"].script = saying("Grüße 😀", at_once=3)
    result = await client.generate("hi", seed=7, temperature=0.5, max_new_tokens=50, logprobs=2)
    assert result.text == "Grüße 😀"
    assert result.token_ids == [*"Grüße 😀".encode(), EOS]
    assert (result.finish, len(result.logprobs)) == ("stop", len(result.token_ids))
    assert result.usage is not None
    assert (result.usage.prompt_tokens, result.usage.completion_tokens) == (3, len(result.token_ids))
    [start] = unified.workers["unified"].starts
    assert not start.HasField("ticket")
    assert list(start.prompt_ids) == [BOS, *b"hi"]
    assert (start.sampling.seed, start.sampling.max_new_tokens, start.sampling.temperature) == (7, 50, 0.5)


async def test_one_response_a_sequence_when_not_streamed(unified: Scripted, client: Client) -> None:
    unified.workers["unified"].script = saying("Hello world")
    request = request_of([1, 2, 3], stream=False, n=3, seed=5)
    responses = [response async for response in client.router.Generate(request, timeout=20)]
    assert sorted(response.index for response in responses) == [0, 1, 2]
    assert all(response.text == "Hello world" for response in responses)
    assert [response.HasField("usage") for response in responses] == [False, False, True]
    assert responses[-1].usage.completion_tokens == 3 * 12
    seeds = sorted(start.sampling.seed for start in unified.workers["unified"].starts)
    assert seeds == sorted(derive_seed(5, i) for i in range(3))
    assert 5 in seeds


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("at_once", [1, 4])
async def test_stop_strings_cut_and_abort(unified: Scripted, client: Client, stream: bool, at_once: int) -> None:
    worker = unified.workers["unified"]
    worker.script = saying("one, two, three and so on", at_once=at_once)
    result = await client.generate("go", stream=stream, stop=["three", "never"])
    assert (result.text, result.finish) == ("one, two, ", "stop")
    assert result.token_ids == [*b"one, two, three"]
    worker.script = stalling("one, two, three")
    result = await client.generate("go", stream=stream, stop=["two"], min_new_tokens=2)
    assert result.text == "one, "
    await until(lambda: worker.starts[-1].sequence_id in worker.aborts)


async def test_text_held_back_is_flushed_at_the_end(unified: Scripted, client: Client) -> None:
    unified.workers["unified"].script = saying("a sto")
    assert (await client.generate("go", stop=["stop"])).text == "a sto"
    unified.workers["unified"].script = saying("é" * 20)
    assert (await client.generate("go", max_new_tokens=5)).text == "éé\ufffd"


async def test_an_unset_seed_is_drawn_anew(unified: Scripted, client: Client) -> None:
    await client.generate_all(["a", "b"])
    one, other = (start.sampling.seed for start in unified.workers["unified"].starts)
    assert one != other


async def test_models(unified: Scripted, client: Client) -> None:
    listed = await client.router.ListModels(router_pb.ListModelsRequest(), timeout=5)
    assert [(m.name, m.context_length, m.vocab_size) for m in listed.models] == [("bytes", 512, 300)]


# ---------------------------------------------------------------------------------------- pairs


async def test_a_pair_hands_over_through_a_room(pair: Scripted) -> None:
    pair.workers["decode"].script = saying("through the room")
    async with Client(pair.grpc) as client:
        result = await client.generate("hi", n=1)
    assert result.text == "through the room"
    assert result.usage is not None
    assert result.usage.cached_tokens == 3
    [prefill], [decode] = pair.workers["prefill"].starts, pair.workers["decode"].starts
    assert prefill.ticket == decode.ticket
    assert prefill.prompt_ids == decode.prompt_ids
    assert prefill.sampling == decode.sampling
    await succeeded(pair)


async def test_a_failed_prefill_is_told_with_its_reason(pair: Scripted) -> None:
    pair.workers["prefill"].prefill_failure = "ENGINE_FAILED"
    async with Client(pair.grpc) as client:
        error = await refused(client, request_of("hi"))
        assert reason_of(error) == "ENGINE_FAILED"
        await until(lambda: not pair.workers["decode"].running)
        pair.workers["prefill"].prefill_failure = ""
        assert (await client.generate("hi")).text == "Hello!"


async def test_a_client_that_leaves_is_told_to_both_legs_and_the_room(pair: Scripted) -> None:
    pair.workers["decode"].script = stalling()
    body = {"prompt": "hi", "stream": True}
    async with httpx.AsyncClient(base_url=pair.http) as http:
        async with http.stream("POST", "/v1/completions", json=body) as response:
            lines = response.aiter_lines()  # kept: it closes the response when it goes
            await anext(lines)
            await succeeded(pair)
        await until(lambda: len(pair.workers["decode"].aborts) == 1)
    pair.handover.arrived.clear()
    async with Client(pair.grpc) as client:
        pair.workers["prefill"]._reserved = NeverSet()  # type: ignore[assignment]
        call = client.router.Generate(request_of("hi"), timeout=20)
        await until(lambda: len(pair.workers["prefill"].starts) == 2)
        call.cancel()
        await until(lambda: len(pair.workers["decode"].aborts) == 2 and len(pair.workers["prefill"].aborts) == 1)
    failed = [room.reason for room in await rooms(pair) if room.state == pb.ROOM_STATE_FAILED]
    assert failed in (["ABORTED"], [])


async def succeeded(mesh: Scripted) -> None:
    """Until bootstrap has heard that all rooms' bytes arrived: the workers tell it at their leisure."""
    async with asyncio.timeout(20):
        while True:
            if {room.state for room in await rooms(mesh)} <= {pb.ROOM_STATE_SUCCESS}:
                return
            await asyncio.sleep(0.01)


class NeverSet(dict[str, asyncio.Event]):
    """Reservations that never reach the prefill worker's script."""

    def setdefault(self, key: str, default: asyncio.Event | None = None) -> asyncio.Event:
        return asyncio.Event()


# ---------------------------------------------------------------------------------------- failures


async def test_failures_keep_their_reason(unified: Scripted, client: Client) -> None:
    unified.workers["unified"].script = failing("OVERLOADED")
    error = await refused(client, request_of("hi"))
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED")
    async with httpx.AsyncClient(base_url=unified.http) as http:
        response = await http.post("/v1/completions", json={"prompt": "hi"})
        assert response.status_code == 429
        assert int(response.headers["retry-after"]) >= 1
        assert response.json()["error"]["code"] == "overloaded"


async def test_a_failure_within_an_event_stream_is_an_event(unified: Scripted) -> None:
    unified.workers["unified"].script = failing("ENGINE_FAILED", after="ab")
    async with httpx.AsyncClient(base_url=unified.http) as http:
        response = await http.post("/v1/completions", json={"prompt": "hi", "stream": True})
    assert response.status_code == 200
    events = response.text.strip().split("\n\n")
    assert events[-1].startswith("event: error\ndata: ")
    assert json.loads(events[-1].split("data: ")[1])["error"]["code"] == "engine_failed"


async def test_a_worker_that_dies_fails_its_streams_alone(unified: Scripted, client: Client) -> None:
    unified.workers["unified"].script = stalling()
    failed = asyncio.create_task(refused(client, request_of("hi")))
    await until(lambda: len(unified.workers["unified"].running) == 1)
    await unified.workers["unified"].die()
    assert reason_of(await failed) == "WORKER_LOST"
    await unified.ready(False, "unified")
    await unified.add("unified", "another")
    await unified.ready()
    assert (await client.generate("hi")).text == "Hello!"


async def test_lost_tokens_are_noticed(unified: Scripted, client: Client) -> None:
    async def script(start: decode_pb.DecodeStart) -> AsyncIterator[News]:
        yield tokens([1], 0)
        yield tokens([2], 2)

    unified.workers["unified"].script = script
    assert reason_of(await refused(client, request_of("hi"))) == "INTERNAL"
    await until(lambda: len(unified.workers["unified"].aborts) == 1)


async def test_deadlines(unified: Scripted, client: Client, tmp_path: Path) -> None:
    unified.workers["unified"].script = stalling()
    error = await refused(client, request_of("hi"), timeout_s=0.3)
    assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    await until(lambda: len(unified.workers["unified"].aborts) == 1)
    async with scripted(tmp_path / "short", "unified", request_timeout_secs=0.2) as mesh:
        mesh.workers["unified"].script = stalling()
        async with httpx.AsyncClient(base_url=mesh.http) as http:
            response = await http.post("/v1/completions", json={"prompt": "hi"})
        assert (response.status_code, response.json()["error"]["code"]) == (504, "deadline_exceeded")


async def test_requests_can_be_aborted_by_id(unified: Scripted, client: Client) -> None:
    unified.workers["unified"].script = stalling("ab")
    request = request_of("hi", n=2)
    request.request_id = "mine"
    responses = aiter(client.router.Generate(request, timeout=20))
    assert (await anext(responses)).text == "ab"
    again = await refused(client, request)
    assert (again.code(), reason_of(again)) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_PARAMETER")
    assert (await client.router.AbortRequest(router_pb.AbortRequestRequest(request_id="mine"), timeout=5)).found
    rest = [response async for response in responses]
    assert sorted(r.index for r in rest if r.finish_reason == pb.FINISH_REASON_ABORT) == [0, 1]
    assert rest[-1].usage.completion_tokens == 4
    await until(lambda: len(unified.workers["unified"].aborts) == 2)
    gone = await client.router.AbortRequest(router_pb.AbortRequestRequest(request_id="mine"), timeout=5)
    assert not gone.found


async def test_admission_is_bounded(tmp_path: Path) -> None:
    async with scripted(tmp_path, "unified", max_concurrent_requests=1, max_queued_requests=1) as mesh:
        worker = mesh.workers["unified"]
        worker.script = stalling()
        async with Client(mesh.grpc) as client:
            running = asyncio.create_task(client.generate("a", max_new_tokens=5))
            await until(lambda: len(worker.running) == 1)
            worker.script = saying("Hello!")
            waiting = asyncio.create_task(client.generate("b"))
            await until(lambda: "pdmesh_queued_requests 1.0" in metrics.page().decode())
            assert reason_of(await refused(client, request_of("c"))) == "OVERLOADED"
            running.cancel()
            assert (await waiting).text == "Hello!"


# ---------------------------------------------------------------------------------------- readiness


async def health_of(mesh: Scripted) -> int:
    async with grpc.aio.insecure_channel(mesh.grpc) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        response = await stub.Check(health_pb2.HealthCheckRequest(service="pdmesh.v1.RouterService"), timeout=5)
        return int(response.status)


async def test_readiness_needs_a_pair_and_bootstrap(tmp_path: Path) -> None:
    serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
    async with scripted(tmp_path) as mesh, Client(mesh.grpc) as client:
        await mesh.ready(False, "no worker")
        assert await health_of(mesh) == not_serving
        assert reason_of(await refused(client, request_of("hi"))) == "NO_WORKER"
        await mesh.add("prefill")
        await mesh.ready(False, "no decode")
        await mesh.add("decode", "other", fingerprint="g")
        await mesh.ready(False, "no two workers fit")
        await mesh.add("decode")
        await mesh.ready()
        assert await health_of(mesh) == serving
        assert (await client.generate("hi")).text == "Hello!"
        assert not mesh.workers["other"].starts
        await mesh.bootstrap.stop()
        await mesh.ready(False, "bootstrap")
        assert await health_of(mesh) == not_serving


async def test_draining_finishes_what_runs_and_refuses_the_rest(tmp_path: Path) -> None:
    async with scripted(tmp_path, "unified", drain_timeout=20) as mesh, Client(mesh.grpc) as client:
        go = asyncio.Event()

        async def script(start: decode_pb.DecodeStart) -> AsyncIterator[News]:
            yield tokens([65], 0)
            await go.wait()
            yield tokens([66], 1, "length")

        mesh.workers["unified"].script = script
        running = asyncio.create_task(client.generate("a"))
        await until(lambda: len(mesh.workers["unified"].running) == 1)
        mesh.stop.set()
        await mesh.ready(False, "shutting down")
        assert reason_of(await refused(client, request_of("b"))) == "DRAINING"
        go.set()
        assert (await running).text == "AB"
        await mesh.serving


async def test_a_model_without_tokenizer_takes_token_ids(tmp_path: Path) -> None:
    async with scripted(tmp_path / "a") as mesh, Client(mesh.grpc) as client:
        empty = tmp_path / "empty"
        empty.mkdir()
        await mesh.add("unified", model_path=str(empty))
        await mesh.ready()
        assert reason_of(await refused(client, request_of("text"))) == "UNSUPPORTED"
        result = await client.generate([1, 2, 3])
        assert (result.token_ids, result.text) == ([*b"Hello!", EOS], "")
