"""The router's one queue: places, credit, patience, and who comes first."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import pytest

from common.errors.base import MeshError, Reason
from common.mesh.credit import Credit
from pdmesh.v1 import types_pb2
from services.router.admission import MOST_PASSES, Admission
from services.router.credits import CreditAccount
from services.router.passing import Need
from services.router.request import GenerationRequest, Sampling, ServedModel
from services.router.workers import Route

pytestmark = pytest.mark.unit

PAGE, LIMIT = 16, 10


@dataclass
class Decode:
    """A worker of 16 pages, of which ten may be promised, without a stream to it."""

    account: CreditAccount = field(default_factory=CreditAccount)
    worker_id: str = "d"
    pool_tokens: int = 16 * PAGE
    record: types_pb2.Worker = field(
        default_factory=lambda: types_pb2.Worker(
            pool_pages=16,
            kv_layout=types_pb2.KvLayout(page_size=PAGE),
            model=types_pb2.ModelInfo(served_model_name="m"),
        )
    )

    def publish(self, pages: int, sequences: int = 4) -> None:
        self.account.publish(Credit(pages, sequences, LIMIT, 512, PAGE), 1 << 60)


class Pool:
    """What `Admission` asks of a `WorkerPool`."""

    def __init__(self) -> None:
        self.workers = [Decode()]
        self.workers[0].publish(LIMIT)
        self.sends = True  # what has a route is sent to the worker, whose next figure reflects it

    def decodes(self, model: str) -> list[Decode]:
        return self.workers

    def lacking(self, model: str) -> str:
        return "none is there"

    def offers(self, model: str) -> dict[str, Credit | None]:
        return {worker.worker_id: worker.account.credit for worker in self.workers}

    def free_sequences(self) -> float:
        return sum(worker.account.credit.sequences for worker in self.workers if worker.account.credit)

    def route(self, request: GenerationRequest, need: Need, decodes: list[str]) -> Route:
        (worker,) = self.workers
        assert decodes == [worker.worker_id]
        decode: Any = worker
        spend = worker.account.spend(need.tokens, need.remaining)
        if self.sends:
            worker.account.sent(spend, 1)
        return Route(None, decode, spend)


@pytest.fixture
def pool() -> Pool:
    return Pool()


def admission(pool: Any, running: int = 100, queued: int = 3, timeout_s: float = 60.0) -> Admission:
    return Admission(pool, running, queued, timeout_s)


def request(name: str) -> GenerationRequest:
    model = ServedModel("m", "", 1000, 9, 0.0)
    return GenerationRequest(name, "grpc", model, [[1]], Sampling(seed=0), None, 0.0)


def need(pages: int) -> Need:
    return Need("m", pages * PAGE, 1)


async def start(admission: Admission, name: str, pages: int, **more: Any) -> asyncio.Task[Route]:
    task = asyncio.create_task(admission.enter(request(name), need(pages), **more))
    await asyncio.sleep(0)  # it has entered, or waits
    await asyncio.sleep(0)
    return task


def reason(task: asyncio.Task[Route]) -> Reason:
    error = task.exception()
    assert isinstance(error, MeshError)
    return error.reason


async def test_credit_is_spent_and_given_back(pool: Pool) -> None:
    queue, pool.sends = admission(pool), False
    first = await start(queue, "a", 6)
    second = await start(queue, "b", 6)
    assert first.done()
    assert not second.done()
    assert queue.queued == 1
    queue.leave(first.result())
    assert (await second).spend.pages == 6
    assert queue.queued == 0


async def test_the_queue_is_bounded_by_requests_not_by_sequences(pool: Pool) -> None:
    queue = admission(pool, queued=2)
    pool.workers[0].publish(1, 0)
    waiting = [await start(queue, name, 1) for name in ("a", "a", "a", "b", "b")]
    assert queue.queued == 2
    refused = await start(queue, "c", 1)
    assert reason(refused) is Reason.OVERLOADED
    assert not any(task.done() for task in waiting)
    pool.workers[0].publish(LIMIT, 4)
    queue.admit()
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    assert queue.queued == 0, "the fifth sequence waits as part of a request that runs"
    pool.workers[0].publish(LIMIT, 4)
    queue.admit()
    await asyncio.gather(*waiting)


async def test_who_would_have_no_place_is_refused_at_the_door(pool: Pool) -> None:
    queue = admission(pool, queued=2)
    pool.workers[0].publish(LIMIT, 1)
    others = [queue.arrive(name) for name in ("a", "b", "c")]  # one may run, two may wait
    assert others == [False, True, True]
    with pytest.raises(MeshError) as caught:
        queue.arrive("d")
    assert caught.value.reason is Reason.OVERLOADED
    assert caught.value.retry_after_s == 1.0
    queue.depart("a")  # it was wrong
    queue.depart("a")
    queue.arrive("d")
    assert (await start(queue, "b", 1)).done()
    waiting = [await start(queue, name, 1) for name in ("c", "d")]
    assert queue.queued == 2
    with pytest.raises(MeshError):
        queue.arrive("e")
    pool.workers[0].publish(LIMIT, 4)
    queue.admit()
    await asyncio.gather(*waiting)
    queue.arrive("e")


async def test_places_that_may_not_be_used_are_none(pool: Pool) -> None:
    queue = admission(pool, running=1, queued=0)
    queue.arrive("a")
    with pytest.raises(MeshError):
        queue.arrive("b")
    assert (await start(queue, "a", 1)).done()
    with pytest.raises(MeshError):
        queue.arrive("b")
    queue.ended("a")
    queue.arrive("b")


async def test_so_many_requests_run_at_once(pool: Pool) -> None:
    queue = admission(pool, running=1)
    assert (await start(queue, "a", 1)).done()
    assert (await start(queue, "a", 1)).done(), "another sequence of the same request"
    other = await start(queue, "b", 1)
    assert not other.done()
    queue.ended("a")
    await other


async def test_impatience_is_an_overload_with_a_hint(pool: Pool) -> None:
    queue = admission(pool, timeout_s=0.0)
    pool.workers[0].publish(0, 0)
    with pytest.raises(MeshError) as caught:
        await queue.enter(request("a"), need(1))
    assert caught.value.reason is Reason.OVERLOADED
    assert caught.value.retry_after_s == 1.0
    assert queue.queued == 0


async def test_retracted_sequences_come_first_and_are_not_refused(pool: Pool) -> None:
    queue = admission(pool, queued=1, timeout_s=0.0)
    pool.workers[0].publish(0, 0)
    patient = admission(pool, queued=1)
    fresh = await start(patient, "a", 1)
    resumed = await start(patient, "b", 1, resumed=True)
    pool.workers[0].publish(LIMIT, 1)
    patient.admit()
    await resumed
    assert not fresh.done()
    fresh.cancel()
    pool.workers[0].publish(0, 0)
    again = await start(queue, "b", 1, resumed=True)
    pool.workers[0].publish(LIMIT, 1)
    queue.admit()
    await again


async def test_who_leaves_at_the_last_moment_gives_its_credit_back(pool: Pool) -> None:
    queue, pool.sends = admission(pool), False
    pool.workers[0].publish(0, 0)
    task = await start(queue, "a", 1)
    pool.workers[0].publish(LIMIT, 1)
    queue.admit()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert pool.workers[0].account.credit == Credit(LIMIT, 1, LIMIT, 512, PAGE)


async def test_nobody_waits_for_workers_that_are_gone(pool: Pool) -> None:
    queue = admission(pool)
    pool.workers[0].publish(0, 0)
    task = await start(queue, "a", 1)
    pool.workers.clear()
    queue.workers_changed()
    await asyncio.wait([task])
    assert reason(task) is Reason.NO_WORKER
    with pytest.raises(MeshError, match="none is there"):
        await queue.enter(request("b"), need(1))


async def test_what_fits_no_pool_is_refused_and_what_is_above_the_mark_waits_for_all(pool: Pool) -> None:
    queue = admission(pool)
    with pytest.raises(MeshError) as caught:
        await queue.enter(request("a"), Need("m", 100, 200))
    assert caught.value.reason is Reason.CONTEXT_TOO_LONG
    pool.workers[0].publish(LIMIT - 1)
    large = await start(queue, "b", 16)
    assert not large.done()
    pool.workers[0].publish(LIMIT)
    queue.admit()
    await large


async def test_a_large_one_is_passed_so_often_and_no_more(pool: Pool) -> None:
    queue = admission(pool, queued=1000)
    pool.workers[0].publish(2, 1)
    large = await start(queue, "large", 9)
    for number in range(MOST_PASSES):
        assert (await start(queue, str(number), 1)).done()
        pool.workers[0].publish(2, 1)
    small = await start(queue, "small", 1)
    assert not small.done()
    pool.workers[0].publish(LIMIT, 1)
    queue.admit()
    await large
    assert not small.done()
    pool.workers[0].publish(2, 1)
    queue.admit()
    await small
