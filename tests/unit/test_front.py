"""A worker's front and its rank."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from common.errors.base import MeshError, Reason
from common.worker.front import Front
from common.worker.messages import FromRank, RankFailed

pytestmark = pytest.mark.unit


class Talking:
    """A rank that says what a front does not expect of one that runs."""

    async def batches(self) -> AsyncIterator[FromRank]:
        yield FromRank([RankFailed(0, Reason.INTERNAL, "too late for that")])
        await asyncio.Event().wait()


async def test_a_front_that_cannot_go_on_reading_its_rank_ends_its_worker() -> None:
    """It would look sound to everybody, and every stream would hang."""
    front: Front[Any] = Front.__new__(Front)
    front._rank = Talking()  # type: ignore[assignment]
    stop = asyncio.Event()
    await front._read_rank(stop)
    assert stop.is_set()
    assert isinstance(front._failure, MeshError)
    assert front._failure.reason == Reason.INTERNAL
    assert "RankFailed" in front._failure.message
