"""The emulated engine: its tokens, its clock, and what it does not need."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from common.cli.default_model import default_model_path
from common.engine.config import EngineConfig
from common.engine.emulated import EmulatedRunner, build_engine
from common.engine.emulated_times import DecodeTimes, PrefillTimes, Times
from common.engine.engine import Engine, StepResult
from common.engine.messages import Sampling, Tokens
from common.engine.request import Sequence
from common.engine.uniform import uniform, uniforms
from common.errors.base import MeshError, Reason
from common.kvcache.allocator import PageAllocator
from common.models.config import read_config

pytestmark = pytest.mark.unit

ADDER = default_model_path()
CONFIG = EngineConfig(engine="emulated", emulated_preset="zero", model_path=str(ADDER), max_total_tokens=2048)
NEW_TOKENS = 20


class Clock:
    """Stands still but for `now`."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def timed_engine(times: Times, clock: Clock, **settings: bool) -> Engine:
    runner = EmulatedRunner(CONFIG, read_config(ADDER), times, clock=clock)
    return Engine(runner, PageAllocator(128), replace(CONFIG, **settings))


def sequence(number: int, length: int = 10, seed: int = 5, **sampling: object) -> Sequence:
    given = {"max_new_tokens": NEW_TOKENS, "seed": seed, **sampling}
    return Sequence(number, list(range(length)), Sampling(**given))  # type: ignore[arg-type]


def finish(engine: Engine) -> dict[int, list[int]]:
    """Step until nothing is left; each sequence's tokens."""
    outputs: dict[int, list[int]] = {}
    while engine.has_work:
        for tokens in engine.step().tokens:
            outputs.setdefault(tokens.sequence_id, []).extend(tokens.token_ids)
    assert engine.allocator.ledger.at_rest
    return outputs


def outputs_of(*sequences: Sequence, config: EngineConfig = CONFIG) -> dict[int, list[int]]:
    engine = build_engine(config)
    for one in sequences:
        engine.add(one)
    return finish(engine)


def test_tokens_depend_on_seed_and_position_alone() -> None:
    alone = outputs_of(sequence(1))[1]
    assert len(alone) == NEW_TOKENS
    together = outputs_of(*(sequence(number, seed=number) for number in range(6, 13)), sequence(1))
    assert together[1] == alone
    assert len({tuple(tokens) for tokens in together.values()}) == len(together)
    later = outputs_of(sequence(1, length=13))[1]
    assert later[: NEW_TOKENS - 3] == alone[3:], "the same positions"


def test_a_sequence_that_goes_on_elsewhere_goes_on_with_the_same_tokens() -> None:
    whole = outputs_of(sequence(1))[1]
    rest = sequence(1, max_new_tokens=NEW_TOKENS - 7)
    rest.prompt_ids += whole[:7]
    assert outputs_of(rest)[1] == whole[7:]


def test_greedy_requests_share_the_engine_s_seed() -> None:
    first, second = (outputs_of(sequence(1, seed=seed, temperature=0.0)) for seed in (1, 2))
    assert first == second
    other = replace(CONFIG, random_seed=1)
    assert outputs_of(sequence(1, temperature=0.0), config=other) != first
    assert build_engine(other).runner.fingerprint != build_engine(CONFIG).runner.fingerprint


def test_output_never_ends_by_itself_but_at_a_stop_token() -> None:
    engine = build_engine(CONFIG)
    long = outputs_of(sequence(1, max_new_tokens=100), config=CONFIG)[1]
    assert len(long) == 100
    assert not set(long) & set(engine.runner.eos_token_ids)
    assert all(0 <= token < engine.runner.vocab_size for token in long)
    at = long.index(long[50]) + 1
    assert len(outputs_of(sequence(1, max_new_tokens=100, stop_token_ids=(long[50],)))[1]) == at
    kept = outputs_of(sequence(1, max_new_tokens=60, min_new_tokens=60, stop_token_ids=(long[50],)))[1]
    assert len(kept) == 60
    assert long[50] not in kept


def test_one_number_is_that_of_many() -> None:
    seeds, positions = [0, 1, 5, 2**63, 2**64 - 1, 2**64, -1], [0, 1, 2, 1000, 2**40, 3, 4]
    assert [uniform(*pair) for pair in zip(seeds, positions, strict=True)] == uniforms(seeds, positions).tolist()


def test_logprobs_are_those_of_a_uniform_distribution() -> None:
    engine = build_engine(CONFIG)
    engine.add(sequence(1, max_new_tokens=1, logprobs=3))
    (tokens,) = engine.step().tokens
    (entry,) = tokens.logprobs
    assert entry.token_id == entry.top[0][0] == tokens.token_ids[0]
    assert len(entry.top) == 3
    assert {round(2.718281828**logprob * engine.runner.vocab_size, 6) for _, logprob in entry.top} == {1.0}


def test_a_step_takes_its_time_and_can_be_asked_meanwhile() -> None:
    clock = Clock()
    times = Times(PrefillTimes(base_s=1.0, per_token_s=0.1), DecodeTimes(base_s=0.25))
    engine = timed_engine(times, clock, enable_mixed_chunk=True)
    engine.add(sequence(1, max_new_tokens=2))
    assert engine.step() == StepResult(scheduled=True, wait_s=pytest.approx(2.0))
    clock.now += 1.5
    engine.add(sequence(2, max_new_tokens=1))
    assert engine.step().wait_s == pytest.approx(0.5)
    clock.now += 0.5
    assert told(engine.step()) == [1]
    assert engine.step().wait_s == pytest.approx(2.0), "the second prompt, and a token of the first, in one pass"
    clock.now += 2.0
    assert told(engine.step()) == [1, 2]
    assert not engine.has_work


def test_a_sequence_that_ends_during_a_step_gets_nothing_of_it() -> None:
    clock = Clock()
    engine = timed_engine(Times(PrefillTimes(base_s=1.0)), clock)
    engine.add(sequence(1))
    engine.add(sequence(2))
    assert engine.step().wait_s == pytest.approx(1.0)
    assert engine.abort(1)
    engine.add(sequence(1))  # another one of that number
    clock.now += 1.0
    assert told(engine.step()) == [2]
    assert engine.abort(1)
    assert engine.abort(2)
    assert engine.allocator.ledger.at_rest


def test_late_waking_does_not_add_up() -> None:
    clock = Clock()
    engine = timed_engine(Times(decode=DecodeTimes(base_s=0.01)), clock)
    engine.add(sequence(1, max_new_tokens=10))
    engine.step()
    start = clock.now
    for number in range(1, 10):
        assert engine.step().wait_s == pytest.approx(start + number * 0.01 - clock.now)
        clock.now = start + number * 0.01 + 0.001  # a millisecond late, each time
        assert told(engine.step()) == [1]


def told(result: StepResult) -> list[int]:
    assert all(isinstance(tokens, Tokens) for tokens in result.tokens)
    return [tokens.sequence_id for tokens in result.tokens]


def test_pool_and_context_are_checked() -> None:
    assert build_engine(CONFIG).allocator.num_pages == 2048 // 16
    by_requests = replace(CONFIG, max_total_tokens=None, max_running_requests=3, context_length=40)
    assert build_engine(by_requests).allocator.num_pages == 3 * 3
    for changes in ({"max_total_tokens": 8}, {"context_length": 10**6}, {"emulated_preset": "no such"}):
        with pytest.raises(MeshError) as caught:
            build_engine(replace(CONFIG, **changes))  # type: ignore[arg-type]
        assert caught.value.reason is Reason.BAD_CONFIG


def test_it_needs_no_weights_and_no_torch(tmp_path: Path) -> None:
    for name in ("config.json", "generation_config.json"):
        (tmp_path / name).write_bytes((ADDER / name).read_bytes())
    program = (
        "import sys; import services.prefill.rank, services.decode.rank, services.decode.unified_rank;"
        "from common.engine.config import EngineConfig; from common.worker.build import build_engine;"
        f"build_engine(EngineConfig(engine='emulated', model_path={str(tmp_path)!r}));"
        "assert not {'torch', 'grpc', 'safetensors', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
