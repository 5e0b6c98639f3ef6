"""How a front and a new rank meet: what the rank reads from its standard input, and their socket's options."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec
import zmq

T = TypeVar("T")


class RankStart(msgspec.Struct, frozen=True, array_like=True):
    """All that a rank is told at its start; never on the command line, which every user can read.

    `config` is the front's config dataclass as msgpack; `address` is the front's ZeroMQ endpoint.
    """

    address: str
    front_pid: int
    rank: int
    config: bytes

    def config_as(self, kind: type[T]) -> T:
        """The config, which is a `kind`."""
        return msgspec.msgpack.decode(self.config, type=kind)


def configure(socket: zmq.Socket[Any], linger_ms: int) -> None:
    """No message is dropped or blocks its sender: what is in flight is bounded by the sequences that run."""
    socket.set_hwm(0)
    socket.linger = linger_ms
