"""A rank's turns without its loop: bursts of very short steps, and steps that are waited for."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from common.cli.default_model import default_model_path
from common.config.bootstrap import BootstrapAddressConfig
from common.engine.config import EngineConfig
from common.engine.emulated import build_engine
from common.engine.messages import Sampling, Tokens
from common.errors.base import MeshError
from common.worker.config import WorkerConfig
from common.worker.emulated import LocalRank
from common.worker.loop import RankTurns
from common.worker.messages import AbortSequence, FromRank, StartSequence
from services.decode import unified_rank

pytestmark = pytest.mark.unit

NEW_TOKENS = 12


def config(**changes: object) -> EngineConfig:
    given = {"emulated_preset": "zero", "max_total_tokens": 1024, "model_path": str(default_model_path()), **changes}
    return EngineConfig(engine="emulated", **given)  # type: ignore[arg-type]


def start(number: int, **sampling: object) -> StartSequence:
    given = {"max_new_tokens": NEW_TOKENS, "seed": number, **sampling}
    return StartSequence(number, "", None, [1, 2, 3], Sampling(**given))  # type: ignore[arg-type]


def tokens_of(batches: list[FromRank]) -> dict[int, list[Tokens]]:
    told: dict[int, list[Tokens]] = {}
    for batch in batches:
        for message in batch.messages:
            if isinstance(message, Tokens):
                told.setdefault(message.sequence_id, []).append(message)
    return told


def test_a_burst_of_short_steps_is_told_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.worker.loop.BURST_S", 60.0)
    turns = RankTurns(build_engine(config()))
    for number in (1, 2):
        turns._apply(start(number, logprobs=1))
    assert turns._step() is None, "nothing is left"
    batch = turns._take()
    assert batch is not None
    for told in tokens_of([batch]).values():
        (tokens,) = told
        assert (tokens.offset, len(tokens.token_ids), len(tokens.logprobs)) == (0, NEW_TOKENS, NEW_TOKENS)
        assert tokens.finish == "length"
        assert [entry.token_id for entry in tokens.logprobs] == tokens.token_ids


def test_a_step_that_takes_its_time_is_told_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as a burst may last: the next one has to wait for its own telling."""
    monkeypatch.setattr("common.worker.loop.BURST_S", 0.0)
    turns = RankTurns(build_engine(config()))
    turns._apply(start(1))
    batches = []
    while turns._step() is not None:
        batches.append(turns._take())
    batches.append(turns._take())
    told = tokens_of([batch for batch in batches if batch])[1]
    assert [(tokens.offset, len(tokens.token_ids)) for tokens in told] == [(i, 1) for i in range(NEW_TOKENS)]


async def test_a_rank_in_the_front_s_process(tmp_path: Path) -> None:
    profile = tmp_path / "times.toml"
    profile.write_text("[decode]\nbase_s = 0.005\n")
    worker = WorkerConfig(bootstrap=BootstrapAddressConfig(), engine=config(emulated_profile=str(profile)))
    rank = LocalRank(unified_rank.make, worker)
    assert rank.ready.num_pages == 64
    batches: list[FromRank] = []

    async def read() -> None:
        async for batch in rank.batches():
            batches.append(batch)
            if any(isinstance(message, Tokens) and message.finish for message in batch.messages):
                rank.send(AbortSequence(2))
                return

    rank.send(start(1))
    rank.send(start(2, max_new_tokens=500))
    began = asyncio.get_running_loop().time()
    await asyncio.wait_for(read(), 30)
    assert asyncio.get_running_loop().time() - began >= (NEW_TOKENS - 2) * 0.005
    told = tokens_of(batches)
    assert sum(len(tokens.token_ids) for tokens in told[1]) == NEW_TOKENS
    await rank.stop()
    await rank.stop()
    rest = [batch async for batch in rank.batches()]
    assert tokens_of(rest).keys() <= {2}
    rank.send(start(3))  # to one that has ended
    await asyncio.sleep(0)
    assert [batch.load.ledger.in_use for batch in rest if batch.load] in ([], [0])


async def test_a_failure_of_the_rank_is_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    rank = LocalRank(unified_rank.make, WorkerConfig(engine=config()))

    def broken() -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(rank, "_one_turn", broken)
    rank.send(start(1))
    with pytest.raises(MeshError, match="the emulated rank failed"):
        await anext(rank.batches())
    await rank.stop()
