"""Client channels between the mesh's processes."""

from __future__ import annotations

import grpc

from common.rpc.options import CHANNEL
from common.rpc.status import error_from

__all__ = ["connect", "error_from"]


def connect(address: str) -> grpc.aio.Channel:
    """A channel to `host:port`. It connects on first use and again, with backoff, whenever it breaks.

    Every unary call on it wants a `timeout=`; deadlines do not propagate by themselves.
    """
    return grpc.aio.insecure_channel(address, options=CHANNEL)
