"""Decides what each step computes: plain functions over plain data, without a model.

A step of decoding gives every running sequence that decodes its one token. A step of prompts computes `chunk_tokens`
of them at most, oldest first. The two take turns, or share a step (`mixed`). Waiting sequences are admitted in the
order of arrival; when a decoding sequence needs a page and none is to be had, the youngest is retracted: its pages
return, and later it computes its tokens anew, but for those that the prefix cache has kept. The oldest thus always
advances, so nothing starves and nothing deadlocks. A sequence whose prompt came from another worker leaves when it is
retracted: it starts anew where the router sends it, with the tokens it has.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field

from common.engine.pages import SequencePages
from common.engine.request import Sequence, Status


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of a step, and whether prompts and decoding share one."""

    max_running: int
    chunk_tokens: int
    page_size: int
    mixed: bool = False


@dataclass(slots=True)
class Queue:
    """Sequences that have work, both lists in the order of arrival, and whose turn it is."""

    waiting: list[Sequence] = field(default_factory=list)
    running: list[Sequence] = field(default_factory=list)
    prompts_next: bool = True


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


def schedule(queue: Queue, pages: SequencePages, limits: Limits) -> Plan:
    """Plan the next step, allocating its pages. An empty plan means that nothing can run before pages return."""
    plan = Plan()
    prompts = queue.prompts_next and not limits.mixed
    turns = (compute_prompts, decode) if prompts else (decode, compute_prompts)
    for turn in turns:
        turn(queue, pages, limits, plan)
        if plan.spans and not limits.mixed:
            queue.prompts_next = turn is decode
            break
    return plan


def decode(queue: Queue, pages: SequencePages, limits: Limits, plan: Plan) -> None:
    """One token for every running sequence whose earlier tokens are all computed."""
    for sequence in list(queue.running):
        computed = sequence.computed
        if sequence.num_tokens - computed != 1 or sequence.status is not Status.RUNNING:
            continue
        if len(sequence.pages) * limits.page_size > computed or grow(sequence, queue, pages, plan):
            plan.spans.append(Span(sequence, computed, computed + 1, True))


def grow(sequence: Sequence, queue: Queue, pages: SequencePages, plan: Plan) -> bool:
    """Give a sequence one more page, taken from younger ones if need be. False if it had to yield itself."""
    while not pages.num_available:
        # Pages of a hand-over are being read and cannot be taken; such a sequence never grows.
        youngest = next(other for other in reversed(queue.running) if not other.prefill_only)
        retract(youngest, queue, pages)
        plan.retracted.append(youngest)
        if youngest is sequence:
            return False
    pages.grow(sequence)
    return True


def retract(sequence: Sequence, queue: Queue, pages: SequencePages) -> None:
    """Put a running sequence back where it waits, without pages; an adopted one has no place here any more."""
    queue.running.remove(sequence)
    pages.give_back(sequence)
    sequence.computed = 0
    if sequence.adopted:
        sequence.status = Status.ENDED
    else:
        sequence.status = Status.WAITING
        enqueue(queue.waiting, sequence)


def enqueue(sequences: list[Sequence], sequence: Sequence) -> None:
    """Insert by arrival."""
    insort(sequences, sequence, key=lambda other: other.order)


def compute_prompts(queue: Queue, pages: SequencePages, limits: Limits, plan: Plan) -> None:
    """The next chunk of every running prompt, while the budget lasts; what is left of it is for those that wait."""
    budget = limits.chunk_tokens
    for sequence in queue.running:
        if budget and sequence.num_tokens - sequence.computed > 1:
            budget -= take(sequence, budget, plan)
    admit(queue, pages, limits, plan, budget)


def take(sequence: Sequence, budget: int, plan: Plan) -> int:
    """Plan as much of a prompt as the budget allows; returns how many tokens that is."""
    start, end = sequence.computed, sequence.num_tokens
    stop = min(end, start + budget)
    plan.spans.append(Span(sequence, start, stop, stop == end))
    return stop - start


def admit(queue: Queue, pages: SequencePages, limits: Limits, plan: Plan, budget: int) -> None:
    """Start waiting sequences in order, while there is budget, and pages for all their tokens.

    A page for each sequence that may grow stays available, or the newcomer would soon be retracted.
    """
    growing = sum(not sequence.prefill_only for sequence in queue.running)
    while queue.waiting and budget and len(queue.running) < limits.max_running:
        sequence = queue.waiting[0]
        prefix = pages.find(sequence)
        if pages.awaited(sequence, prefix, queue.running) or not pages.start(sequence, prefix, leave=growing):
            return
        del queue.waiting[0]
        sequence.status = Status.RUNNING
        enqueue(queue.running, sequence)
        growing += not sequence.prefill_only
        budget -= take(sequence, budget, plan)
