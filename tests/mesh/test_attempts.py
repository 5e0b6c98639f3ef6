"""One sequence over several attempts: retracted, and tried anew when it failed before its first token."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from pdmesh.v1 import bootstrap_service_pb2 as bootstrap_pb
from pdmesh.v1 import bootstrap_service_pb2_grpc as bootstrap_grpc
from pdmesh.v1 import decode_service_pb2 as decode_pb
from pdmesh.v1 import types_pb2 as pb
from services.router.attempt import Attempt
from tests.mesh.harness import Client, request_of
from tests.mesh.scripted import EOS, News, Script, Scripted, failing, reason_of, saying, scripted, tokens, until

pytestmark = pytest.mark.mesh


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[Scripted]:
    async with scripted(tmp_path, "prefill", "decode") as mesh:
        yield mesh


def interrupted(text: str, every: int) -> Script:
    """Say `text`, and be retracted after every so many tokens."""
    ids = [*text.encode(), EOS]

    async def script(start: decode_pb.DecodeStart) -> AsyncIterator[News]:
        said = len(start.output_ids)
        assert list(start.output_ids) == ids[:said]
        for offset in range(said, min(said + every, len(ids))):
            yield tokens([ids[offset]], offset, "stop" if offset + 1 == len(ids) else "")
        if said + every < len(ids):
            yield decode_pb.SequenceRetracted()

    return script


async def rooms(mesh: Scripted) -> list[pb.Room]:
    async with grpc.aio.insecure_channel(mesh.bootstrap.address) as channel:
        stub: bootstrap_grpc.BootstrapServiceAsyncStub = bootstrap_grpc.BootstrapServiceStub(channel)
        return list((await stub.ListRooms(bootstrap_pb.ListRoomsRequest(), timeout=5)).rooms)


async def failure_of(client: Client) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.generate("hi")
    return reason_of(caught.value)


@pytest.mark.parametrize("every", [1, 2, 5])
async def test_a_retracted_sequence_goes_on_without_a_seam(pair: Scripted, every: int) -> None:
    """No token is lost or doubled, and characters and stop strings may span attempts."""
    text = "Grüße 😀, one stop two"
    pair.workers["decode"].script = interrupted(text, every)
    async with Client(pair.grpc) as client:
        whole = await client.generate("hi", max_new_tokens=60)
        cut = await client.generate("hi", max_new_tokens=60, stop=["one stop"])
    assert (whole.text, whole.finish) == (text, "stop")
    assert whole.token_ids == [*text.encode(), EOS]
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (3, len(whole.token_ids))
    assert (cut.text, cut.finish) == ("Grüße 😀, ", "stop")
    decode, prefill = pair.workers["decode"].starts, pair.workers["prefill"].starts
    first = [start for start in decode if start.request_id == decode[0].request_id]
    assert [start.ticket.attempt for start in first] == list(range(1, len(first) + 1))
    assert len({start.ticket.room_id for start in first}) == len(first)
    assert {start.sampling.seed for start in first} == {first[0].sampling.seed}
    assert [list(start.output_ids) for start in prefill] == [list(start.output_ids) for start in decode]
    await until(lambda: not pair.workers["decode"].running)
    assert pb.ROOM_STATE_FAILED not in [room.state for room in await rooms(pair)]


async def test_a_failed_hand_over_is_tried_again_with_others(pair: Scripted) -> None:
    pair.workers["prefill"].prefill_failure = "TRANSFER_FAILED"
    await pair.add("prefill", "sound")
    await pair.ready()
    async with Client(pair.grpc) as client:
        for _ in range(8):
            assert (await client.generate("hi")).text == "Hello!"
    attempts = [start.ticket.attempt for start in pair.workers["sound"].starts]
    assert len(attempts) == 8
    assert set(attempts) <= {1, 2}
    await until(lambda: not pair.workers["decode"].running)


async def test_it_is_tried_three_times_at_most(pair: Scripted) -> None:
    pair.workers["prefill"].prefill_failure = "TRANSFER_FAILED"
    async with Client(pair.grpc) as client:
        assert await failure_of(client) == "TRANSFER_FAILED"
    assert [start.ticket.attempt for start in pair.workers["prefill"].starts] == [1, 2, 3]
    await until(lambda: not pair.workers["decode"].running)


@pytest.mark.parametrize("reason", ["ENGINE_FAILED", "OVERLOADED", "WAITING_TIMEOUT", "INTERNAL"])
async def test_some_failures_are_not_worth_another_try(pair: Scripted, reason: str) -> None:
    pair.workers["prefill"].prefill_failure = reason
    async with Client(pair.grpc) as client:
        assert await failure_of(client) == reason
    assert len(pair.workers["prefill"].starts) == 1


async def test_nothing_is_tried_again_after_the_first_token(pair: Scripted) -> None:
    pair.workers["decode"].script = failing("WORKER_LOST", after="ab")
    async with Client(pair.grpc) as client:
        assert await failure_of(client) == "WORKER_LOST"
    assert len(pair.workers["decode"].starts) == 1


async def test_the_first_error_stands_when_nobody_is_left(pair: Scripted) -> None:
    """A worker that is lost is no reason to say that there is none."""
    decode = pair.workers["decode"]

    async def script(start: decode_pb.DecodeStart) -> AsyncIterator[News]:
        await decode.server.stop()
        yield tokens([], 0)

    decode.script = script
    async with Client(pair.grpc) as client:
        call = client.router.Generate(request_of("hi"), timeout=20)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            _ = [response async for response in call]
    assert reason_of(caught.value) == "WORKER_LOST"


async def test_an_abort_between_attempts_ends_the_request(tmp_path: Path) -> None:
    async with scripted(tmp_path, "unified") as mesh, Client(mesh.grpc) as client:
        mesh.workers["unified"].script = interrupted("for ever and ever", 1)
        call = client.router.Generate(request_of("hi", max_new_tokens=60), timeout=20)
        await anext(aiter(call))
        call.cancel()
        await until(lambda: not mesh.workers["unified"].running)
        mesh.workers["unified"].script = saying("Hello!")
        assert (await client.generate("hi")).text == "Hello!"


async def test_a_link_that_cannot_take_what_it_is_told_begins_anew(
    pair: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sequence that was on it is tried anew; the worker is not left out for ever."""
    defects = ["one"]
    on_event = Attempt.on_event

    def defective(sink: Any, event: Any) -> None:
        if defects:
            raise KeyError(defects.pop())
        on_event(sink, event)

    monkeypatch.setattr(Attempt, "on_event", defective)
    async with Client(pair.grpc) as client:
        assert (await client.generate("hi", max_new_tokens=60)).text == "Hello!"
    assert not defects
