"""The engine seam: what computes a step. `torch` has a model (`runner.py`), `emulated` has a clock (`emulated.py`).

Imports no torch: the scheduler, the hand-over and the rank's loop work on either.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

from common.engine.messages import TokenLogprobs
from common.engine.scheduler import Span
from common.kvcache.layout import KvLayout


@dataclass(slots=True)
class Sampled:
    """Chosen tokens of a step, one per row.

    Attributes:
        token_ids: The chosen tokens.
        logprobs: Log-probabilities where the sequence asked for them, else None.
        broken: Rows whose logits are not finite; their tokens mean nothing.
    """

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]
    broken: list[int]


class Runner(Protocol):
    """What the engine needs of what computes.

    Attributes:
        layout: Shape of the pages of its pool.
        vocab_size: Number of token ids.
        context_length: Most tokens of prompt and output together.
        model_path: The folder that was loaded.
        fingerprint: Equal on two workers whose tokens and pages are interchangeable.
        eos_token_ids: Tokens that end a sequence.
    """

    layout: KvLayout
    vocab_size: int
    context_length: int
    fingerprint: str
    model_path: str
    eos_token_ids: tuple[int, ...]

    def step(self, spans: Seq[Span]) -> Sampled | float:
        """Compute spans into their pages and choose a token for each with `sample`, in order.

        A runner that is not done yet returns the seconds that the step still takes; it is called again then, or
        earlier, with the spans of that step that still matter. It computes one step at a time.
        """
        ...

    def read_page(self, page: int) -> memoryview:
        """The bytes of a page of its pool, for checksums; from any thread, without a copy where it can."""
        ...
