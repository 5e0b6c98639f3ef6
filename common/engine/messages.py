"""What goes into an engine with a sequence and what comes out of a step: plain data, ready for the wire."""

from __future__ import annotations

import msgspec

from common.mesh.credit import Credit


class Message(msgspec.Struct, array_like=True, tag=True):
    """Base of all messages: a tagged array on the wire."""


class Sampling(msgspec.Struct, frozen=True, array_like=True):
    """`pdmesh.v1.SamplingParams` with every default resolved. Stop strings stay with the router."""

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int = 0
    logprobs: int | None = None


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities at one output position: the chosen token's, and the `k` most likely, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Tokens(Message):
    """New tokens of a sequence; `finish` is "", "stop", "length" or "abort"."""

    sequence_id: int
    offset: int
    token_ids: list[int]
    logprobs: list[TokenLogprobs]
    finish: str = ""
    cached_tokens: int = 0


class Retracted(Message):
    """The sequence gave its pages back so that older ones may grow; it can go on elsewhere from where it stands."""

    sequence_id: int


class SequenceFailed(Message):
    """The sequence ended without finishing; its pages are given back or in quarantine."""

    sequence_id: int
    reason: str
    message: str


class Ledger(msgspec.Struct, frozen=True, array_like=True):
    """Pages by state; the sum is constant."""

    free: int
    reserved: int = 0
    in_use: int = 0
    cached: int = 0
    quarantined: int = 0


class Arrivals(msgspec.Struct, frozen=True, array_like=True):
    """What decode found in what arrived, since its start.

    `stale_notices` are completions of hand-overs that it does not wait for, or not any more: they were dropped.
    `pages_verified` were compared with their checksums, and `checksum_mismatches` are the rooms that failed by it.
    """

    stale_notices: int = 0
    pages_verified: int = 0
    checksum_mismatches: int = 0


class Load(msgspec.Struct, frozen=True, array_like=True):
    """Load of a rank at the end of a step. `waiting` counts what waits in the hand-over, too.

    `credit` is absent where nothing is promised (prefill); `last_start` is the highest sequence id that it
    reflects. `retracted` counts the sequences that had to give their pages back since the start; `arrivals` is absent
    where nothing arrives.
    """

    running: int
    waiting: int
    waiting_tokens: int
    ledger: Ledger
    credit: Credit | None = None
    last_start: int = 0
    retracted: int = 0
    arrivals: Arrivals | None = None
