"""Faults in a real mesh, and what `Explain` says of them; everything is asked with JSON through reflection."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from common.errors.base import MeshError, Reason
from common.mesh.ticket import Ticket
from common.mesh.wire import ticket_to
from pdmesh.v1 import bootstrap_service_pb2 as pb
from pdmesh.v1 import bootstrap_service_pb2_grpc as bootstrap_grpc
from pdmesh.v1 import decode_service_pb2 as decode_pb
from pdmesh.v1 import decode_service_pb2_grpc as decode_grpc
from pdmesh.v1 import types_pb2 as types
from tests.mesh.harness import scrape
from tests.mesh.inspected import PATIENCE_S, SLOW_DECODE, TINY_POOL, Mesh, channel_to, opened, ready, until
from tests.mesh.processes import services
from tests.mesh.reflect import Refused, seconds_of

pytestmark = [pytest.mark.mesh, pytest.mark.fault, pytest.mark.slow]


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Mesh]:
    with services(tmp_path, Mesh) as mesh:
        yield mesh


# ------------------------------------------------------------------------------------------ faults


async def test_prefill_killed(mesh: Mesh) -> None:
    mesh.whole()
    await ready(mesh)
    mesh["prefill-0"].signal(signal.SIGSTOP)
    async with mesh.ask("killed") as asked:
        await mesh.room("killed", "WAITING_FOR_INPUT")
        mesh["prefill-0"].kill()
        assert await asked.failure() is grpc.StatusCode.UNAVAILABLE
        said, reason = await mesh.explained("killed", "prefill-0 is gone", "its session broke")
        assert reason == "WORKER_LOST"
        assert "while prefill-0 computed the prompt" in said


async def test_decode_killed_before_the_pages_arrive(mesh: Mesh) -> None:
    mesh.whole()
    await ready(mesh)
    mesh["prefill-0"].signal(signal.SIGSTOP)
    async with mesh.ask("killed") as asked:
        await mesh.room("killed", "WAITING_FOR_INPUT")
        mesh["decode-0"].kill()
        assert await asked.failure() is grpc.StatusCode.UNAVAILABLE
        _, reason = await mesh.explained("killed", "decode-0 is gone", "its session broke")
        assert reason == "WORKER_LOST"


async def test_decode_killed_while_it_generates(mesh: Mesh) -> None:
    mesh.whole(decode=mesh.profile("slow", SLOW_DECODE))
    await ready(mesh)
    async with mesh.ask("killed") as asked:
        await asked.first_token()
        await mesh.room("killed", "SUCCESS")  # a token may overtake what bootstrap is told
        mesh["decode-0"].kill()
        assert await asked.failure() is grpc.StatusCode.UNAVAILABLE
        said, reason = await mesh.explained("killed", "decode-0 is gone", "while decode-0 generated")
        assert reason == "WORKER_LOST"
        assert "its session broke" in said


async def test_bootstrap_timeout_because_decodes_pool_is_full(mesh: Mesh) -> None:
    """Past the router, which would not have opened a room that decode has no credit for."""
    mesh.whole("--disaggregation-bootstrap-timeout", "1.5", decode=(*mesh.profile("slow", SLOW_DECODE), *TINY_POOL))
    await ready(mesh)
    async with decode_leg(mesh, [start(1, [5] * 300, None)]) as filler:  # 19 of 32 pages
        await filler.read()
        async with opened(mesh, "full", prompt_tokens=300) as ticket, decode_leg(mesh, [start(2, [5] * 300, ticket)]):
            said, reason = await mesh.explained("full", "decode-0 granted no pages for 1.5 s")
    assert reason == "BOOTSTRAP_TIMEOUT"
    assert re.search(r"(19|20|21|22) of 32 pages were in use by 1 sequence, 1\d free, 19 needed", said), said


async def test_waiting_timeout_of_a_prefill_worker_that_stands_still(mesh: Mesh) -> None:
    mesh.whole("--disaggregation-waiting-timeout", "1.5")
    await ready(mesh)
    mesh["prefill-0"].signal(signal.SIGSTOP)
    async with mesh.ask("still") as asked:
        assert await asked.failure() is grpc.StatusCode.UNAVAILABLE
        said, reason = await mesh.explained("still", "prefill-0 began no transfer for 1.5 s")
    assert reason == "WAITING_TIMEOUT"
    assert "after decode-0 granted 3 pages" in said
    assert "it had not been heard from for" in said


async def test_client_abort_before_and_after_the_hand_over(mesh: Mesh) -> None:
    mesh.whole(decode=mesh.profile("slow", SLOW_DECODE))
    await ready(mesh)
    async with mesh.ask("after") as asked:
        await asked.first_token()
        await mesh.room("after", "SUCCESS")  # a token may overtake what bootstrap is told
    said, reason = await mesh.explained("after", "the router gave the request up", "the client left")
    assert reason == "ABORTED"
    assert said.startswith("The hand-over succeeded in")
    mesh["prefill-0"].signal(signal.SIGSTOP)
    async with mesh.ask("before"):
        await mesh.room("before", "WAITING_FOR_INPUT")
    said, reason = await mesh.explained("before", "The router gave the request up", "the client left")
    assert reason == "ABORTED"
    assert "while prefill-0 computed the prompt" in said


async def test_deadline_before_and_after_the_hand_over(mesh: Mesh) -> None:
    mesh.whole(decode=mesh.profile("slow", SLOW_DECODE))
    await ready(mesh)
    async with mesh.ask("after", timeout_s=1.5) as asked:
        assert await asked.failure() is grpc.StatusCode.DEADLINE_EXCEEDED
        said, reason = await mesh.explained("after", "The request's deadline", "passed while decode-0 generated")
        assert reason == "DEADLINE_EXCEEDED"
    mesh["prefill-0"].signal(signal.SIGSTOP)
    async with mesh.ask("before", timeout_s=1.5) as asked:
        assert await asked.failure() is grpc.StatusCode.DEADLINE_EXCEEDED
        said, reason = await mesh.explained("before", "The request's deadline", "prefill-0 began no transfer for")
        assert reason == "DEADLINE_EXCEEDED"
        assert "it had not been heard from for" in said


async def test_workers_that_do_not_fit(mesh: Mesh) -> None:
    mesh.whole(decode=("--page-size", "32"))
    await until(lambda: len(mesh.call("ListWorkers").get("workers", [])) == 2)
    where = "kv_layout.page_size: 16 and 32"
    with pytest.raises(MeshError) as caught:
        async with opened(mesh, "unfit", prompt_tokens=40):
            pass
    assert caught.value.reason is Reason.LAYOUT_MISMATCH
    said, reason = await mesh.explained("unfit", "No room was opened", where)
    assert reason == "LAYOUT_MISMATCH"
    page = f"http://{mesh['router'].listening.http}/ready"
    await until(lambda: "no two workers fit" in httpx.get(page).text)  # it has heard of both
    async with mesh.ask("unroutable", timeout_s=20) as asked:  # the router pairs none that do not fit
        assert await asked.failure() is grpc.StatusCode.UNAVAILABLE
        said, reason = await mesh.explained("unroutable", "no two workers fit each other", where)
        assert reason == "NO_WORKER"
        assert "prefill-0" in said
        assert "decode-0" in said


async def test_a_mesh_that_is_full(mesh: Mesh) -> None:
    mesh.whole(decode=(*mesh.profile("slow", SLOW_DECODE), *TINY_POOL), router=("--queue-timeout", "4"))
    await ready(mesh)
    async with mesh.ask("first", max_new_tokens=400) as first:
        await first.first_token()
        async with mesh.ask("refused", max_new_tokens=400) as refused:
            await mesh.explained(
                "refused", "waited in a router's queue", "decode has no credit for it", "up to 400 to come"
            )
            assert await refused.failure() is grpc.StatusCode.RESOURCE_EXHAUSTED
        said, reason = await mesh.explained("refused", "decode had no room within 4 s", "of 32 pages of decode-0")
    assert reason == "OVERLOADED"
    assert "were in use by 1 sequence" in said


async def test_a_quarantine_that_lasts(mesh: Mesh) -> None:
    mesh.whole()
    await ready(mesh)
    mesh["prefill-0"].signal(signal.SIGSTOP)
    async with mesh.ask("given-up"):
        room = await mesh.room("given-up", "WAITING_FOR_INPUT")
    await mesh.explained("given-up", "the client left")
    room_id = room["ticket"]["roomId"]

    def pending() -> str:
        (explained,) = mesh.call("Explain", roomId=room_id)["rooms"]
        return str(explained.get("pending", ""))

    said = pending()
    assert said.startswith("3 pages of decode-0 are in quarantine since")
    assert said.endswith("prefill-0 has not said that it writes no more.")
    mesh["prefill-0"].signal(signal.SIGCONT)
    await until(lambda: not pending())


async def test_a_retracted_sequence(mesh: Mesh) -> None:
    reserve = ("--num-reserved-decode-tokens", "0", "--decode-prealloc-high-water", "1.0")
    quick = mesh.profile("quick", "[decode]\nbase_s = 0.002\n")
    mesh.whole(decode=(*quick, *TINY_POOL, *reserve))
    await ready(mesh)
    async with mesh.ask("older", max_new_tokens=300) as older, mesh.ask("younger", max_new_tokens=300) as younger:
        ends = [(await asked.rest())[-1].finish_reason for asked in (older, younger)]
    assert ends == [types.FINISH_REASON_LENGTH] * 2
    tries = {name: mesh.call("Explain", requestId=name)["rooms"] for name in ("older", "younger")}
    (retracted, *_, last) = max(tries.values(), key=len)
    assert "decode-0 ran out of pages and retracted the sequence" in retracted["summary"]
    assert last["room"]["ticket"]["attempt"] > 1
    assert last["summary"].startswith("The hand-over succeeded in")


# ------------------------------------------------------------------------------------------ verbs and views


async def test_an_operator_aborts_a_room(mesh: Mesh) -> None:
    mesh.whole()
    await ready(mesh)
    mesh["prefill-0"].signal(signal.SIGSTOP)
    async with mesh.ask("unwanted") as asked:
        room = await mesh.room("unwanted", "WAITING_FOR_INPUT")
        room_id = room["ticket"]["roomId"]
        answer = mesh.call("AbortRoom", roomId=room_id, message="making room")
        assert (answer["room"]["state"], answer["room"]["reason"]) == ("ROOM_STATE_FAILED", "ABORTED")
        assert await asked.failure() is grpc.StatusCode.CANCELLED
        with pytest.raises(Refused, match="has failed already: ABORTED"):
            mesh.call("AbortRoom", roomId=room_id)
        _, reason = await mesh.explained("unwanted", "An operator aborted the room", "making room")
        assert reason == "ABORTED"
        moments = mesh.call("GetRoom", roomId=room_id)["timeline"]["moments"]
    assert [(moment["event"], moment["by"]) for moment in moments[:3]] == [
        ("Opened", "router"),
        ("Reserved", "decode-0"),
        ("Abort", "operator"),
    ]
    assert all(moment["decode"]["load"]["ledger"] for moment in moments)


async def test_a_worker_is_drained_and_leaves_in_order(mesh: Mesh) -> None:
    mesh.whole(decode=mesh.profile("slow", SLOW_DECODE))
    await ready(mesh)
    async with mesh.ask("last", max_new_tokens=30) as asked:
        await asked.first_token()
        answer = await asyncio.to_thread(mesh.call, "DrainWorker", workerId="decode-0", timeout="60s")
        assert answer["worker"]["state"] == "WORKER_STATE_DRAINING"
        assert (await asked.rest())[-1].finish_reason == types.FINISH_REASON_LENGTH
    assert await asyncio.to_thread(mesh["decode-0"].process.wait, PATIENCE_S) == 0
    await until(lambda: [w["workerId"] for w in mesh.call("ListWorkers")["workers"]] == ["prefill-0"])
    with pytest.raises(Refused, match="no worker 'decode-0'"):
        mesh.call("DrainWorker", workerId="decode-0")
    with pytest.raises(Refused, match="drain it, and start it again") as caught:
        mesh.call("SetWorkerRole", workerId="prefill-0", role="WORKER_ROLE_DECODE")
    assert caught.value.code == "unimplemented"


async def test_lists_filters_and_the_watch(mesh: Mesh) -> None:
    mesh.whole()
    await ready(mesh)
    async with channel_to(mesh["bootstrap"].grpc) as channel:
        watch = bootstrap_grpc.BootstrapServiceStub(channel).WatchRooms(pb.WatchRoomsRequest(request_id="seen"))
        await watch.wait_for_connection()
        async with mesh.ask("seen", max_new_tokens=3) as asked:
            assert (await asked.rest())[-1].finish_reason == types.FINISH_REASON_LENGTH
        events: list[str] = []
        async with asyncio.timeout(PATIENCE_S):
            while not {"Transferred", "Closed"} <= set(events):
                events += [change.moment.event for change in (await watch.read()).changes]
        watch.cancel()
    assert events[:2] == ["Opened", "Reserved"]  # the others come over different sessions

    assert mesh.call("ListRooms", requestId="seen", workerId="decode-0", state="ROOM_STATE_SUCCESS")["rooms"]
    for filters in ({"minAge": "1000s"}, {"workerId": "nobody"}, {"state": "ROOM_STATE_FAILED"}):
        assert not mesh.call("ListRooms", requestId="seen", **filters).get("rooms")
    ledgers = mesh.call("GetLedger")["workers"]
    assert [ledger["workerId"] for ledger in ledgers] == ["decode-0", "prefill-0"]
    for told in ledgers:
        assert told["ledger"]["free"] + told["ledger"].get("cached", 0) == told["pages"], told
    _, reason = await mesh.explained("seen", "The hand-over succeeded in")
    assert reason == ""
    (explained,) = mesh.call("Explain", requestId="seen")["rooms"]
    transfer = explained["transfer"]
    assert (transfer["backend"], transfer["descriptors"]) == ("emulated", 1)
    assert int(transfer["bytes"]) > 0
    assert all(seconds_of(transfer[name]) >= 0 for name in ("duration", "queued", "hidden", "exposed"))
    assert [m["event"] for m in explained["timeline"]["moments"] if "transfer" in m] == ["Transferred"]
    sent, received = (scrape(str(mesh[name].listening.metrics)) for name in ("prefill-0", "decode-0"))
    assert f'pdmesh_transfer_bytes_sum{{backend="emulated"}} {float(transfer["bytes"])}' in sent
    assert f'pdmesh_transfer_received_bytes_total{{backend="emulated"}} {float(transfer["bytes"])}' in received
    for name in ("seconds", "queue_seconds", "hidden_seconds", "exposed_seconds", "descriptors"):
        assert f'pdmesh_transfer_{name}_count{{backend="emulated"}} 1.0' in sent
    for request in ({}, {"requestId": "never", "roomId": "both"}):
        with pytest.raises(Refused, match="either request_id or room_id"):
            mesh.call("Explain", **request)
    with pytest.raises(Refused, match="is remembered"):
        mesh.call("Explain", requestId="never")


async def test_the_operators_commands(mesh: Mesh) -> None:
    mesh.whole()
    await ready(mesh)
    async with mesh.ask("shown", max_new_tokens=3) as asked:
        assert await asked.rest()
    assert all(name in mesh.pdmesh("workers") for name in ("prefill-0", "decode-0", "READY"))
    (room,) = json.loads(mesh.pdmesh("rooms", "--request-id", "shown", "--json"))
    room_id = room["ticket"]["roomId"]
    assert room_id in mesh.pdmesh("rooms", "--state", "success")
    for name in ("shown", room_id):
        shown = mesh.pdmesh("explain", name)
        assert "The hand-over succeeded in" in shown
        assert all(event in shown for event in ("Opened", "Reserved", "Transferred"))
        assert "MB in 1 piece by emulated in" in shown
    assert json.loads(mesh.pdmesh("explain", "shown", "--json"))["rooms"]
    assert "prefill-0" in mesh.pdmesh("top", "--count", "2", "--interval", "0.1")
    (look,) = map(json.loads, mesh.pdmesh("top", "--json", "--count", "1").splitlines())
    assert {worker["workerId"] for worker in look["workers"]} == {"prefill-0", "decode-0"}
    for arguments in (("abort", room_id), ("abort", "none"), ("explain", "none"), ("drain", "none")):
        with pytest.raises(subprocess.CalledProcessError) as caught:
            mesh.pdmesh(*arguments)
        assert len(caught.value.stderr.splitlines()) == 1, caught.value.stderr
    assert "has left" in mesh.pdmesh("drain", "decode-0")


# ------------------------------------------------------------------------------------------ past the router


def start(sequence_id: int, prompt: list[int], ticket: Ticket | None) -> decode_pb.DecodeCommand:
    begin = decode_pb.DecodeStart(sequence_id=sequence_id, ticket=ticket_to(ticket) if ticket else None)
    begin.prompt_ids.extend(prompt)
    begin.sampling.CopyFrom(types.SamplingParams(max_new_tokens=180, ignore_eos=True))
    return decode_pb.DecodeCommand(start=begin)


@asynccontextmanager
async def decode_leg(mesh: Mesh, commands: list[decode_pb.DecodeCommand]) -> AsyncIterator[Any]:
    """A router's stream to decode-0, on which `commands` have been sent."""
    async with channel_to(mesh["decode-0"].grpc) as channel:
        call: Any = decode_grpc.DecodeServiceStub(channel).Session()
        await call.write(decode_pb.DecodeServiceSessionRequest(commands=commands))
        yield call
        call.cancel()
