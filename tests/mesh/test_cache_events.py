"""A router's links follow what real workers have cached: from the start, after evictions, after a restart."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from common.errors.base import MeshError
from common.kvcache.hashes import page_hashes
from pdmesh.v1 import types_pb2 as pb
from pdmesh.v1.decode_service_pb2 import DecodeCommand, DecodeEvent, DecodeStart
from services.router.prefix_index import held_tokens
from services.router.worker_link import DecodeLink
from tests.mesh.processes import Services, services

pytestmark = pytest.mark.mesh

PAGE, PAGES = 16, 32
PROMPT = list(range(100))


class OneWorker(Services):
    """Bootstrap and a unified worker, which may be started again at its address."""

    def begin(self, *flags: str) -> str:
        """Start the worker; returns its address."""
        pool = ("--max-total-tokens", str(PAGE * PAGES), "--page-size", str(PAGE))
        return self.worker("unified", "unified", *pool, *flags).grpc


@pytest.fixture
def world(tmp_path: Path) -> Iterator[OneWorker]:
    with services(tmp_path, OneWorker) as world:
        world.bootstrap()
        yield world


class Linked:
    """A router's link to the worker."""

    def __init__(self, address: str) -> None:
        layout = pb.KvLayout(page_size=PAGE)
        record = pb.Worker(
            worker_id="unified", address=address, kv_layout=layout, pool_pages=PAGES, state=pb.WORKER_STATE_READY
        )
        self.news = asyncio.Event()
        self.link = DecodeLink(record, self.news.set)

    @property
    def held(self) -> int:
        return held_tokens([self.link], PROMPT)["unified"]

    async def until(self, condition: Callable[[], bool]) -> None:
        """Looks again and again: the link tells nobody of cache events."""
        async with asyncio.timeout(60):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.02)

    async def ask(self, token_ids: list[int]) -> int:
        """Have a token generated; returns the tokens that were found in the cache."""
        await self.until(lambda: self.link.connected)
        sink = Sink()
        sampling = pb.SamplingParams(max_new_tokens=1, temperature=0.0)

        def start(number: int) -> DecodeCommand:
            return DecodeCommand(start=DecodeStart(sequence_id=number, prompt_ids=token_ids, sampling=sampling))

        number = self.link.start(start, sink)
        async with asyncio.timeout(60):
            cached = await sink.cached
        self.link.forget(number)
        return cached


class Sink:
    """Waits for the end of a sequence."""

    def __init__(self) -> None:
        self.cached: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def on_event(self, event: DecodeEvent) -> None:
        if event.tokens.finish_reason:
            self.cached.set_result(event.tokens.cached_tokens)
        elif event.HasField("failed"):
            self.cached.set_exception(AssertionError(event.failed.message))

    def on_lost(self, error: MeshError) -> None:
        self.cached.set_exception(error)


@pytest.fixture
async def linked(world: OneWorker) -> AsyncIterator[Callable[[str], Any]]:
    links: list[Linked] = []

    def link(address: str) -> Linked:
        links.append(Linked(address))
        return links[-1]

    yield link
    for one in links:
        await one.link.close()


async def test_the_index_follows_a_worker_over_evictions_and_restarts(
    world: OneWorker, linked: Callable[[str], Linked]
) -> None:
    address = world.begin()
    first = linked(address)
    assert await first.ask(PROMPT) == 0
    await first.until(lambda: first.held == 96)
    late = linked(address)
    await late.until(lambda: late.held == 96)
    assert await late.ask(PROMPT[:50]) == 48

    assert await first.ask([7] * 480) == 0  # 30 pages of 32: four of the prompt's six have to go
    await first.until(lambda: first.held == late.held == 32)
    assert len(first.link.prefixes) == PAGES

    assert await first.ask(PROMPT) == 32
    await first.until(lambda: first.held == late.held == 96)
    world["unified"].kill()
    await first.until(lambda: not first.link.connected)
    assert first.held == 0
    world.begin("--port", address.rpartition(":")[2])
    assert await first.ask(PROMPT[:40]) == 0
    await first.until(lambda: first.held == late.held == 32)
    hashes = page_hashes(PROMPT, PAGE)
    assert first.link.prefixes.count(hashes) == 2


async def test_a_worker_without_a_cache_tells_nothing(world: OneWorker, linked: Callable[[str], Linked]) -> None:
    link = linked(world.begin("--disable-radix-cache"))
    for _ in range(3):
        assert await link.ask(PROMPT) == 0
    assert len(link.link.prefixes) == 0
