"""The gRPC server that every service runs on: errors, health, reflection and channelz in one place."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_channelz.v1 import channelz, channelz_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from common.config.tls import Credentials
from common.errors.base import MeshError, Reason
from common.obs import metrics
from common.obs.log import get_logger
from common.rpc.address import is_loopback, join
from common.rpc.interceptor import ErrorInterceptor
from common.rpc.options import SERVER
from common.rpc.reflection import add_reflection

log = get_logger(__name__)

DEFAULT_DEADLINE_S = 60.0
CERTIFICATE_EXPIRES = metrics.gauge(
    "tls_certificate_expiry_seconds", "When the gRPC server's certificate expires, since 1970; 0 without TLS."
)


@dataclass(frozen=True)
class Service:
    """A servicer, its full name as in the proto, and the generated function that adds it to a server."""

    name: str
    add_to_server: Callable[[Any, Any], None]
    servicer: Any


class Server:
    """A running or startable server. `port` is the bound port, known from construction on."""

    def __init__(self, grpc_server: grpc.aio.Server, host: str, port: int, names: Sequence[str]) -> None:
        self.grpc_server = grpc_server
        self.host = host
        self.port = port
        self.names = ("", *names)
        self.health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        self._stopped: asyncio.Task[None] | None = None

    @property
    def address(self) -> str:
        """`host:port` as bound."""
        return join(self.host, self.port)

    async def start(self) -> None:
        """Accept calls; health answers NOT_SERVING until `set_serving(True)`."""
        await self.set_serving(False)
        await self.grpc_server.start()

    async def set_serving(self, serving: bool) -> None:
        """Tell health checks, for "" and every service's name, whether this process does its work."""
        statuses = health_pb2.HealthCheckResponse
        status = statuses.SERVING if serving else statuses.NOT_SERVING
        for name in self.names:
            await self.health.set(name, status)

    async def stop(self, grace_s: float = 0.0) -> None:
        """Refuse new calls at once, cancel those that still run after `grace_s`.

        Idempotent: the first call's grace stands, later ones wait for its end. The stopping has a task of its own,
        for a caller may be one of the calls that it cancels, and gRPC takes a cancelled wait for the end.
        """
        if self._stopped is None:
            self._stopped = asyncio.create_task(self._stop(grace_s))
        await asyncio.shield(self._stopped)

    async def _stop(self, grace_s: float) -> None:
        await self.health.enter_graceful_shutdown()
        await self.grpc_server.stop(grace_s)


def make_server(
    host: str,
    port: int,
    services: Sequence[Service],
    *,
    tls: Credentials | None = None,
    default_deadline_s: float = DEFAULT_DEADLINE_S,
) -> Server:
    """Bind a server for `services`; port 0 picks a free port. Call inside a running event loop.

    With `tls` it speaks TLS alone, and where that names authorities, only with clients that they certify.
    `default_deadline_s` is for unary calls that bring no deadline. Raises `MeshError` (BAD_CONFIG) when the
    address cannot be bound.
    """
    check_free(host, port)
    grpc_server = grpc.aio.server(interceptors=[ErrorInterceptor(default_deadline_s)], options=SERVER)
    try:
        bound = bind(grpc_server, join(host, port), tls)
    except RuntimeError as error:
        raise cannot_listen(host, port, str(error)) from None
    server = Server(grpc_server, host, bound, [service.name for service in services])
    if tls:
        CERTIFICATE_EXPIRES.set(tls.expires_at or 0)
        log.info("gRPC over TLS", address=server.address, mutual=tls.ca is not None, expires=tls.expiry)
    elif not is_loopback(host):
        log.warning("gRPC beyond loopback without TLS: anybody who reaches it may use it", address=server.address)
    for service in services:
        service.add_to_server(service.servicer, grpc_server)
    health_pb2_grpc.add_HealthServicer_to_server(server.health, grpc_server)  # type: ignore[no-untyped-call]
    channelz.add_channelz_servicer(grpc_server)  # type: ignore[no-untyped-call]
    standard = [*health_pb2.DESCRIPTOR.services_by_name.values(), *channelz_pb2.DESCRIPTOR.services_by_name.values()]
    add_reflection(grpc_server, [*(service.name for service in services), *(s.full_name for s in standard)])
    return server


def bind(server: grpc.aio.Server, address: str, tls: Credentials | None) -> int:
    """Add the port and return its number. Raises RuntimeError when it cannot be bound."""
    if tls is None:
        return server.add_insecure_port(address)
    credentials = grpc.ssl_server_credentials(
        [(tls.key or b"", tls.certificate or b"")], tls.ca, require_client_auth=tls.ca is not None
    )
    return server.add_secure_port(address, credentials)


def check_free(host: str, port: int) -> None:
    """Try the address first: gRPC says only in its own log why it could not bind."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise cannot_listen(host, port, error.strerror or str(error)) from None


def cannot_listen(host: str, port: int, why: str) -> MeshError:
    return MeshError(Reason.BAD_CONFIG, f"cannot listen on {join(host, port)}: {why}")
