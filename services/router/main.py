"""The router's process: HTTP and gRPC in one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

from common.config import tls
from common.errors.base import MeshError, Reason
from common.obs import log
from common.rpc import loop
from common.rpc.address import is_loopback, join
from common.rpc.announce import announce
from common.rpc.server import Server, make_server
from services.router.config import RouterConfig, RouterProcessConfig
from services.router.grpc_service import make_service
from services.router.http.app import make_app
from services.router.router import Router

__all__ = ["RouterProcessConfig", "run", "serve"]

BACKLOG = 2048
GRACE_S = 1.0  # for responses that are being written when the drain is over

logger = log.get_logger(__name__)


def run(config: RouterProcessConfig) -> None:
    """Serve until SIGTERM or SIGINT. Raises `MeshError` (BAD_CONFIG) when an address cannot be bound."""
    log.set_up(config.log, "router")
    loop.run(lambda stop: serve(config, stop))


async def serve(config: RouterProcessConfig, stop: asyncio.Event) -> None:
    """Serve until `stop` is set, then drain."""
    settings = config.router
    credentials = tls.load(config.tls)
    tls.load_files(settings.http_tls_cert, settings.http_tls_key, prefix="--http-tls")  # refuse early and clearly
    with bind(settings.host, settings.port) as http_socket:
        changed = asyncio.Event()
        router = Router(
            settings,
            config.bootstrap.address,
            on_change=changed.set,
            log_requests=config.log.log_requests,
            tls=credentials,
        )
        grpc_server = make_server(settings.host, settings.grpc_port, [make_service(router)], tls=credentials)
        http_server = HttpServer(make_app(router), settings)
        http = join(settings.host, http_socket.getsockname()[1])
        if not settings.http_tls_cert and not is_loopback(settings.host):
            logger.warning("HTTP beyond loopback without TLS: anybody who reaches it may use it", address=http)
        await grpc_server.start()
        tasks = [
            asyncio.create_task(http_server.serve([http_socket]), name="http"),
            asyncio.create_task(follow(router, grpc_server, changed), name="health"),
            asyncio.create_task(stop.wait(), name="stop"),
        ]
        try:
            router.start()
            announce("router", grpc=grpc_server.address, http=http, metrics=http)
            logger.info("listening", http=http, grpc=grpc_server.address, bootstrap=config.bootstrap.address)
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            await router.drain(settings.drain_timeout)
        finally:
            http_server.should_exit = True
            await grpc_server.stop(GRACE_S)
            await asyncio.wait(tasks[:1])
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await router.close()


async def follow(router: Router, server: Server, changed: asyncio.Event) -> None:
    """Keep gRPC health at what `/ready` says."""
    was: str | None = None
    while True:
        changed.clear()
        problem = router.not_ready()
        if problem != was:
            await server.set_serving(not problem)
            logger.info("not ready" if problem else "ready", **({"why": problem} if problem else {}))
            was = problem
        await changed.wait()


class HttpServer(uvicorn.Server):
    """uvicorn inside our loop: signals are ours, logging too."""

    def __init__(self, app: ASGIApp, settings: RouterConfig) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                lifespan="off",
                server_header=False,
                proxy_headers=False,  # nobody asks for the client's address
                timeout_graceful_shutdown=int(GRACE_S),
                ssl_certfile=settings.http_tls_cert,
                ssl_keyfile=settings.http_tls_key,
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.contextmanager
def bind(host: str, port: int) -> Iterator[socket.socket]:
    """A listening TCP socket. Accepted connections get TCP_NODELAY from the event loop."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        made = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        message = f"cannot listen on {join(host, port)}: {error.strerror or error}"
        raise MeshError(Reason.BAD_CONFIG, message) from None
    with made:
        made.setblocking(False)
        yield made
