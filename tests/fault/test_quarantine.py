"""A writer that stops in the middle of a write and goes on after its room was given up harms nobody.

Two real prefill ranks, processes of their own, write into a decode rank in this process; bootstrap's part is played
by handing messages over. The control frees the pages of a failed room at once: then the same writer destroys what
other sequences have there, and their output changes.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from common.engine.config import EngineConfig
from common.engine.engine import Engine
from common.engine.messages import Sampling, Tokens
from common.kvcache.audit import Auditor
from common.kvcache.ledger import PageState
from common.mesh.ticket import Ticket
from common.transfer.base import TransferConfig
from common.transfer.registry import create
from common.worker.config import WorkerConfig
from common.worker.messages import (
    Prefilled,
    Registered,
    RoomEnded,
    RoomFenced,
    RoomQuiet,
    RoomReleased,
    RoomReserved,
    RoomTransferred,
    RoomTransferring,
    StartSequence,
)
from common.worker.rank import build_engine
from common.worker.ranks import RankProcess
from common.worker.waker import Waker
from services.decode.handover import DecodeHandover, Incoming
from tests.checkpoints import Answer, Oracle, make_checkpoint

pytestmark = [pytest.mark.fault, pytest.mark.slow, pytest.mark.flaky(reruns=0)]

PAGE, PAGES = 16, 128
LONG = 100 * PAGE  # the prompt of the writer that stops
NEW_TOKENS, SEQUENCES = 24, 8
GREEDY = Sampling(max_new_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)
PATIENCE_S = 120.0
EPOCH = 5


class FreesAtOnce(DecodeHandover):
    """The control: pages of a failed room are used again although their writer has not said that it is quiet."""

    def _end(self, room: Incoming) -> None:
        super()._end(room)
        if room.pages:
            self._free(room)


class Writer:
    """A prefill worker's rank as a process of its own, and all that it said."""

    def __init__(self, rank: RankProcess) -> None:
        self.rank = rank
        self.said: list[Any] = []
        self.news = asyncio.Event()
        self.reading = asyncio.create_task(self.read())

    async def read(self) -> None:
        async for batch in self.rank.batches():
            self.said += batch.messages
            self.news.set()

    async def has_said(self, kind: type, count: int = 1) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while sum(isinstance(message, kind) for message in self.said) < count:
                self.news.clear()
                await self.news.wait()

    def stop(self) -> None:
        """SIGSTOP, in force when this returns."""
        os.kill(self.rank.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self.rank.pid, os.WSTOPPED | os.WNOWAIT)

    def go_on(self) -> None:
        os.kill(self.rank.pid, signal.SIGCONT)


@asynccontextmanager
async def writer(config: EngineConfig) -> AsyncIterator[Writer]:
    encoded = msgspec.msgpack.encode(WorkerConfig(engine=config))
    rank = await RankProcess.spawn("services.prefill.rank", encoded, cpu_threads=1)
    try:
        made = Writer(rank)
        rank.send(Registered(EPOCH))
        yield made
    finally:
        await rank.kill()
        await made.reading


class Decode:
    """A decode rank without its loop."""

    def __init__(self, config: EngineConfig, kind: type[DecodeHandover]) -> None:
        self.waker = Waker()
        self.backend = create("local", TransferConfig(), self.waker.wake)
        self.memory = memoryview(b"")
        self.engine: Engine = build_engine(config, self.allocate)
        self.said: list[Any] = []
        self.handover = kind(self.engine, self.backend, self.said.append)
        self.auditor = Auditor(self.engine.allocator.ledger)

    def allocate(self, nbytes: int) -> memoryview:
        self.memory = self.backend.allocate(nbytes)
        return self.memory

    def close(self) -> None:
        self.handover.close()
        self.waker.close()

    def take(self, kind: type) -> list[Any]:
        """Messages of a kind, out of what was said."""
        taken = [message for message in self.said if isinstance(message, kind)]
        self.said[:] = [message for message in self.said if not isinstance(message, kind)]
        return taken

    def page(self, number: int) -> bytes:
        nbytes = self.engine.runner.layout.page_bytes
        return bytes(self.memory[number * nbytes : (number + 1) * nbytes])

    def in_quarantine(self) -> int:
        return self.engine.allocator.ledger.count(PageState.QUARANTINED)

    def audit(self) -> None:
        audit = self.auditor.run([*self.engine.claims(), *self.handover.claims()])
        assert (audit.leaked_pages, audit.disputed_pages) == (0, 0)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110  memory that another process writes tells nobody
            await asyncio.sleep(0.001)


class Scene:
    """A writer that is about to be stopped, one that stays healthy, and decode."""

    def __init__(self, stopped: Writer, healthy: Writer, decode: Decode, answers: list[Answer]) -> None:
        self.stopped, self.healthy, self.decode, self.answers = stopped, healthy, decode, answers
        self.long = Ticket("long", 1, EPOCH)
        self.granted: list[int] = []
        self.arrived = 0

    async def stop_in_the_middle(self) -> None:
        draw = random.Random(3)
        prompt = [draw.randrange(2, 500) for _ in range(LONG)]
        start = StartSequence(1000, "long", self.long, prompt, GREEDY)
        self.decode.handover.start(start)
        (reserved,) = self.decode.take(RoomReserved)
        self.granted = [page for first, count in reserved.ranks[0].extents for page in range(first, first + count)]
        self.stopped.rank.send(start)
        self.stopped.rank.send(reserved)
        await self.stopped.has_said(RoomTransferring)
        await until(lambda: any(self.decode.page(self.granted[4])))
        self.stopped.stop()
        assert not any(self.decode.page(self.granted[len(self.granted) // 2])), "it has not come to the middle"

    def end(self) -> RoomEnded:
        ended = RoomEnded(self.long, "ABORTED", "the client left")
        self.decode.handover.on_message(ended)
        return ended

    async def fill_up(self) -> None:
        """Start the new requests; all that decode takes have arrived when this returns."""
        for number, answer in enumerate(self.answers):
            start = StartSequence(
                number, f"request-{number}", Ticket(f"room-{number}", 1, EPOCH), answer.prompt_ids, GREEDY
            )
            self.decode.handover.start(start)
            self.healthy.rank.send(start)
        granted = self.relay()
        await until(lambda: self.poll() >= granted)

    def relay(self) -> int:
        reserved = self.decode.take(RoomReserved)
        for message in reserved:
            self.healthy.rank.send(message)
        return len(reserved)

    def poll(self) -> int:
        self.decode.handover.poll()
        self.relay()
        self.arrived += len(self.decode.take(RoomTransferred))
        return self.arrived

    async def outputs(self) -> list[list[int]]:
        """Let decode run until all new requests have finished."""
        joined: list[list[int]] = [[] for _ in self.answers]
        finished = 0

        def turn() -> bool:
            nonlocal finished
            self.poll()
            if self.decode.engine.has_work:
                result = self.decode.engine.step()
                self.decode.said += result.tokens
                self.decode.handover.on_step(result)
            self.decode.audit()
            for tokens in self.decode.take(Tokens):
                joined[tokens.sequence_id] += tokens.token_ids
                finished += bool(tokens.finish)
            return finished == len(joined)

        await until(turn)
        return joined


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Answer]]:
    folder = make_checkpoint(tmp_path_factory.mktemp("model") / "llama", "llama", seed=12)
    draw = random.Random(12)
    oracle = Oracle(folder)
    prompts = [[draw.randrange(2, 500) for _ in range(draw.randint(150, 200))] for _ in range(SEQUENCES)]
    return folder, [oracle.answer(prompt, NEW_TOKENS) for prompt in prompts]


@asynccontextmanager
async def scene(model: tuple[Path, list[Answer]], kind: type[DecodeHandover]) -> AsyncIterator[Scene]:
    config = EngineConfig(
        model_path=str(model[0]),
        dtype="float32",
        device="cpu",
        page_size=PAGE,
        max_total_tokens=PAGES * PAGE,
        num_reserved_decode_tokens=NEW_TOKENS,
        decode_prealloc_high_water=1.0,
    )
    async with AsyncExitStack() as stack:
        slow = await stack.enter_async_context(writer(replace(config, chunked_prefill_size=PAGE)))
        healthy = await stack.enter_async_context(writer(config))
        decode = Decode(config, kind)
        stack.callback(decode.close)
        yield Scene(slow, healthy, decode, model[1])


@pytest.mark.parametrize("news", ["waits", "comes late"])
async def test_a_writer_that_goes_on_changes_nobodys_output(model: tuple[Path, list[Answer]], news: str) -> None:
    async with scene(model, DecodeHandover) as it:
        await it.stop_in_the_middle()
        ended = it.end()
        assert it.decode.in_quarantine() == len(it.granted)
        await it.fill_up()
        assert 0 < it.arrived < SEQUENCES, "the others find no pages"
        if news == "waits":
            it.stopped.rank.send(ended)
            it.stopped.go_on()
        else:  # it learns of the end only when it has written everything
            it.stopped.go_on()
            await it.stopped.has_said(Prefilled)
            assert any(it.decode.page(it.granted[-1])), "it did go on to write"
            it.stopped.rank.send(ended)
        await it.stopped.has_said(RoomQuiet)
        assert it.decode.in_quarantine() == len(it.granted), "decode waits for bootstrap's word"
        it.decode.handover.on_message(RoomReleased(it.long))
        assert it.decode.in_quarantine() == 0
        assert await it.outputs() == [answer.token_ids for answer in it.answers]
        assert it.decode.engine.allocator.ledger.at_rest
        assert it.decode.handover.stale_notices == (news == "comes late")


async def test_a_lost_writer_is_waited_for_until_its_process_has_ended(model: tuple[Path, list[Answer]]) -> None:
    """Bootstrap has not heard of the writer for long and says so: that alone frees nothing."""
    async with scene(model, DecodeHandover) as it:
        await it.stop_in_the_middle()
        it.end()
        it.decode.handover.on_message(RoomReleased(it.long, (it.stopped.rank.ready.descriptor,), EPOCH))
        await it.fill_up()
        for _ in range(100):
            it.poll()
        assert it.decode.in_quarantine() == len(it.granted), "it is stopped, not gone"
        it.stopped.go_on()
        await it.stopped.has_said(Prefilled)
        assert it.decode.in_quarantine() == len(it.granted)
        await it.stopped.rank.kill()
        assert await it.outputs() == [answer.token_ids for answer in it.answers]
        assert it.decode.take(RoomFenced) == [RoomFenced(it.long)]
        assert it.decode.engine.allocator.ledger.at_rest


async def test_control_pages_that_are_freed_at_once_are_overwritten(model: tuple[Path, list[Answer]]) -> None:
    async with scene(model, FreesAtOnce) as it:
        await it.stop_in_the_middle()
        it.end()
        assert it.decode.in_quarantine() == 0
        await it.fill_up()
        assert it.arrived == SEQUENCES, "all find pages: those of the room that failed"
        it.stopped.go_on()
        await it.stopped.has_said(Prefilled)
        outputs = await it.outputs()
        assert outputs != [answer.token_ids for answer in it.answers]
