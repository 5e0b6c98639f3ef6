"""Decides what each step computes: plain functions over plain data, without a model.

Every running sequence that decodes gets its one token. What is left of the step goes to prompts, oldest first,
`chunk_tokens` of them at most. Waiting sequences are admitted in the order of arrival; when a decoding sequence
needs a page and none is free, the youngest is retracted: its pages return, and later it computes its tokens
anew. The oldest thus always advances, so nothing starves and nothing deadlocks. A sequence whose prompt came
from another worker leaves when it is retracted: it starts anew where the router sends it, with the tokens it has.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field

from common.engine.request import Sequence, Status
from common.kvcache.allocator import PageAllocator


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of a step."""

    max_running: int
    chunk_tokens: int
    page_size: int


@dataclass(slots=True)
class Queue:
    """Sequences that have work, both lists in the order of arrival."""

    waiting: list[Sequence] = field(default_factory=list)
    running: list[Sequence] = field(default_factory=list)


@dataclass(slots=True)
class Span:
    """Positions `start` to `stop` (exclusive) of a sequence, to be computed; `sample` if they are its last."""

    sequence: Sequence
    start: int
    stop: int
    sample: bool


@dataclass(slots=True)
class Plan:
    """One step: what to compute, and who had to give its pages back for it."""

    spans: list[Span] = field(default_factory=list)
    retracted: list[Sequence] = field(default_factory=list)


def schedule(queue: Queue, allocator: PageAllocator, limits: Limits) -> Plan:
    """Plan the next step, allocating its pages. An empty plan means that nothing can run before pages return."""
    plan = Plan()
    decode(queue, allocator, limits, plan)
    budget = prefill(queue, limits, plan)
    admit(queue, allocator, limits, plan, budget)
    return plan


def decode(queue: Queue, allocator: PageAllocator, limits: Limits, plan: Plan) -> None:
    """One token for every running sequence whose earlier tokens are all computed."""
    for sequence in list(queue.running):
        computed = sequence.computed
        if sequence.num_tokens - computed != 1 or sequence.status is not Status.RUNNING:
            continue
        if len(sequence.pages) * limits.page_size > computed or grow(sequence, queue, allocator, plan):
            plan.spans.append(Span(sequence, computed, computed + 1, True))


def grow(sequence: Sequence, queue: Queue, allocator: PageAllocator, plan: Plan) -> bool:
    """Give a sequence one more page, taken from younger ones if need be. False if it had to yield itself."""
    while not allocator.num_free:
        # Pages of a hand-over are being read and cannot be taken; such a sequence never grows.
        youngest = next(other for other in reversed(queue.running) if not other.prefill_only)
        retract(youngest, queue, allocator)
        plan.retracted.append(youngest)
        if youngest is sequence:
            return False
    sequence.pages += allocator.allocate(1, after=sequence.pages[-1])
    return True


def retract(sequence: Sequence, queue: Queue, allocator: PageAllocator) -> None:
    """Put a running sequence back where it waits, without pages; an adopted one has no place here any more."""
    queue.running.remove(sequence)
    allocator.free(sequence.pages)
    sequence.pages = []
    sequence.computed = 0
    if sequence.adopted:
        sequence.status = Status.ENDED
    else:
        sequence.status = Status.WAITING
        enqueue(queue.waiting, sequence)


def enqueue(sequences: list[Sequence], sequence: Sequence) -> None:
    """Insert by arrival."""
    insort(sequences, sequence, key=lambda other: other.order)


def prefill(queue: Queue, limits: Limits, plan: Plan) -> int:
    """The next chunk of every running prompt, while the budget lasts. Returns what is left of the budget."""
    budget = limits.chunk_tokens
    for sequence in queue.running:
        if budget and sequence.num_tokens - sequence.computed > 1:
            budget -= take(sequence, budget, plan)
    return budget


def take(sequence: Sequence, budget: int, plan: Plan) -> int:
    """Plan as much of a prompt as the budget allows; returns how many tokens that is."""
    start, end = sequence.computed, sequence.num_tokens
    stop = min(end, start + budget)
    plan.spans.append(Span(sequence, start, stop, stop == end))
    return stop - start


def admit(queue: Queue, allocator: PageAllocator, limits: Limits, plan: Plan, budget: int) -> None:
    """Start waiting sequences in order, while there is budget, and pages for all their tokens.

    A page for each sequence that may grow stays free, or the newcomer would soon be retracted.
    """
    growing = sum(not sequence.prefill_only for sequence in queue.running)
    while queue.waiting and budget and len(queue.running) < limits.max_running:
        sequence = queue.waiting[0]
        needed = -(-sequence.num_tokens // limits.page_size)
        if allocator.num_free - needed < growing:
            return
        del queue.waiting[0]
        sequence.pages = allocator.allocate(needed)
        sequence.status = Status.RUNNING
        enqueue(queue.running, sequence)
        growing += not sequence.prefill_only
        budget -= take(sequence, budget, plan)
