"""The engine with its prefix cache, on a toy model whose output tells whether every page held what it should."""

from __future__ import annotations

import random
from typing import Any

import pytest
from structlog.testing import capture_logs

from common.engine.engine import Engine, StepResult
from common.engine.messages import Sampling, Tokens
from common.engine.request import Sequence, Status
from common.kvcache.audit import Auditor
from common.kvcache.ledger import PageState
from tests.toys import VOCAB_SIZE, ToyRunner, greedy, toy_engine

pytestmark = pytest.mark.unit

PAGE = 4


def made(number: int, prompt: list[int], *, prefill_only: bool = False, **sampling: Any) -> Sequence:
    options: dict[str, Any] = {"temperature": 0.0, "max_new_tokens": 6, "ignore_eos": True, **sampling}
    return Sequence(number, prompt, Sampling(**options), prefill_only=prefill_only)


def prompt(number: int, length: int) -> list[int]:
    return random.Random(number).choices(range(VOCAB_SIZE), k=length)


def computed(engine: Engine) -> int:
    """Tokens that the model computed so far."""
    assert isinstance(engine.runner, ToyRunner)
    return sum(len(chunk.token_ids) for step in engine.runner.steps for chunk in step)


def run(engine: Engine) -> dict[int, list[int]]:
    outputs: dict[int, list[int]] = {}
    while engine.has_work:
        result = engine.step()
        assert result.scheduled
        assert not result.failures
        for tokens in result.tokens:
            outputs.setdefault(tokens.sequence_id, []).extend(tokens.token_ids)
    return outputs


def audit(engine: Engine) -> None:
    figures = Auditor(engine.allocator.ledger).run(engine.claims())
    assert (figures.leaked_pages, figures.disputed_pages) == (0, 0)


def test_a_second_prompt_computes_what_is_new() -> None:
    engine = toy_engine()
    shared = prompt(1, 18)
    first, second, whole = (made(n, ids) for n, ids in enumerate((shared, [*shared, 7, 8, 9], shared)))
    engine.add(first)
    assert run(engine) == {0: greedy(shared, 6)}
    assert engine.load().ledger.cached == (18 + 5) // PAGE, "prompt and output, but for the last token's"
    before = computed(engine)
    engine.add(second)
    assert run(engine) == {1: greedy(second.prompt_ids, 6)}
    assert (second.cached_tokens, computed(engine) - before) == (16, 21 - 16 + 5)
    engine.add(whole)
    assert run(engine) == {2: greedy(shared, 6)}
    assert (first.cached_tokens, whole.cached_tokens) == (0, 16)
    assert engine.allocator.ledger.at_rest
    audit(engine)


def test_the_last_token_is_always_computed() -> None:
    engine = toy_engine()
    for number in range(2):
        sequence = made(number, prompt(1, 16))
        engine.add(sequence)
        assert run(engine) == {number: greedy(sequence.prompt_ids, 6)}
    assert sequence.cached_tokens == 12


def test_a_conversation_goes_on_from_its_output() -> None:
    engine = toy_engine()
    ids = prompt(3, 9)
    for turn in range(5):
        before = computed(engine)
        engine.add(made(turn, ids, max_new_tokens=10))
        ids = ids + run(engine)[turn] + [turn]
        assert computed(engine) - before <= PAGE + 1 + 10 or turn == 0
    audit(engine)


def test_without_a_cache_everything_is_computed_and_free() -> None:
    engine = toy_engine(disable_radix_cache=True)
    for number in range(2):
        engine.add(made(number, prompt(1, 16)))
        run(engine)
    assert computed(engine) == 2 * (16 + 5)
    assert engine.allocator.num_free == 64


def test_a_prefix_that_comes_twice_at_once_is_computed_once() -> None:
    engine = toy_engine(chunked_prefill_size=8)
    shared = prompt(1, 20)
    for number in range(4):
        engine.add(made(number, [*shared, number], max_new_tokens=1))
    assert run(engine) == {number: greedy([*shared, number], 1) for number in range(4)}
    assert computed(engine) == 21 + 3 * 1
    audit(engine)


def test_copies_of_what_another_one_has_cached_are_given_up() -> None:
    """Two that computed the same before either was done: one set of pages stays, and nothing is freed too early."""
    engine = toy_engine(chunked_prefill_size=100)
    ids = prompt(1, 10)
    for number, handed_over in enumerate((False, True)):
        sequence = made(number, ids, prefill_only=handed_over)
        sequence.pages = engine.allocator.allocate(3)
        sequence.status, sequence.order = Status.RUNNING, number
        engine._sequences[number] = sequence
        engine.queue.running.append(sequence)
    own = list(sequence.pages)
    engine.step()
    pages = engine.load().ledger
    assert (pages.cached, pages.in_use) == (2, 1 + 1 + 2), "a hand-over may be reading its copies"
    assert sequence.copies == own[:2]
    audit(engine)
    assert engine.abort(1, quarantine=True)
    assert engine.load().ledger.quarantined == 3
    audit(engine)
    engine.release(1)
    assert run(engine)[0] == greedy(ids, 6)[1:]
    assert engine.allocator.ledger.at_rest
    audit(engine)


def test_what_runs_is_never_evicted_and_what_rests_is() -> None:
    engine = toy_engine(num_pages=12)
    engine.add(made(0, prompt(0, 24), max_new_tokens=1))
    run(engine)
    assert engine.load().ledger.cached == 6
    engine.add(made(1, prompt(1, 20), max_new_tokens=20))
    while engine.has_work:
        engine.step()
        audit(engine)
        sequence = engine.find(1)
        assert sequence is None or sequence.shared == 5
    assert engine.retracted == 0, "evicting comes before retracting"
    rest = engine.pages.find(made(2, prompt(0, 24)))
    assert rest
    assert len(rest.pages) == 2, "of six, what was not needed"


def test_eviction_comes_before_refusing() -> None:
    engine = toy_engine(num_pages=10, decode_prealloc_high_water=1)
    engine.add(made(0, prompt(0, 32), max_new_tokens=8))
    run(engine)
    load = engine.load()
    assert load.ledger.cached == 9
    assert load.credit
    assert load.credit.untouched
    assert engine.grantable_pages() == 10
    assert len(engine.allocator.allocate(10, PageState.RESERVED)) == 10
    assert engine.load().ledger.cached == 0


def test_what_several_share_counts_once_as_promised() -> None:
    engine = toy_engine(num_pages=40, num_reserved_decode_tokens=0, decode_prealloc_high_water=1)
    shared = prompt(0, 33)
    engine.add(made(9, shared, max_new_tokens=1))
    run(engine)
    for number in range(3):
        engine.add(made(number, [*shared[:32], number], max_new_tokens=4))
        engine.step()
    credit = engine.load().credit
    assert credit
    assert credit.pages == 40 - 8 - 3


def test_pages_of_a_failed_step_are_not_cached() -> None:
    engine = toy_engine(chunked_prefill_size=8)
    assert isinstance(engine.runner, ToyRunner)
    engine.runner.fail_at = {3}
    engine.add(made(1, prompt(1, 30)))
    while engine.has_work:
        result = engine.step()
    assert [failure.sequence_id for failure in result.failures] == [1]
    assert engine.load().ledger.free == 64
    engine.runner.broken = {prompt(2, 1)[0]}
    engine.add(made(2, prompt(2, 30)))
    while engine.has_work:
        engine.step()
    assert engine.load().ledger.free == 64


def test_a_retracted_sequence_finds_again_what_was_not_needed() -> None:
    engine = toy_engine(num_pages=12, chunked_prefill_size=100)
    for number in range(2):
        engine.add(made(number, prompt(number, 16), max_new_tokens=12))
    outputs = run(engine)
    assert outputs == {number: greedy(prompt(number, 16), 12) for number in range(2)}
    assert engine.retracted > 0
    assert computed(engine) < 2 * (16 + 11) + 16
    audit(engine)


class World:
    """A prefill-like, decode-like and unified engine in one, and random things that happen to it."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.engine = toy_engine(
            num_pages=self.rng.randint(16, 40),
            chunked_prefill_size=self.rng.choice([3, 8, 50]),
            max_running_requests=self.rng.randint(1, 6),
            enable_mixed_chunk=self.rng.random() < 0.5,
            num_reserved_decode_tokens=0,
        )
        self.outputs: dict[int, list[int]] = {}
        self.prompts: dict[int, list[int]] = {}
        self.held: set[int] = set()
        self.next = 0

    def act(self) -> None:
        action = self.rng.random()
        if action < 0.25 and len(self.prompts) < 12:
            self.begin()
        elif action < 0.30 and self.prompts:
            number = self.rng.choice(list(self.prompts))
            sequence = self.engine.find(number)
            quarantine = bool(sequence and sequence.prefill_only and sequence.status is not Status.WAITING)
            self.engine.abort(number, quarantine=quarantine)
            if quarantine:
                self.held.add(number)
            else:
                self.forget(number)
        elif action < 0.40 and self.held:
            number = self.rng.choice(sorted(self.held))
            self.engine.release(number)
            self.forget(number)
        elif action < 0.43:
            runner = self.engine.runner
            assert isinstance(runner, ToyRunner)
            runner.fail_at = {len(runner.steps) + 1}
        elif action < 0.5 and self.engine.pages.cache:
            self.engine.pages.cache.evict(self.rng.randint(1, 10))
        else:
            self.take(self.engine.step())

    def begin(self) -> None:
        """Prompts share prefixes of each other; some are adopted, as if another worker had brought the pages."""
        stem = prompt(self.rng.randrange(3), 20)[: self.rng.randint(0, 20)]
        ids = stem + prompt(self.rng.randrange(1000), self.rng.randint(1, 12))
        number, self.next = self.next, self.next + 1
        sequence = made(number, ids, max_new_tokens=self.rng.randint(2, 16))
        kind = self.rng.choice(["both", "prefill", "adopted"])
        if kind == "adopted":
            if not self.adopt(sequence):
                return
        else:
            sequence.prefill_only = kind == "prefill"
            self.engine.add(sequence)
            self.outputs[number] = []
        self.prompts[number] = ids

    def adopt(self, sequence: Sequence) -> bool:
        engine, ids = self.engine, sequence.prompt_ids
        assert isinstance(engine.runner, ToyRunner)
        prefix = engine.pages.find(sequence, compute_last=False)
        found = prefix.pages if prefix else []
        sequence.prefix = engine.pages.lock(prefix.node if prefix else None)
        needed = -(-len(ids) // PAGE) - len(found)
        if needed > engine.grantable_pages():
            engine.pages.unlock(sequence.prefix)
            return False
        sequence.shared = len(found)
        sequence.pages = found + engine.allocator.allocate(needed, PageState.RESERVED)
        for position in range(len(found) * PAGE, len(ids)):
            engine.runner.slots[sequence.pages[position // PAGE], position % PAGE] = ids[position]
        first = Tokens(sequence.sequence_id, 0, greedy(ids, 1), [])
        self.outputs[sequence.sequence_id] = list(engine.adopt(sequence, first).token_ids)
        return True

    def take(self, result: StepResult) -> None:
        for tokens in result.tokens:
            output = self.outputs[tokens.sequence_id]
            assert tokens.token_ids == greedy(self.prompts[tokens.sequence_id] + output, 1)
            output += tokens.token_ids
            if tokens.finish:
                self.forget(tokens.sequence_id)
        for progress in result.progress:
            sequence = progress.sequence
            assert isinstance(self.engine.runner, ToyRunner)
            held = self.engine.runner.slots[sequence.pages].reshape(-1)[: progress.computed].tolist()
            assert held == sequence.prompt_ids[: progress.computed]
            if progress.first:
                assert progress.first.token_ids == greedy(sequence.prompt_ids, 1)
                self.held.add(sequence.sequence_id)
        for failure in result.failures:
            if self.engine.find(failure.sequence_id):
                self.held.add(failure.sequence_id)
            else:
                self.forget(failure.sequence_id)
        for sequence in result.retracted:
            self.forget(sequence.sequence_id)

    def forget(self, number: int) -> None:
        self.held.discard(number)
        self.prompts.pop(number, None)
        self.outputs.pop(number, None)

    def check(self) -> None:
        engine = self.engine
        audit(engine)
        assert engine.pages.cache
        cached = set(engine.pages.cache.pages())
        shared: set[int] = set()
        for number in self.prompts:
            if sequence := engine.find(number):
                assert cached.issuperset(sequence.pages[: sequence.shared])
                shared.update(sequence.pages[: sequence.shared])
        assert engine.pages.num_shared == len(shared), "locked is what sequences stand on, and nothing else"
        pages = engine.load().ledger
        total = pages.free + pages.reserved + pages.in_use + pages.cached + pages.quarantined
        assert total == engine.allocator.num_pages


@pytest.mark.parametrize("seed", range(30))
def test_random_use_keeps_every_page_and_every_token_right(seed: int) -> None:
    world = World(seed)
    with capture_logs():  # steps fail on purpose
        for _ in range(300):
            world.act()
            world.check()
    assert isinstance(world.engine.runner, ToyRunner)
    world.engine.runner.fail_at = set()
    for number in list(world.prompts):
        if number not in world.held:
            world.engine.abort(number)
    for number in sorted(world.held):
        world.engine.release(number)
    assert world.engine.is_idle
    assert world.engine.allocator.ledger.at_rest
    assert world.engine.pages.num_shared == 0
    assert world.engine.allocator.num_available == world.engine.allocator.num_pages
