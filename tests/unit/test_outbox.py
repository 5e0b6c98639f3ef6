"""What waits to be sent: batches, order, and news that may wait for company."""

from __future__ import annotations

import asyncio

import pytest

from common.errors.base import MeshError
from common.mesh import outbox as module
from common.mesh.outbox import Outbox

pytestmark = pytest.mark.unit


async def next_batch(outbox: Outbox[int]) -> list[int]:
    return await asyncio.wait_for(anext(aiter(outbox.batches())), 30)


async def test_what_one_turn_queues_leaves_in_one_batch() -> None:
    outbox = Outbox[int]()
    outbox.put(1)
    outbox.put(2)
    assert await next_batch(outbox) == [1, 2]
    assert not len(outbox)


async def test_news_at_leisure_leaves_with_the_next_batch_in_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEISURE_S", 3600.0)
    outbox = Outbox[int]()
    outbox.put_at_leisure(1)
    reader = asyncio.create_task(next_batch(outbox))
    await asyncio.sleep(0)
    assert not reader.done()
    outbox.put(2)
    outbox.put_at_leisure(3)
    assert await reader == [1, 2, 3]
    outbox.close()


async def test_news_at_leisure_leaves_by_itself() -> None:
    outbox = Outbox[int]()
    for number in (1, 2):
        outbox.put_at_leisure(number)
        assert await next_batch(outbox) == [number]


async def test_a_close_lets_go_what_is_queued() -> None:
    outbox = Outbox[int]()
    outbox.put_at_leisure(1)
    outbox.close()
    outbox.put(2)
    outbox.put_at_leisure(3)
    assert [batch async for batch in outbox.batches()] == [[1]]


async def test_an_error_comes_after_what_is_queued() -> None:
    outbox = Outbox[int]()
    outbox.put(1)
    outbox.close(ValueError("broken"))
    outbox.close()
    batches = outbox.batches()
    assert await anext(batches) == [1]
    with pytest.raises(ValueError, match="broken"):
        await anext(batches)


async def test_a_reader_that_stalls_ends_its_stream() -> None:
    outbox = Outbox[int](limit=2)
    outbox.put(1)
    outbox.put_at_leisure(2)
    with pytest.raises(MeshError, match="2 events wait"):
        await next_batch(outbox)
