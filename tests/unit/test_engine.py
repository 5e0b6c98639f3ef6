"""The engine on a toy model whose output tells whether every page held what it should."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from common.engine.engine import Engine, Progress, StepResult
from common.engine.messages import Sampling, TokenLogprobs, Tokens
from common.engine.request import Sequence, Status
from common.errors.base import MeshError, Reason
from common.kvcache.ledger import PageState
from tests.toys import EOS, VOCAB_SIZE, ToyRunner, greedy, toy_engine, toy_logits

pytestmark = pytest.mark.unit


def sequence(number: int, prompt: list[int], *, prefill_only: bool = False, **sampling: Any) -> Sequence:
    defaults: dict[str, Any] = {"temperature": 0.0, "max_new_tokens": 8, "ignore_eos": True}
    return Sequence(number, prompt, Sampling(**{**defaults, **sampling}), prefill_only=prefill_only)


def prompt(number: int, length: int) -> list[int]:
    return random.Random(number).choices(range(VOCAB_SIZE), k=length)


def run(engine: Engine) -> tuple[dict[int, list[int]], dict[int, str]]:
    """Step until nothing is left; tokens and finish of each sequence."""
    outputs: dict[int, list[int]] = {}
    finishes: dict[int, str] = {}
    while engine.has_work:
        result = engine.step()
        assert result.scheduled
        for tokens in result.tokens:
            output = outputs.setdefault(tokens.sequence_id, [])
            assert tokens.sequence_id not in finishes
            output += tokens.token_ids
            if tokens.finish:
                finishes[tokens.sequence_id] = tokens.finish
        for failure in result.failures:
            finishes[failure.sequence_id] = failure.reason
    return outputs, finishes


def prefill(engine: Engine, made: Sequence) -> list[Progress]:
    engine.add(made)
    progress: list[Progress] = []
    while engine.has_work:
        progress += engine.step().progress
    return progress


def hand_over(source: Engine, made: Sequence, target: Engine, number: int) -> Tokens:
    """Prefill on one engine, copy its pages, adopt on the other."""
    assert isinstance(source.runner, ToyRunner)
    assert isinstance(target.runner, ToyRunner)
    progress = prefill(source, made)
    first = progress[-1].first
    assert first is not None
    pages = target.allocator.allocate(len(made.pages), PageState.RESERVED)
    target.runner.slots[pages] = source.runner.slots[made.pages]
    source.release(made.sequence_id)
    output_ids = made.output_ids[:-1]  # all but what prefill sampled
    return target.adopt(Sequence(number, made.prompt_ids, made.sampling, output_ids=output_ids, pages=pages), first)


def at_rest(engine: Engine) -> bool:
    return engine.allocator.ledger.at_rest and engine.is_idle and not engine.has_work


@pytest.mark.parametrize("chunk", [1, 5, 16, 2048])
@pytest.mark.parametrize("num_pages", [34, 64, 1000])
def test_batches_chunks_and_small_pools_change_nothing(chunk: int, num_pages: int) -> None:
    engine = toy_engine(num_pages, chunked_prefill_size=chunk, max_running_requests=6)
    prompts = {number: prompt(number, 1 + 7 * number % 60) for number in range(20)}
    for number, ids in prompts.items():
        engine.add(sequence(number, ids, max_new_tokens=40))
    outputs, finishes = run(engine)
    assert outputs == {number: greedy(ids, 40) for number, ids in prompts.items()}
    assert set(finishes.values()) == {"length"}
    assert at_rest(engine)


def test_sampled_output_survives_retraction() -> None:
    results = []
    for num_pages in (24, 1000):
        engine = toy_engine(num_pages, max_running_requests=8)
        for number in range(8):
            options = {"temperature": 1.0, "seed": number, "frequency_penalty": 0.3, "logprobs": 2}
            engine.add(sequence(number, prompt(number, 12), max_new_tokens=50, **options))
        results.append(run(engine)[0])
        assert isinstance(engine.runner, ToyRunner)
        starts = sum(chunk.start == 0 for step in engine.runner.steps for chunk in step)
        assert (starts > 8) is (num_pages == 24)
    assert results[0] == results[1]
    assert {len(output) for output in results[0].values()} == {50}


def test_a_hand_over_gives_what_unified_gives() -> None:
    source, target, unified = toy_engine(chunked_prefill_size=10), toy_engine(), toy_engine()
    outputs: dict[int, list[int]] = {}
    for number in range(6):
        options = {"temperature": 0.8, "seed": number, "top_k": 20, "max_new_tokens": 12}
        ids = prompt(number, 5 + 6 * number)
        unified.add(sequence(number, ids, **options))
        made = sequence(100 + number, ids, prefill_only=True, **options)
        outputs[number] = hand_over(source, made, target, number).token_ids
    while target.has_work:
        for tokens in target.step().tokens:
            assert tokens.offset == len(outputs[tokens.sequence_id])
            outputs[tokens.sequence_id] += tokens.token_ids
    assert outputs == run(unified)[0]
    assert at_rest(source)
    assert at_rest(target)


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": 1.0, "frequency_penalty": 0.4}])
def test_a_retracted_adopted_sequence_leaves_and_goes_on_elsewhere(options: dict[str, float]) -> None:
    source, target, unified = toy_engine(), toy_engine(num_pages=12), toy_engine()
    outputs: dict[int, list[int]] = {}
    for number in range(2):
        wanted = {"seed": number, "max_new_tokens": 30, **options}
        unified.add(sequence(number, prompt(number, 14), **wanted))
        made = sequence(number, prompt(number, 14), prefill_only=True, **wanted)
        outputs[number] = hand_over(source, made, target, number).token_ids
    left: list[Sequence] = []
    while target.has_work:
        result = target.step()
        left += result.retracted
        for tokens in result.tokens:
            outputs[tokens.sequence_id] += tokens.token_ids
    (young,) = left
    assert (young.sequence_id, target.retracted) == (1, 1)
    assert at_rest(target)
    again = sequence(1, prompt(1, 14), prefill_only=True, seed=1, max_new_tokens=30, **options)
    again.output_ids = list(outputs[1])
    first = hand_over(source, again, target, 1)
    assert first.offset == len(outputs[1])
    outputs[1] += first.token_ids
    while target.has_work:
        for tokens in target.step().tokens:
            assert tokens.offset == len(outputs[1])
            outputs[1] += tokens.token_ids
    assert outputs == run(unified)[0]


def test_prefill_tells_every_chunk_and_then_holds_its_pages() -> None:
    engine = toy_engine(chunked_prefill_size=8)
    made = sequence(3, prompt(3, 19), prefill_only=True, logprobs=1)
    progress = prefill(engine, made)
    assert [(entry.computed, entry.first is None) for entry in progress] == [(8, True), (16, True), (19, False)]
    first = progress[-1].first
    assert first is not None
    assert first.token_ids == greedy(made.prompt_ids, 1)
    assert len(first.logprobs) == 1
    assert made.status is Status.HELD
    pages = engine.load().ledger
    assert (pages.in_use, pages.cached) == (1, 4), "the full ones are the prefix cache's"
    engine.release(3)
    assert at_rest(engine)


@pytest.mark.parametrize("adopted", [False, True])
@pytest.mark.parametrize(
    ("options", "count", "finish"),
    [
        ({"max_new_tokens": 1}, 1, "length"),
        ({"ignore_eos": False, "max_new_tokens": 50}, 1, "stop"),
        ({"ignore_eos": True, "max_new_tokens": 5}, 5, "length"),
        ({"ignore_eos": False, "min_new_tokens": 3, "max_new_tokens": 4}, 4, "length"),
        ({"stop_token_ids": (EOS,), "max_new_tokens": 4}, 1, "stop"),
        ({"max_new_tokens": 10_000}, 250, "length"),
    ],
)
def test_a_sequence_ends_where_it_should(adopted: bool, options: dict[str, Any], count: int, finish: str) -> None:
    ids = next(ids for a in range(100) for b in range(100) if greedy(ids := [a, b, 1, 2, 3, 4], 1) == [EOS])
    engine = toy_engine()
    if adopted:
        first = hand_over(toy_engine(), sequence(1, ids, prefill_only=True, **options), engine, 1)
        assert engine.has_work is not bool(first.finish)
    else:
        engine.add(sequence(1, ids, **options))
        first = engine.step().tokens[0]
    outputs, finishes = run(engine)
    assert len(first.token_ids + outputs.get(1, [])) == count
    assert finishes.get(1, first.finish) == finish
    assert at_rest(engine)


@pytest.mark.parametrize(
    ("ids", "options", "reason"),
    [
        ([], {}, Reason.EMPTY_PROMPT),
        ([1, VOCAB_SIZE], {}, Reason.TOKEN_OUT_OF_RANGE),
        ([-1], {}, Reason.TOKEN_OUT_OF_RANGE),
        ([1] * 256, {}, Reason.CONTEXT_TOO_LONG),
        ([1] * 40, {"max_new_tokens": 26}, Reason.OVERLOADED),
    ],
)
def test_what_can_never_run_is_refused(ids: list[int], options: dict[str, Any], reason: Reason) -> None:
    engine = toy_engine(num_pages=16)
    with pytest.raises(MeshError) as refusal:
        engine.add(sequence(1, ids, **options))
    assert refusal.value.reason is reason
    assert at_rest(engine)


def test_a_pool_is_used_to_its_last_slot() -> None:
    engine = toy_engine(num_pages=16)
    engine.add(sequence(1, prompt(1, 40), max_new_tokens=25))
    assert run(engine)[0] == {1: greedy(prompt(1, 40), 25)}


def test_an_id_is_used_once() -> None:
    engine = toy_engine()
    engine.add(sequence(1, [1]))
    with pytest.raises(ValueError, match="exists"):
        engine.add(sequence(1, [1]))


def test_abort_frees_pages_in_every_state() -> None:
    engine = toy_engine(max_running_requests=2, chunked_prefill_size=8)
    for number, length in enumerate((4, 30, 4)):
        engine.add(sequence(number, prompt(number, length), max_new_tokens=100))
    engine.step()
    states = [found.status for number in range(3) if (found := engine.find(number))]
    assert states == [Status.RUNNING, Status.RUNNING, Status.WAITING]
    assert [engine.abort(number) for number in (2, 1, 0, 0, 9)] == [True, True, True, False, False]
    assert at_rest(engine)


def test_an_aborted_hand_over_is_quarantined_until_it_is_released() -> None:
    engine = toy_engine(chunked_prefill_size=8)
    engine.add(sequence(1, prompt(1, 30), prefill_only=True))
    engine.step()
    assert engine.abort(1, quarantine=True)
    assert engine.abort(1, quarantine=True)
    assert not engine.has_work
    assert engine.load().ledger.quarantined == 6
    assert engine.allocator.num_available == 64 - 8, "what its writes may still read is not evicted"
    engine.release(1)
    assert at_rest(engine)


def test_only_what_is_held_is_released() -> None:
    engine = toy_engine()
    engine.add(sequence(1, [1]))
    for number in (1, 2):
        with pytest.raises(KeyError):
            engine.release(number)


def test_a_failing_step_fails_its_sequences_and_no_others() -> None:
    engine = toy_engine(max_running_requests=2)
    assert isinstance(engine.runner, ToyRunner)
    engine.runner.fail_at = {3}
    for number in range(3):
        engine.add(sequence(number, prompt(number, 6), prefill_only=number == 9))
    outputs, finishes = run(engine)
    assert finishes == {0: Reason.ENGINE_FAILED, 1: Reason.ENGINE_FAILED, 2: "length"}
    assert outputs[2] == greedy(prompt(2, 6), 8)
    assert at_rest(engine)


def test_pages_of_a_failed_hand_over_are_quarantined() -> None:
    engine = toy_engine(chunked_prefill_size=8)
    assert isinstance(engine.runner, ToyRunner)
    engine.runner.fail_at = {2}
    engine.add(sequence(1, prompt(1, 30), prefill_only=True))
    engine.step()
    assert [failure.sequence_id for failure in engine.step().failures] == [1]
    assert engine.load().ledger.quarantined == 6
    engine.release(1)
    assert at_rest(engine)
    assert engine.load().ledger.cached == 0, "nothing of it is shared"


def test_logits_that_are_not_finite_fail_one_sequence() -> None:
    engine = toy_engine()
    assert isinstance(engine.runner, ToyRunner)
    engine.runner.broken = {42}
    engine.add(sequence(1, [42, 1]))
    engine.add(sequence(2, [43, 1]))
    outputs, finishes = run(engine)
    assert finishes == {1: Reason.ENGINE_FAILED, 2: "length"}
    assert outputs[2] == greedy([43, 1], 8)
    assert at_rest(engine)


def test_nothing_runs_while_pages_are_missing() -> None:
    engine = toy_engine(num_pages=8)
    reserved = engine.allocator.allocate(6, PageState.RESERVED)
    engine.add(sequence(1, prompt(1, 20), max_new_tokens=4))
    assert engine.step() == StepResult()
    assert engine.grantable_pages() == 0
    engine.allocator.free(reserved, PageState.RESERVED)
    assert run(engine)[0] == {1: greedy(prompt(1, 20), 4)}


def test_grants_leave_what_running_sequences_will_need() -> None:
    engine = toy_engine(num_pages=10)
    assert engine.grantable_pages() == 10
    engine.add(sequence(1, prompt(1, 8)))
    engine.step()
    assert engine.grantable_pages() == 7


def test_load_counts_sequences_and_pages() -> None:
    engine = toy_engine(num_pages=10, max_running_requests=1)
    engine.add(sequence(1, prompt(1, 8)))
    engine.add(sequence(2, prompt(2, 5)))
    engine.step()
    load = engine.load()
    assert (load.running, load.waiting, load.waiting_tokens) == (1, 1, 5)
    assert (load.ledger.free, load.ledger.cached) == (8, 2)


def test_log_probabilities_come_with_their_tokens() -> None:
    engine = toy_engine()
    engine.add(sequence(1, [5, 6], max_new_tokens=2, logprobs=0))
    entries: list[TokenLogprobs] = []
    while engine.has_work:
        entries += engine.step().tokens[0].logprobs
    ids = [5, 6]
    for entry, token in zip(entries, greedy(ids, 2), strict=True):
        logits = toy_logits(ids)
        assert entry.token_id == token
        assert entry.logprob == pytest.approx(logits[token] - np.log(np.exp(logits).sum()), abs=1e-4)
        ids.append(token)
