"""What prefill tells decode when all bytes of a sequence are there."""

from __future__ import annotations

import msgspec

from common.mesh.ticket import Ticket
from common.mesh.transfer_stats import TransferStats
from common.transfer.base import TransferError
from common.transfer.checksum import PageSums

VERSION = 2


class HandoverNotice(msgspec.Struct, frozen=True, array_like=True, tag=VERSION):
    """The completion notice of one prefill rank for one room.

    `rank` is the prefill rank that speaks and `nbytes` what it wrote. `token_id` is the first output token;
    `logprobs`, where asked for, its `(token_id, log-probability, ((token_id, log-probability), ...))` with the
    most likely tokens best first. `cached_tokens` is how much of the prompt came from prefill's cache. `transfer`
    tells how the pages travelled, for whoever wants to know.
    `sums` are checksums of what was written, if prefill was told to send them.
    """

    ticket: Ticket
    rank: int
    nbytes: int
    token_id: int
    logprobs: tuple[int, float, tuple[tuple[int, float], ...]] | None = None
    cached_tokens: int = 0
    transfer: TransferStats | None = None
    sums: PageSums | None = None


_decoder = msgspec.msgpack.Decoder(HandoverNotice)


def encode(notice: HandoverNotice) -> bytes:
    """The payload for `TransferBackend.notify`."""
    return msgspec.msgpack.encode(notice)


def decode(payload: bytes) -> HandoverNotice:
    """Read a payload from `TransferBackend.received`. Raises `TransferError` for anything else."""
    try:
        return _decoder.decode(payload)
    except msgspec.DecodeError as error:  # also another version's tag, and fields of a wrong type
        raise TransferError(f"not a hand-over notice of version {VERSION}: {error}") from None
