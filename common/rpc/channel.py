"""Client channels between the mesh's processes."""

from __future__ import annotations

import grpc

from common.config.tls import Credentials
from common.rpc.options import CHANNEL
from common.rpc.status import error_from

__all__ = ["connect", "error_from"]


def connect(address: str, tls: Credentials | None = None) -> grpc.aio.Channel:
    """A channel to `host:port`, over TLS with `tls`. It connects on first use and again, with backoff, when it breaks.

    Every unary call on it wants a `timeout=`; deadlines do not propagate by themselves.
    """
    if tls is None:
        return grpc.aio.insecure_channel(address, options=CHANNEL)
    options = [*CHANNEL, ("grpc.ssl_target_name_override", tls.server_name)] if tls.server_name else CHANNEL
    credentials = grpc.ssl_channel_credentials(tls.ca, tls.key, tls.certificate)
    return grpc.aio.secure_channel(address, credentials, options=options)
