"""The scheduler, without a model."""

from __future__ import annotations

import random

import pytest

from common.engine.messages import Sampling
from common.engine.pages import SequencePages
from common.engine.request import Sequence, Status
from common.engine.scheduler import Limits, Plan, Queue, enqueue, schedule
from common.kvcache.allocator import PageAllocator

pytestmark = pytest.mark.unit

PAGE = 4


class Bench:
    """A queue and a pool, and a step that pretends to compute what was planned."""

    def __init__(
        self, num_pages: int = 100, max_running: int = 8, chunk_tokens: int = 16, *, mixed: bool = True
    ) -> None:
        self.queue = Queue()
        self.allocator = PageAllocator(num_pages)
        self.pages = SequencePages(self.allocator, None, PAGE)
        self.limits = Limits(max_running, chunk_tokens, PAGE, mixed)
        self.arrivals = 0

    def add(self, prompt_len: int, max_new_tokens: int = 100, *, prefill_only: bool = False) -> Sequence:
        sampling = Sampling(max_new_tokens=max_new_tokens)
        sequence = Sequence(self.arrivals, [1] * prompt_len, sampling, prefill_only=prefill_only)
        sequence.order = self.arrivals
        self.arrivals += 1
        enqueue(self.queue.waiting, sequence)
        return sequence

    def step(self) -> Plan:
        plan = schedule(self.queue, self.pages, self.limits)
        for span in plan.spans:
            sequence = span.sequence
            assert sequence.computed == span.start < span.stop <= len(sequence.pages) * PAGE
            sequence.computed = span.stop
            if span.sample:
                sequence.output_ids.append(2)
                if sequence.prefill_only or len(sequence.output_ids) == sequence.sampling.max_new_tokens:
                    self.queue.running.remove(sequence)
                    sequence.status = Status.HELD if sequence.prefill_only else Status.ENDED
                    if sequence.status is Status.ENDED:
                        self.allocator.free(sequence.pages)
        return plan

    def spans(self) -> list[tuple[int, int, int, bool]]:
        return [(s.sequence.sequence_id, s.start, s.stop, s.sample) for s in self.step().spans]


def test_a_prompt_is_computed_in_chunks_and_then_decoded() -> None:
    bench = Bench(chunk_tokens=16)
    bench.add(37)
    assert bench.spans() == [(0, 0, 16, False)]
    assert bench.spans() == [(0, 16, 32, False)]
    assert bench.spans() == [(0, 32, 37, True)]
    assert bench.spans() == [(0, 37, 38, True)]


def test_decoding_goes_on_beside_prompts_and_takes_no_budget() -> None:
    bench = Bench(chunk_tokens=16)
    bench.add(3)
    bench.add(3)
    bench.step()
    bench.add(20)
    assert bench.spans() == [(0, 3, 4, True), (1, 3, 4, True), (2, 0, 16, False)]


def test_the_budget_is_shared_in_the_order_of_arrival() -> None:
    bench = Bench(chunk_tokens=16)
    for prompt_len in (10, 10, 10):
        bench.add(prompt_len)
    assert bench.spans() == [(0, 0, 10, True), (1, 0, 6, False)]
    assert bench.spans() == [(0, 10, 11, True), (1, 6, 10, True), (2, 0, 10, True)]


def test_a_last_chunk_of_one_token_is_computed() -> None:
    bench = Bench(chunk_tokens=16)
    bench.add(17)
    bench.step()
    assert bench.spans() == [(0, 16, 17, True)]


def test_no_more_run_than_allowed() -> None:
    bench = Bench(max_running=2, chunk_tokens=100)
    for _ in range(3):
        bench.add(4, max_new_tokens=1)
    assert [span[0] for span in bench.spans()] == [0, 1]
    assert [span[0] for span in bench.spans()] == [2]


def test_a_large_prompt_at_the_head_is_not_overtaken() -> None:
    bench = Bench(num_pages=10, chunk_tokens=100)
    first = bench.add(24, max_new_tokens=5)
    large = bench.add(20)
    small = bench.add(4)
    bench.step()
    assert (large.status, small.status) == (Status.WAITING, Status.WAITING)
    while first.status is not Status.ENDED:
        bench.step()
    assert [span[0] for span in bench.spans()] == [large.sequence_id, small.sequence_id]


def test_admission_leaves_a_page_for_everyone_who_may_grow() -> None:
    bench = Bench(num_pages=5, chunk_tokens=100)
    bench.add(8)
    bench.step()
    waiting = bench.add(12)  # fits exactly, and would be retracted at once
    bench.step()
    assert waiting.status is Status.WAITING


def test_the_youngest_gives_its_pages_back() -> None:
    bench = Bench(num_pages=4, chunk_tokens=100)
    old, young = bench.add(4), bench.add(4)
    bench.step()
    retracted: list[Sequence] = []
    while not retracted:
        retracted = bench.step().retracted
    assert retracted == [young]
    assert (young.status, young.pages, young.computed) == (Status.WAITING, [], 0)
    assert young.output_ids
    assert bench.queue.running == [old]


def test_a_retracted_sequence_computes_its_output_anew_and_goes_on() -> None:
    bench = Bench(num_pages=4, chunk_tokens=100)
    old, young = bench.add(4, max_new_tokens=9), bench.add(4, max_new_tokens=9)
    while young.status is not Status.ENDED:
        plan = bench.step()
    assert old.status is Status.ENDED
    assert len(young.output_ids) == 9
    assert plan.spans[0].sequence is young
    assert bench.allocator.ledger.at_rest


def test_a_retracted_sequence_keeps_its_place() -> None:
    bench = Bench(num_pages=4, chunk_tokens=100)
    bench.add(4)
    young = bench.add(4)
    bench.step()
    late = bench.add(4)
    while young.status is not Status.WAITING:
        bench.step()
    assert bench.queue.waiting == [young, late]


def test_pages_of_a_hand_over_are_never_taken() -> None:
    bench = Bench(num_pages=5, chunk_tokens=100)
    grows = bench.add(4)
    bench.step()
    handed = bench.add(8, prefill_only=True)
    bench.step()
    assert handed.status is Status.HELD
    while grows.status is Status.RUNNING:
        plan = bench.step()
    assert plan.retracted == [grows]
    assert not bench.step().spans  # nothing can run, and nothing breaks, until pages return
    bench.allocator.free(handed.pages)
    assert bench.step().spans[0].sequence is grows


def test_tokens_are_those_of_prompt_and_output_as_one() -> None:
    sequence = Sequence(0, [1, 2, 3], Sampling(), output_ids=[4, 5])
    assert sequence.tokens(0, 5) == [1, 2, 3, 4, 5]
    assert sequence.tokens(2, 4) == [3, 4]
    assert sequence.tokens(4, 5) == [5]
    assert sequence.tokens(0, 2) == [1, 2]


@pytest.mark.parametrize("seed", range(25))
def test_everything_ends_in_a_pool_that_is_far_too_small(seed: int) -> None:
    rng = random.Random(seed)
    bench = Bench(num_pages=rng.randint(12, 20), max_running=rng.randint(1, 6), chunk_tokens=rng.randint(1, 20))
    sequences: list[Sequence] = []
    for _ in range(4000):
        if len(sequences) < 40 and rng.random() < 0.4:
            sequences.append(bench.add(rng.randint(1, 24), rng.randint(1, 24)))
        bench.step()
        if len(sequences) == 40 and all(sequence.status is Status.ENDED for sequence in sequences):
            break
    assert [len(sequence.output_ids) for sequence in sequences] == [s.sampling.max_new_tokens for s in sequences]
    assert bench.allocator.ledger.at_rest


def test_an_adopted_sequence_leaves_when_it_is_retracted() -> None:
    bench = Bench(num_pages=4, chunk_tokens=100)
    old, young = bench.add(4), bench.add(4)
    bench.step()
    young.adopted = True
    retracted: list[Sequence] = []
    while not retracted:
        retracted = bench.step().retracted
    assert retracted == [young]
    assert (young.status, young.pages) == (Status.ENDED, [])
    assert (bench.queue.running, bench.queue.waiting) == ([old], [])


def test_without_mixing_prompts_and_decoding_take_turns() -> None:
    bench = Bench(chunk_tokens=16, mixed=False)
    bench.add(3)
    assert bench.spans() == [(0, 0, 3, True)]
    bench.add(40)
    bench.add(3)
    assert bench.spans() == [(0, 3, 4, True)]
    assert bench.spans() == [(1, 0, 16, False)]
    assert bench.spans() == [(0, 4, 5, True)]
    assert bench.spans() == [(1, 16, 32, False)]
    assert bench.spans() == [(0, 5, 6, True)]
    assert bench.spans() == [(1, 32, 40, True), (2, 0, 3, True)]
    for position in (6, 7):
        assert bench.spans()[0] == (0, position, position + 1, True), "nobody's turn is skipped for nothing"
