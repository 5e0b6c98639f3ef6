"""The engine on a real, small checkpoint, against transformers' own `generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import pytest
from numpy.typing import NDArray

from common.engine.config import EngineConfig
from common.engine.engine import Engine
from common.engine.messages import Sampling, TokenLogprobs
from common.engine.request import Sequence
from common.kvcache.ledger import PageState
from common.kvcache.pool import allocate_host
from common.worker.rank import build_engine
from tests.checkpoints import Answer, Oracle, make_checkpoint

pytestmark = [pytest.mark.unit, pytest.mark.slow]

NEW_TOKENS = 32
MEMORY: WeakKeyDictionary[Engine, NDArray[np.uint8]] = WeakKeyDictionary()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), "llama")


@pytest.fixture(scope="module")
def answers(checkpoint: Path) -> list[Answer]:
    return Oracle(checkpoint).answers(count=8, longest=150, new_tokens=NEW_TOKENS, seed=1)


def make_engine(checkpoint: Path, **settings: Any) -> Engine:
    settings = {"page_size": 8, "chunked_prefill_size": 50, "max_total_tokens": 4096, **settings}
    memory: list[memoryview] = []

    def allocate(nbytes: int) -> memoryview:
        memory.append(allocate_host(nbytes))
        return memory[0]

    engine = build_engine(EngineConfig(model_path=str(checkpoint), dtype="float32", **settings), allocate)
    MEMORY[engine] = np.frombuffer(memory[0], np.uint8).reshape(engine.allocator.num_pages, -1)
    return engine


def memory_of(engine: Engine) -> NDArray[np.uint8]:
    """The bytes of its pages."""
    return MEMORY[engine]


def made(number: int, prompt_ids: list[int], **sampling: Any) -> Sequence:
    options = {"temperature": 0.0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True, **sampling}
    return Sequence(number, prompt_ids, Sampling(**options))


def run(engine: Engine) -> tuple[dict[int, list[int]], dict[int, list[TokenLogprobs]]]:
    outputs: dict[int, list[int]] = {}
    logprobs: dict[int, list[TokenLogprobs]] = {}
    while engine.has_work:
        result = engine.step()
        assert result.scheduled
        assert not result.failures
        for tokens in result.tokens:
            outputs.setdefault(tokens.sequence_id, []).extend(tokens.token_ids)
            logprobs.setdefault(tokens.sequence_id, []).extend(tokens.logprobs)
    assert engine.is_idle
    assert engine.allocator.ledger.at_rest
    return outputs, logprobs


def expected(answers: list[Answer]) -> dict[int, list[int]]:
    return {number: answer.token_ids for number, answer in enumerate(answers)}


def test_a_batch_gives_what_transformers_gives(checkpoint: Path, answers: list[Answer]) -> None:
    engine = make_engine(checkpoint)
    for number, answer in enumerate(answers):
        engine.add(made(number, answer.prompt_ids, logprobs=2))
    outputs, logprobs = run(engine)
    assert outputs == expected(answers)
    for number, answer in enumerate(answers):
        assert [entry.logprob for entry in logprobs[number]] == pytest.approx(answer.logprobs, abs=1e-4)
        assert all(entry.top[0] == (entry.token_id, entry.logprob) for entry in logprobs[number])


def test_a_pool_too_small_for_the_batch_changes_nothing(checkpoint: Path, answers: list[Answer]) -> None:
    longest = max(len(answer.prompt_ids) for answer in answers) + NEW_TOKENS
    engine = make_engine(checkpoint, max_total_tokens=longest + 40, chunked_prefill_size=33)
    for number, answer in enumerate(answers):
        engine.add(made(number, answer.prompt_ids))
    assert run(engine)[0] == expected(answers)


def test_pages_that_moved_to_another_engine_give_the_same(checkpoint: Path, answers: list[Answer]) -> None:
    source, target = make_engine(checkpoint), make_engine(checkpoint)
    target.allocator.allocate(3)  # so that the pages' numbers differ
    outputs: dict[int, list[int]] = {}
    for number, answer in enumerate(answers):
        sequence = made(number, answer.prompt_ids)
        sequence.prefill_only = True
        source.add(sequence)
        while source.has_work:
            progress = source.step().progress
        first = progress[-1].first
        assert first is not None
        pages = target.allocator.allocate(len(sequence.pages), PageState.RESERVED)
        memory_of(target)[pages] = memory_of(source)[sequence.pages]
        source.release(number)
        adopted = made(number, answer.prompt_ids)
        adopted.pages = pages
        outputs[number] = target.adopt(adopted, first).token_ids
    target.allocator.free([0, 1, 2])
    rest, _ = run(target)
    assert {number: outputs[number] + rest[number] for number in outputs} == expected(answers)
    assert source.allocator.ledger.at_rest


def test_sampled_output_is_the_same_alone_and_in_a_batch(checkpoint: Path, answers: list[Answer]) -> None:
    options = {"temperature": 0.9, "top_p": 0.95, "presence_penalty": 0.2}
    engine = make_engine(checkpoint)
    for number, answer in enumerate(answers):
        engine.add(made(number, answer.prompt_ids, seed=number, **options))
    together, _ = run(engine)
    for number, answer in enumerate(answers):
        engine.add(made(number, answer.prompt_ids, seed=number, **options))
        assert run(engine)[0] == {number: together[number]}
