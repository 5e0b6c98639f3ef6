"""The completion notice on the wire."""

from __future__ import annotations

import msgspec
import pytest

from common.mesh.ticket import Ticket
from common.transfer.base import TransferError
from common.transfer.checksum import PageSums
from common.transfer.notice import HandoverNotice, decode, encode

pytestmark = pytest.mark.unit

NOTICE = HandoverNotice(Ticket("room", 2, 7), rank=1, nbytes=4096, token_id=42)


def test_round_trip() -> None:
    assert decode(encode(NOTICE)) == NOTICE
    full = msgspec.structs.replace(NOTICE, logprobs=(42, -0.5, ((42, -0.5), (3, -1.25))), cached_tokens=16)
    assert decode(encode(full)) == full
    summed = msgspec.structs.replace(full, sums=PageSums(3, 16, bytes(range(24))))
    assert decode(encode(summed)) == summed


def test_version_comes_first() -> None:
    assert msgspec.msgpack.decode(encode(NOTICE))[0] == 2


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xff",
        msgspec.msgpack.encode("text"),
        msgspec.msgpack.encode([1, ["room", 2, 7], 1, 4096, 42]),
        msgspec.msgpack.encode([2, ["room", 2, 7], 1]),
    ],
    ids=["empty", "not msgpack", "not an array", "another version", "too short"],
)
def test_anything_else_is_refused(payload: bytes) -> None:
    with pytest.raises(TransferError, match="not a hand-over notice"):
        decode(payload)
