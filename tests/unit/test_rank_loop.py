"""A rank as a real process: start, messages both ways, end, death."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import pytest

from common.engine.messages import Load, Sampling, SequenceFailed, Tokens
from common.errors.base import MeshError, Reason
from common.mesh.ticket import Ticket
from common.worker.messages import AbortSequence, FromRank, RoomEnded, StartSequence
from common.worker.ranks import RankProcess, rank_environment
from tests.toys import greedy

pytestmark = pytest.mark.mesh

ENDLESS = Sampling(temperature=0.0, max_new_tokens=200, ignore_eos=True)
SHORT = Sampling(temperature=0.0, max_new_tokens=8, ignore_eos=True)


async def spawn(**config: Any) -> RankProcess:
    return await RankProcess.spawn("tests.toy_rank", msgspec.msgpack.encode(config), cpu_threads=1)


@pytest.fixture
async def rank() -> AsyncIterator[RankProcess]:
    process = await spawn()
    yield process
    await process.kill()


class Reader:
    """Collects what a rank says and waits for a condition on it."""

    def __init__(self, rank: RankProcess) -> None:
        self.tokens: dict[int, list[int]] = {}
        self.ends: dict[int, str] = {}
        self.load: Load | None = None
        self._batches = rank.batches()

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._take(await anext(self._batches))

    def at_rest(self) -> bool:
        """Whether all pages are free or cached, as it told last."""
        return self.load is not None and self.load.ledger.free + self.load.ledger.cached == 64

    def _take(self, batch: FromRank) -> None:
        self.load = batch.load or self.load
        for message in batch.messages:
            if isinstance(message, Tokens):
                self.tokens.setdefault(message.sequence_id, []).extend(message.token_ids)
                end = message.finish
            elif isinstance(message, SequenceFailed):
                end = message.reason
            else:
                continue
            if end:
                assert message.sequence_id not in self.ends
                self.ends[message.sequence_id] = end


def start(number: int, prompt: list[int], sampling: Sampling = SHORT, ticket: Ticket | None = None) -> StartSequence:
    return StartSequence(number, f"request-{number}", ticket, prompt, sampling)


async def test_sequences_run_and_leave_nothing_behind(rank: RankProcess) -> None:
    assert rank.ready.vocab_size == 300
    reader = Reader(rank)
    for number in range(5):
        rank.send(start(number, [number, 1, 2]))
    await reader.until(lambda: len(reader.ends) == 5)
    assert reader.tokens == {number: greedy([number, 1, 2], 8) for number in range(5)}
    await reader.until(reader.at_rest)
    rank.send(start(9, [9]))  # after the loop has slept
    await reader.until(lambda: 9 in reader.ends)


async def test_every_sequence_gets_one_end(rank: RankProcess) -> None:
    reader = Reader(rank)
    rank.send(start(1, [1], ENDLESS))
    rank.send(start(2, []))
    rank.send(start(3, [1], ticket=Ticket("room", 1, 1)))
    rank.send(AbortSequence(77))
    rank.send(RoomEnded(Ticket("room", 1, 1), "ABORTED", ""))
    await reader.until(lambda: len(reader.tokens.get(1, ())) > 3 and len(reader.ends) == 2)
    rank.send(AbortSequence(1))
    await reader.until(lambda: 1 in reader.ends)
    assert reader.ends == {1: "abort", 2: Reason.EMPTY_PROMPT, 3: Reason.UNSUPPORTED}
    await reader.until(reader.at_rest)


async def test_stop_ends_the_process_and_the_batches() -> None:
    rank = await spawn()
    reader = Reader(rank)
    rank.send(start(1, [1], ENDLESS))
    await reader.until(lambda: 1 in reader.tokens)
    await rank.stop()
    with pytest.raises(StopAsyncIteration):
        await reader.until(lambda: False)
    assert rank._process.returncode == 0
    rank.send(AbortSequence(1))
    await rank.stop()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, "exited with status 0"), (signal.SIGKILL, "signal 9")])
async def test_a_death_is_told(rank: RankProcess, number: signal.Signals, code: str) -> None:
    os.kill(rank.pid, signal.SIGINT)  # ignored
    os.kill(rank.pid, number)
    with pytest.raises(MeshError, match=code) as loss:
        await Reader(rank).until(lambda: False)
    assert loss.value.reason is Reason.WORKER_LOST


async def test_a_stopped_process_is_killed() -> None:
    rank = await spawn()
    os.kill(rank.pid, signal.SIGSTOP)
    await rank.stop(timeout_s=0.05)
    assert rank._process.returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("config", "reason", "message"),
    [
        ({"refuse": True}, Reason.BAD_CHECKPOINT, "no such folder"),
        ({"bug": True}, Reason.INTERNAL, "ZeroDivisionError: a bug"),
    ],
)
async def test_a_rank_that_cannot_start_says_why(config: dict[str, Any], reason: Reason, message: str) -> None:
    with pytest.raises(MeshError, match=message) as failure:
        await spawn(**config)
    assert failure.value.reason is reason


async def test_a_module_that_is_not_there_is_told() -> None:
    with pytest.raises(MeshError, match="exited with status 1") as failure:
        await RankProcess.spawn("tests.no_such_rank", msgspec.msgpack.encode({}))
    assert failure.value.reason is Reason.WORKER_LOST


async def test_a_start_that_is_cancelled_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(spawn(), 0.05)
        assert os.listdir(folder) == []


FRONT = """
import asyncio, sys
from common.worker.ranks import RankProcess
async def main():
    rank = await RankProcess.spawn("tests.toy_rank", b"\\x80", cpu_threads=1)
    print(rank.pid, flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


async def test_a_rank_dies_with_its_front() -> None:
    front = await asyncio.create_subprocess_exec(sys.executable, "-c", FRONT, stdout=asyncio.subprocess.PIPE)
    assert front.stdout is not None
    pid = int(await front.stdout.readline())
    rank = os.pidfd_open(pid)
    try:
        front.kill()
        await front.wait()
        gone = asyncio.Event()
        asyncio.get_running_loop().add_reader(rank, gone.set)
        await asyncio.wait_for(gone.wait(), 10)
    finally:
        asyncio.get_running_loop().remove_reader(rank)
        os.close(rank)


def test_threads_are_given_or_shared() -> None:
    cores = len(os.sched_getaffinity(0))
    assert rank_environment(3, environ={"OMP_NUM_THREADS": "9", "A": "b"})["OMP_NUM_THREADS"] == "3"
    policy = {"OMP_NUM_THREADS": "9", "OMP_WAIT_POLICY": "active"}
    assert rank_environment(None, environ=policy) == policy
    assert rank_environment(None, environ={})["GOMP_SPINCOUNT"] == "5000"
    assert rank_environment(None, environ={"GOMP_SPINCOUNT": "7"})["GOMP_SPINCOUNT"] == "7"
    assert rank_environment(None, environ={})["OMP_NUM_THREADS"] == str(cores)
    assert rank_environment(None, sharing=1000, environ={})["OPENBLAS_NUM_THREADS"] == "1"
