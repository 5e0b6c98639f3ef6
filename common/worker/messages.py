"""What a worker's front and its ranks tell each other, over a local socket, encoded by msgspec.

The front batches what it has into one `ToRank`, a rank sends one `FromRank` a step. Sequence ids are the
front's own, unique for the worker's life.
"""

from __future__ import annotations

import msgspec

from common.engine.messages import Load, Message, Retracted, Sampling, SequenceFailed, Tokens
from common.kvcache.hashes import CacheChanges
from common.kvcache.layout import KvLayout
from common.kvcache.ledger import Audit
from common.mesh.ticket import Ticket
from common.mesh.transfer_stats import TransferStats

# ------------------------------------------------------------------------------------------ shared parts


class RankReservation(msgspec.Struct, frozen=True, array_like=True):
    """Destination of a room on one decode rank; `extents` are `(first_page, page_count)` in token order."""

    rank: int
    backend: str
    descriptor: bytes
    extents: tuple[tuple[int, int], ...]


# ------------------------------------------------------------------------------------------ front → rank


class StartSequence(Message):
    """A sequence to run. With a ticket it is one side of a hand-over; without, this worker does both phases.

    `output_ids` are what an earlier attempt generated: they are computed with the prompt, and the output goes on.
    """

    sequence_id: int
    request_id: str
    ticket: Ticket | None
    prompt_ids: list[int]
    sampling: Sampling
    output_ids: list[int] = msgspec.field(default_factory=list)


class AbortSequence(Message):
    """Stop a sequence and give its pages back. Unknown ids are ignored: it may just have finished."""

    sequence_id: int


class RoomReserved(Message):
    """To prefill: where a room's pages go. From decode: what it granted."""

    ticket: Ticket
    ranks: tuple[RankReservation, ...]
    from_token: int = 0


class RoomEnded(Message):
    """The room failed in the control plane: stop working on it."""

    ticket: Ticket
    reason: str
    message: str


class RoomReleased(Message):
    """To decode: nobody writes to the failed room's pages any more; they leave quarantine.

    With `when_gone` nobody does once these transfer endpoints, as they were in the worker's life `epoch`, are gone.
    """

    ticket: Ticket
    when_gone: tuple[bytes, ...] = ()
    epoch: int = 0


class Registered(Message):
    """The worker begins a life in the control plane; news of rooms from now on belong to it."""

    epoch: int


class Stop(Message):
    """Finish the step under way, close the transfer endpoint, unmap the pool, exit."""


class ToRank(msgspec.Struct, frozen=True, array_like=True):
    """A batch, applied in order."""

    messages: list[StartSequence | AbortSequence | RoomReserved | RoomEnded | RoomReleased | Registered | Stop]


# ------------------------------------------------------------------------------------------ rank → front


class RankReady(Message):
    """The model is loaded and the pool is mapped. First message of a rank."""

    rank: int
    layout: KvLayout
    num_pages: int
    backend: str
    descriptor: bytes
    model_path: str  # the folder that was loaded; a hub name is resolved
    fingerprint: str
    context_length: int
    vocab_size: int


class RankFailed(Message):
    """The rank cannot start, or must stop. Last message of a rank."""

    rank: int
    reason: str
    message: str


class Prefilled(Message):
    """Prefill: the prompt is computed and all its pages are with decode. `transfer` tells how they went there."""

    sequence_id: int
    cached_tokens: int = 0
    transfer: TransferStats | None = None


class RoomTransferring(Message):
    """Prefill: the first write of a room was submitted."""

    ticket: Ticket


class RoomTransferred(Message):
    """Decode: all bytes of a room are here; `transfer` is the writer's account of it."""

    ticket: Ticket
    nbytes: int
    transfer: TransferStats | None = None


class RoomFailed(Message):
    """This worker gives a room up."""

    ticket: Ticket
    reason: str
    message: str


class RoomQuiet(Message):
    """Prefill: nothing more will be written for a room that ended; `transfer` is what had been, if anything."""

    ticket: Ticket
    transfer: TransferStats | None = None


class RoomFenced(Message):
    """Decode: the room's lost writer can write no more, and the pages are free."""

    ticket: Ticket


class FromRank(msgspec.Struct, frozen=True, array_like=True):
    """What happened in a step, in order. `load` is absent when nothing changed."""

    messages: list[
        RankReady
        | RankFailed
        | Tokens
        | Prefilled
        | Retracted
        | SequenceFailed
        | RoomReserved
        | RoomTransferring
        | RoomTransferred
        | RoomFailed
        | RoomQuiet
        | RoomFenced
        | Audit
        | CacheChanges
    ]
    load: Load | None = None
