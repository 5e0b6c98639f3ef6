"""More work than decode can take: it waits at the router, or is refused at once, and decode never runs out."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import grpc
import httpx
import pytest

from common.errors.base import Reason
from common.rpc.status import error_from
from tests.mesh.harness import Client, Mesh, running, scrape, wait_until
from tests.mesh.processes import Services, services

pytestmark = [pytest.mark.mesh, pytest.mark.slow]

MODEL = ("--model-path", "examples/models/adder")
# Places for four sequences, pages for not many more.
DECODE = ("--max-running-requests", "4", "--max-total-tokens", "1024", "--context-length", "512")
QUEUE_TIMEOUT_S = 2.0
REQUESTS, MOST_QUEUED = 200, 60
NEW_TOKENS = 32
OVERLOAD_S = 60.0 if os.environ.get("PDMESH_SOAK") else 5.0


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    queue = ("--max-queued-requests", str(MOST_QUEUED), "--queue-timeout", str(QUEUE_TIMEOUT_S))
    with running(*MODEL, *DECODE, *queue) as mesh:
        yield mesh


@dataclass
class Outcome:
    """One request: its tokens, or why it was refused and when."""

    seconds: float
    tokens: int = 0
    reason: str = ""
    message: str = ""
    retry_after_s: float | None = None


async def ask(client: Client, prompt: str, new_tokens: int = NEW_TOKENS) -> Outcome:
    start = time.monotonic()
    try:
        result = await client.generate(prompt, temperature=0.0, max_new_tokens=new_tokens, ignore_eos=True)
    except grpc.aio.AioRpcError as raw:
        error = error_from(raw)
        seconds = time.monotonic() - start
        return Outcome(seconds, 0, str(error.reason), error.message, error.retry_after_s)
    return Outcome(time.monotonic() - start, len(result.token_ids))


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


def value_of(mesh: Mesh, role: str, name: str) -> float:
    page = scrape(mesh.of(role)[0]["metrics"])
    return sum(float(line.split()[1]) for line in page.splitlines() if line.startswith(name + " "))


def at_rest(mesh: Mesh) -> bool:
    return mesh.at_rest() and value_of(mesh, "decode", "pdmesh_running_sequences") == 0


async def test_a_burst_is_served_or_refused_but_never_left_waiting(mesh: Mesh) -> None:
    async with Client(mesh.grpc) as client:
        outcomes = await asyncio.gather(*(ask(client, f"{number} + {number} =") for number in range(REQUESTS)))
    served = [outcome for outcome in outcomes if not outcome.reason]
    refused = [outcome for outcome in outcomes if outcome.reason]
    assert {outcome.tokens for outcome in served} == {NEW_TOKENS}
    assert {outcome.reason for outcome in refused} == {Reason.OVERLOADED}
    assert all(outcome.retry_after_s for outcome in refused)
    at_once = [outcome.seconds for outcome in refused if "wait already" in outcome.message]
    late = [outcome.seconds - QUEUE_TIMEOUT_S for outcome in refused if "within" in outcome.message]
    assert len(at_once) + len(late) == len(refused)
    assert at_once
    assert len(served) >= 4
    print(
        f"{len(served)} served, {len(at_once)} refused at once (p99 {percentile(at_once, 0.99) * 1e3:.0f} ms)", end=""
    )
    print(f", {len(late)} after the queue time (p99 {percentile(late or [0.0], 0.99) * 1e3:.0f} ms later)")
    assert max(at_once) < QUEUE_TIMEOUT_S, "all at once, and this machine is shared: a loose bound"
    assert max(late, default=0) < QUEUE_TIMEOUT_S
    assert value_of(mesh, "decode", "pdmesh_retracted_sequences_total") == 0
    wait_until(lambda: at_rest(mesh), 10, "every page is back in its pool")


async def test_http_says_429_and_when_to_come_again(mesh: Mesh) -> None:
    body = {"prompt": "1 + 1 =", "max_tokens": 400, "temperature": 0, "ignore_eos": True}
    async with httpx.AsyncClient(base_url=mesh.http, timeout=60) as http:
        calls = [http.post("/v1/completions", json=body) for _ in range(MOST_QUEUED + 30)]
        responses = await asyncio.gather(*calls)
    assert {response.status_code for response in responses} == {200, 429}
    for response in responses:
        if response.status_code == 429:
            assert 1 <= int(response.headers["retry-after"]) <= 60
            assert response.json()["error"]["code"] == "overloaded"
    wait_until(lambda: at_rest(mesh), 10, "every page is back in its pool")


async def test_overload_never_runs_decode_out_of_pages(mesh: Mesh) -> None:
    """Four times what the mesh can take: for five seconds in the suite, for a minute in `make soak`."""
    async with Client(mesh.grpc) as client:
        rate, capacity = count(), 0.0
        start = time.monotonic()

        async def worker(until: float) -> int:
            done = 0
            while time.monotonic() < until:
                done += not (await ask(client, f"{next(rate)} + 1 =", 96)).reason
            return done

        capacity = sum(await asyncio.gather(*(worker(start + 2) for _ in range(4)))) / (time.monotonic() - start)
        calls = []
        begin = time.monotonic()
        while (now := time.monotonic()) < begin + OVERLOAD_S:
            while len(calls) < (now - begin) * capacity * 4:
                calls.append(asyncio.create_task(ask(client, f"{next(rate)} + 1 =", 96)))
            await asyncio.sleep(0.005)
        outcomes = await asyncio.gather(*calls)
        took_s = time.monotonic() - begin
    served = sum(not outcome.reason for outcome in outcomes)
    assert {outcome.reason for outcome in outcomes} <= {"", Reason.OVERLOADED}
    print(f"capacity {capacity:.1f} requests/s; at four times that {served / took_s:.1f}/s, {len(outcomes)} sent")
    assert served > OVERLOAD_S, "it goes on serving; how well, `benchmarks/saturation.py` tells"
    assert value_of(mesh, "decode", "pdmesh_retracted_sequences_total") == 0
    wait_until(lambda: at_rest(mesh), 10, "every page is back in its pool")
    assert value_of(mesh, "router", "pdmesh_queued_requests") == 0


async def test_a_large_request_is_served_among_small_ones(mesh: Mesh) -> None:
    async with Client(mesh.grpc) as client:
        stop = asyncio.Event()

        async def small() -> None:
            while not stop.is_set():
                await ask(client, "2 + 2 =", 16)

        crowd = [asyncio.create_task(small()) for _ in range(12)]
        try:
            large = await ask(client, "7 " * 120, 256)
            while large.reason == Reason.OVERLOADED:  # the queue's two seconds can be short on a busy machine
                large = await ask(client, "7 " * 120, 256)
        finally:
            stop.set()
            await asyncio.gather(*crowd)
    assert large.reason == ""
    assert large.tokens == 256


async def test_what_fits_no_pool_is_refused_at_once() -> None:
    with running(*MODEL, "--max-total-tokens", "128", "--context-length", "512") as mesh:
        async with Client(mesh.grpc) as client:
            outcome = await ask(client, "1 + 1 =", 400)
            assert outcome.reason == Reason.CONTEXT_TOO_LONG
            assert "128 tokens" in outcome.message
            # larger than the high-water mark, but not than the pool: it gets the worker to itself
            assert (await ask(client, "1 + 1 =", 110)).tokens == 110


async def test_an_answer_of_no_given_length_ends_with_the_pool() -> None:
    body = {"messages": [{"role": "user", "content": "What is 1 + 2?"}], "temperature": 0, "ignore_eos": True}
    with running(*MODEL, "--max-total-tokens", "64", "--context-length", "512", "--page-size", "16") as mesh:
        async with httpx.AsyncClient(base_url=mesh.http, timeout=60) as http:
            answer = (await http.post("/v1/chat/completions", json=body)).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["total_tokens"] == 65, "the last token's KV is never computed"


async def test_what_several_routers_overspend_waits_at_decode(mesh: Mesh, tmp_path: Path) -> None:
    """Each spends the same credit; decode grants no more than it has, and nobody is refused for it."""
    with services(tmp_path, Services) as more:
        own = ("--port", "0", "--grpc-port", "0", "--bootstrap", str(mesh.of("bootstrap")[0]["grpc"]))
        routers = [more.start("router", name, *own) for name in ("one", "other")]
        pages = [f"http://{router.listening.http}" for router in routers]
        await asyncio.to_thread(wait_until, lambda: all(map(is_ready, pages)), 30, "both routers are ready")
        async with Client(routers[0].grpc) as one, Client(routers[1].grpc) as other:
            calls = [ask(router, f"{number} + 1 =", 16) for number in range(20) for router in (one, other)]
            outcomes = await asyncio.gather(*calls)
    assert [outcome.tokens for outcome in outcomes] == [16] * 40
    assert value_of(mesh, "decode", "pdmesh_retracted_sequences_total") == 0
    wait_until(lambda: at_rest(mesh), 10, "every page is back in its pool")


def is_ready(http: str) -> bool:
    try:
        return httpx.get(f"{http}/ready", timeout=5).status_code == 200
    except httpx.TransportError:
        return False
