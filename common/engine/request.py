"""A sequence: plain data that the scheduler, the sampler and the engine share."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from common.engine.messages import Sampling
from common.kvcache.radix import Node

if TYPE_CHECKING:  # so that scheduling needs no torch
    from common.engine.penalties import TokenCounts

GREEDY_BELOW = 1e-5  # a temperature below is 0: dividing by it would overflow


class Status(Enum):
    """Where a sequence stands."""

    WAITING = "waiting"  # not started, or retracted: holds no pages
    RUNNING = "running"  # has all pages for the tokens it knows; computes at every step
    HELD = "held"  # ended here, but a hand-over reads its pages until they are released
    ENDED = "ended"


@dataclass(slots=True, eq=False)
class Sequence:
    """One prompt and what was generated for it.

    Attributes:
        sequence_id: The front's number, unique for the worker's life.
        prefill_only: One side of a hand-over: computes the prompt, samples one token, then holds its pages.
        adopted: The other side: another worker computed its prompt. When it must give its pages back, it leaves.
        output_ids: What was generated, by an earlier attempt elsewhere too.
        pages: Pages of KV cache in token order.
        shared: How many of `pages`, from the first, belong to the prefix cache.
        prefix: Where it stands in the prefix cache, which keeps the shared pages for it.
        copies: Pages of its own that are no part of `pages` any more, kept because a hand-over may be reading them.
        computed: Tokens, from the first, whose KV is in `pages`.
        cached_tokens: Tokens of the prompt that were found in a prefix cache.
        order: Place in the order of arrival, given by the engine.
        quarantined: Its own pages are, because a hand-over failed that may still read them.
        doubtful: A step with it failed: what its pages hold is not to be shared.
        stop_ids: Tokens that end it, given by the engine.
        masked_ids: Tokens that may not be chosen before `min_new_tokens`, given by the engine.
        counts: Token counts for penalties, kept by the sampler.
        finish: "", "stop", "length" or "abort".
    """

    sequence_id: int
    prompt_ids: list[int]
    sampling: Sampling
    prefill_only: bool = False
    adopted: bool = False
    request_id: str = ""
    output_ids: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    shared: int = 0
    prefix: Node | None = None
    copies: list[int] = field(default_factory=list)
    computed: int = 0
    cached_tokens: int = 0
    order: int = -1
    status: Status = Status.WAITING
    quarantined: bool = False
    doubtful: bool = False
    stop_ids: frozenset[int] = frozenset()
    masked_ids: tuple[int, ...] = ()
    counts: TokenCounts | None = None
    finish: str = ""
    is_greedy: bool = field(init=False)
    is_penalized: bool = field(init=False)
    is_plain: bool = field(init=False)

    def __post_init__(self) -> None:
        sampling = self.sampling
        self.is_greedy = sampling.temperature < GREEDY_BELOW
        self.is_penalized = (
            sampling.repetition_penalty != 1 or sampling.frequency_penalty != 0 or sampling.presence_penalty != 0
        )
        # Needs nothing but the most likely token.
        self.is_plain = (
            self.is_greedy and not self.is_penalized and sampling.logprobs is None and not sampling.min_new_tokens
        )

    @property
    def num_tokens(self) -> int:
        """Tokens known so far, prompt and output."""
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def remaining(self) -> int:
        """Most tokens that may still be generated."""
        return self.sampling.max_new_tokens - len(self.output_ids)

    @property
    def pending(self) -> int:
        """Known tokens whose KV is still to be computed; 1 while decoding."""
        return self.num_tokens - self.computed

    def tokens(self, start: int, stop: int) -> list[int]:
        """Token ids at positions `start` to `stop` (exclusive), prompt and output counted as one."""
        prompt_len = len(self.prompt_ids)
        if start >= prompt_len:
            return self.output_ids[start - prompt_len : stop - prompt_len]
        return self.prompt_ids[start:stop] + self.output_ids[: max(0, stop - prompt_len)]
