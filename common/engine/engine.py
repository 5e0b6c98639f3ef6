"""The engine: sequences in, tokens out, a step at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, count

from common.engine.base import Runner, Sampled
from common.engine.config import DEFAULT_CHUNK_TOKENS, EngineConfig
from common.engine.messages import Ledger, Load, SequenceFailed, TokenLogprobs, Tokens
from common.engine.pages import SequencePages
from common.engine.request import Sequence, Status
from common.engine.reserve import Reserve
from common.engine.scheduler import Limits, Plan, Queue, enqueue, schedule
from common.errors.base import MeshError, Reason
from common.kvcache.allocator import PageAllocator
from common.kvcache.audit import Claim
from common.kvcache.ledger import PageState
from common.kvcache.radix import RadixCache
from common.mesh.credit import Credit, most_pages, promised_pages
from common.obs.log import get_logger

log = get_logger(__name__)


@dataclass(slots=True)
class Progress:
    """A chunk of a `prefill_only` sequence: the KV of its first `computed` tokens is in its pages.

    `first` comes with the last chunk: the sampled token. The pages are held from then on until `release`.
    """

    sequence: Sequence
    computed: int
    first: Tokens | None = None


@dataclass(slots=True)
class StepResult:
    """What a step brought. `scheduled` is false if nothing could run before pages return.

    With `wait_s` the step is under way for so many seconds more: nothing but `retracted` is set then. `retracted`
    are adopted sequences that left so that others may grow; their pages are free.
    """

    scheduled: bool = False
    wait_s: float = 0.0
    tokens: list[Tokens] = field(default_factory=list)
    progress: list[Progress] = field(default_factory=list)
    failures: list[SequenceFailed] = field(default_factory=list)
    retracted: list[Sequence] = field(default_factory=list)


class Engine:
    """Runs sequences on one model and one pool. Not thread-safe: one rank's loop owns it.

    A sequence takes one of three ways: `add` (both phases here), `add` with `prefill_only` (ends held, until
    `release`), or `adopt` (its prompt was computed elsewhere). It ends with `Tokens` that say how, with
    `SequenceFailed`, or by `abort`; its pages are free or cached then, unless it is held. One that was adopted may
    also be retracted, see `StepResult`; others are retracted and resumed within.

    Attributes:
        pages: The pages of its sequences, and the prefix cache.
        limit_pages: The high-water mark: pages that may be promised.
        reserve: Growth that is counted for each sequence.
        retracted: Sequences that had to give their pages back so far.
    """

    def __init__(self, runner: Runner, allocator: PageAllocator, config: EngineConfig) -> None:
        self.runner = runner
        self.allocator = allocator
        page_size = runner.layout.page_size
        cache = None if config.disable_radix_cache else RadixCache(allocator, page_size)
        self.pages = SequencePages(allocator, cache, page_size)
        chunk_tokens = config.chunked_prefill_size or DEFAULT_CHUNK_TOKENS
        self.limits = Limits(config.max_running_requests, chunk_tokens, page_size, config.enable_mixed_chunk)
        self.queue = Queue()
        self._sequences: dict[int, Sequence] = {}
        self._arrivals = count()
        self._under_way: Plan | None = None
        self.limit_pages = max(1, int(allocator.num_pages * config.decode_prealloc_high_water))
        self.reserve = Reserve(config.num_reserved_decode_tokens, page_size)
        self.retracted = 0

    @property
    def has_work(self) -> bool:
        """Whether a step may have something to compute."""
        return bool(self.queue.running or self.queue.waiting)

    @property
    def is_idle(self) -> bool:
        """Whether no sequence is left, held ones included."""
        return not self._sequences

    def load(self) -> Load:
        """Sequences and pages now."""
        pages = self.allocator.ledger.count
        return Load(
            running=len(self.queue.running),
            waiting=len(self.queue.waiting),
            waiting_tokens=sum(sequence.num_tokens for sequence in self.queue.waiting),
            ledger=Ledger(*(pages(state) for state in PageState)),
            credit=self.credit(),
            retracted=self.retracted,
        )

    def promised_pages(self) -> int:
        """Pages that running and waiting sequences have or may soon grow into; what they share counts once."""
        reserved, page_size = self.reserve.tokens, self.limits.page_size
        return self.pages.num_shared + sum(
            promised_pages(sequence.num_tokens, sequence.remaining, reserved, page_size) - sequence.shared
            for sequence in chain(self.queue.running, self.queue.waiting)
        )

    def credit(self) -> Credit:
        """What may still be promised; hand-overs are the hand-over's to take off."""
        queue, quarantined = self.queue, self.allocator.ledger.count(PageState.QUARANTINED)
        return Credit(
            pages=self.limit_pages - self.promised_pages() - quarantined,
            sequences=self.limits.max_running - len(queue.running) - len(queue.waiting),
            limit_pages=self.limit_pages,
            reserved_tokens=self.reserve.tokens,
            page_size=self.limits.page_size,
        )

    def claims(self) -> Iterator[Claim]:
        """What the free list, the prefix cache and the sequences say they have."""
        yield from self.pages.claims()
        for sequence in self._sequences.values():
            state = PageState.QUARANTINED if sequence.quarantined else PageState.IN_USE
            yield Claim(f"sequence {sequence.sequence_id} ({sequence.request_id})", state, self.pages.own(sequence))

    def find(self, sequence_id: int) -> Sequence | None:
        """A sequence that has not ended, or is held."""
        return self._sequences.get(sequence_id)

    def grantable_pages(self) -> int:
        """Pages that may be reserved for hand-overs without taking what running or retracted sequences need."""
        if self.queue.waiting:
            return 0
        growing = sum(not sequence.prefill_only for sequence in self.queue.running)
        return max(0, self.pages.num_available - growing)

    # ------------------------------------------------------------------------------- sequences come and go

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises `MeshError` for one that can never run here: see `check`."""
        self.check(sequence)
        self._register(sequence)
        enqueue(self.queue.waiting, sequence)

    def adopt(self, sequence: Sequence, first: Tokens) -> Tokens:
        """Go on with a sequence whose tokens another worker computed and whose own pages are RESERVED here.

        `sequence.pages` hold the KV of the prompt and of `output_ids`, which an earlier attempt had; the first
        `shared` of them are cached, and `prefix` is locked for them. `first` is what
        prefill sampled (`Progress.first`). Returns it as this sequence's next tokens; if they finish it, it has ended
        and its pages are free.

        Raises:
            MeshError: As for `add`; the pages stay reserved.
        """
        self.check(sequence)
        self.allocator.move(self.pages.own(sequence), PageState.RESERVED, PageState.IN_USE)
        self._register(sequence)
        sequence.adopted = True
        sequence.computed = sequence.num_tokens
        self.pages.publish(sequence)
        sequence.cached_tokens = first.cached_tokens
        sequence.status = Status.RUNNING
        enqueue(self.queue.running, sequence)
        return self._append(sequence, first.token_ids[0], first.logprobs[0] if first.logprobs else None)

    def check(self, sequence: Sequence) -> None:
        """Raise `MeshError` if a sequence can never run here.

        EMPTY_PROMPT, TOKEN_OUT_OF_RANGE, CONTEXT_TOO_LONG (prompt beyond the context), OVERLOADED (more pages
        than the pool has).
        """
        context = self.runner.context_length
        if not sequence.prompt_ids:
            raise MeshError(Reason.EMPTY_PROMPT, "the prompt has no tokens", parameter="prompt")
        known = (ids for ids in (sequence.prompt_ids, sequence.output_ids) if ids)
        if any(min(ids) < 0 or max(ids) >= self.runner.vocab_size for ids in known):
            message = f"a token id is outside the vocabulary of {self.runner.vocab_size}"
            raise MeshError(Reason.TOKEN_OUT_OF_RANGE, message, parameter="token_ids")
        if sequence.num_tokens >= context or sequence.remaining < 1:
            message = f"{sequence.num_tokens} tokens leave no room in a context of {context}"
            raise MeshError(Reason.CONTEXT_TOO_LONG, message, parameter="prompt")
        remaining = 0 if sequence.prefill_only else min(sequence.remaining, context - sequence.num_tokens)
        needed = most_pages(sequence.num_tokens, remaining, self.limits.page_size)
        if needed > self.allocator.num_pages:
            message = f"{needed} pages of KV cache are needed, the pool has {self.allocator.num_pages}"
            raise MeshError(Reason.OVERLOADED, message)

    def abort(self, sequence_id: int, *, quarantine: bool = False) -> bool:
        """Stop a sequence at once and give back its pages. False if there is none of that id.

        With `quarantine` its own pages are quarantined, cached ones stay locked, and it is held until `release`: for
        a hand-over whose writes may still read them.
        """
        sequence = self._sequences.get(sequence_id)
        if sequence is None:
            return False
        self._leave_queue(sequence)
        sequence.finish = sequence.finish or "abort"
        if quarantine:
            self._quarantine(sequence)
        else:
            self._end(sequence)
        return True

    def release(self, sequence_id: int) -> None:
        """Give back the pages of a held sequence. Raises `KeyError` if none of that id is held."""
        sequence = self._sequences[sequence_id]
        if sequence.status is not Status.HELD:
            raise KeyError(f"sequence {sequence_id} is {sequence.status.value}, not held")
        self._end(sequence)

    # ---------------------------------------------------------------------------------------- the main loop

    def step(self) -> StepResult:
        """Compute one step: schedule, run, sample, hand out. A failure ends the step's sequences, not the engine."""
        if plan := self._under_way:  # some of its sequences may have ended meanwhile
            plan.spans = [span for span in plan.spans if span.sequence.status is Status.RUNNING]
        else:
            plan = schedule(self.queue, self.pages, self.limits)
            self.retracted += len(plan.retracted)
            self.reserve.stepped(len(plan.retracted))
        left = self._dismiss(plan)
        result = self._compute(plan) if plan.spans or self._under_way else StepResult()
        result.retracted = left
        return result

    def _compute(self, plan: Plan) -> StepResult:
        self._under_way = None
        try:
            sampled = self.runner.step(plan.spans)
        except Exception as error:
            log.exception("a step failed", sequences=len(plan.spans))
            return self._fail_step(plan, f"the step failed: {type(error).__name__}: {error}")
        if isinstance(sampled, float):
            self._under_way = plan
            return StepResult(scheduled=True, wait_s=sampled)
        return self._hand_out(plan, sampled)

    def _hand_out(self, plan: Plan, sampled: Sampled) -> StepResult:
        result = StepResult(scheduled=True)
        sampling = [span.sequence for span in plan.spans if span.sample]
        broken = {id(sampling[row]) for row in sampled.broken}
        for span in plan.spans:
            sequence = span.sequence
            sequence.computed = span.stop
            if id(sequence) not in broken and (sequence.prefill_only or span.stop - span.start > 1):
                self.pages.publish(sequence)  # generated tokens are at the sequence's end
            if sequence.prefill_only and not span.sample:
                result.progress.append(Progress(sequence, span.stop))
        for sequence, token, logprobs in zip(sampling, sampled.token_ids, sampled.logprobs, strict=True):
            if id(sequence) in broken:
                result.failures.append(self._fail(sequence, "the model computed logits that are not finite"))
            elif sequence.prefill_only:
                result.progress.append(Progress(sequence, sequence.computed, self._hold(sequence, token, logprobs)))
            else:
                result.tokens.append(self._append(sequence, token, logprobs))
        return result

    def _dismiss(self, plan: Plan) -> list[Sequence]:
        """Forget the adopted sequences that the plan retracted, once; the others wait here for their turn."""
        left = [sequence for sequence in plan.retracted if sequence.adopted]
        plan.retracted = []
        for sequence in left:
            del self._sequences[sequence.sequence_id]
        return left

    def _append(self, sequence: Sequence, token: int, logprobs: TokenLogprobs | None) -> Tokens:
        """Add a token to a running sequence and end it where it is finished."""
        tokens = self._record(sequence, token, logprobs)
        if tokens.finish:
            self._leave_queue(sequence)
            self._end(sequence)
        return tokens

    def _hold(self, sequence: Sequence, token: int, logprobs: TokenLogprobs | None) -> Tokens:
        """Add the token that ends a `prefill_only` sequence; its pages stay."""
        self._leave_queue(sequence)
        sequence.status = Status.HELD
        return self._record(sequence, token, logprobs)

    def _record(self, sequence: Sequence, token: int, logprobs: TokenLogprobs | None) -> Tokens:
        offset = len(sequence.output_ids)
        sequence.output_ids.append(token)
        if token in sequence.stop_ids:
            sequence.finish = "stop"
        elif offset + 1 >= sequence.sampling.max_new_tokens or sequence.num_tokens >= self.runner.context_length:
            sequence.finish = "length"
        entries = [] if logprobs is None else [logprobs]
        return Tokens(sequence.sequence_id, offset, [token], entries, sequence.finish, sequence.cached_tokens)

    def _fail_step(self, plan: Plan, message: str) -> StepResult:
        return StepResult(scheduled=True, failures=[self._fail(span.sequence, message) for span in plan.spans])

    def _fail(self, sequence: Sequence, message: str) -> SequenceFailed:
        """End a sequence; pages that a hand-over may be reading are quarantined until `release`."""
        self._leave_queue(sequence)
        sequence.doubtful = True
        if sequence.prefill_only:
            self._quarantine(sequence)
        else:
            self._end(sequence)
        return SequenceFailed(sequence.sequence_id, Reason.ENGINE_FAILED, message)

    # ------------------------------------------------------------------------------------------ bookkeeping

    def _register(self, sequence: Sequence) -> None:
        if sequence.sequence_id in self._sequences:
            raise ValueError(f"sequence {sequence.sequence_id} exists")
        sampling, eos = sequence.sampling, self.runner.eos_token_ids
        sequence.masked_ids = tuple({*sampling.stop_token_ids, *eos})
        sequence.stop_ids = frozenset(sampling.stop_token_ids if sampling.ignore_eos else sequence.masked_ids)
        sequence.order = next(self._arrivals)
        self._sequences[sequence.sequence_id] = sequence

    def _leave_queue(self, sequence: Sequence) -> None:
        if sequence.status is Status.RUNNING:
            self.queue.running.remove(sequence)
        elif sequence.status is Status.WAITING:
            self.queue.waiting.remove(sequence)

    def _quarantine(self, sequence: Sequence) -> None:
        """Hold a sequence that failed; quarantining twice does nothing."""
        sequence.status = Status.HELD
        if not sequence.quarantined:
            self.pages.quarantine(sequence)

    def _end(self, sequence: Sequence) -> None:
        self.pages.give_back(sequence)
        sequence.status = Status.ENDED
        del self._sequences[sequence.sequence_id]
