"""Settings of a router; flags bear the names of SGLang's router where it has them."""

from __future__ import annotations

from dataclasses import dataclass, field

from common.config.bootstrap import BootstrapAddressConfig
from common.config.flags import bad, flag
from common.config.listen import LogConfig
from common.config.tls import TlsConfig
from services.router.policy.registry import NAMES


@dataclass(frozen=True)
class RouterConfig:
    """One router process."""

    host: str = flag("127.0.0.1", "Address that HTTP and gRPC listen on.")
    port: int = flag(8000, "Port of the HTTP server; 0 picks a free one.")
    grpc_port: int = flag(50051, "Port of the gRPC server; 0 picks a free one.")
    http_tls_cert: str | None = flag(None, "PEM file with the HTTP server's certificate chain.", metavar="PATH")
    http_tls_key: str | None = flag(None, "PEM file with the key of --http-tls-cert.", metavar="PATH")
    prefill_policy: str = flag("least_loaded", "How a prefill worker is chosen.", choices=NAMES)
    decode_policy: str = flag("least_loaded", "How a decode worker is chosen.", choices=NAMES)
    tokenizer_path: str | None = flag(
        None, "Folder or hub name of the tokenizer (default: the path that the workers loaded the model from)."
    )
    request_timeout_secs: float = flag(600.0, "Deadline of a request that brings none.")
    max_payload_size: int = flag(4 << 20, "Most bytes of a request body.")
    max_concurrent_requests: int = flag(1024, "Requests that run at once; more wait in the queue.")
    max_queued_requests: int = flag(
        4096,
        "Requests that wait for a place or for decode's credit; more are refused as overloaded.",
        env=("PDMESH_QUEUE_SIZE",),
        aliases=("--queue-size",),
    )
    queue_timeout: float = flag(
        60.0,
        "Most seconds in the queue; then the request is refused as overloaded.",
        env=("PDMESH_QUEUE_TIMEOUT_SECS",),
        aliases=("--queue-timeout-secs",),
    )
    drain_timeout: float = flag(30.0, "Seconds that running requests get to finish after SIGTERM.")

    def __post_init__(self) -> None:
        for name in ("request_timeout_secs", "max_payload_size", "max_concurrent_requests"):
            if getattr(self, name) <= 0:
                raise bad(f"--{name.replace('_', '-')}: must be above 0")
        for name in ("max_queued_requests", "queue_timeout", "drain_timeout"):
            if getattr(self, name) < 0:
                raise bad(f"--{name.replace('_', '-')}: must not be negative")
        for name in ("port", "grpc_port"):
            if not 0 <= getattr(self, name) <= 65535:
                raise bad(f"--{name.replace('_', '-')}: {getattr(self, name)} is not a port")


@dataclass(frozen=True)
class RouterProcessConfig:
    """All settings of a router process. Its metrics are on its HTTP port."""

    router: RouterConfig = field(default_factory=RouterConfig)
    bootstrap: BootstrapAddressConfig = field(default_factory=BootstrapAddressConfig)
    log: LogConfig = field(default_factory=LogConfig)
    tls: TlsConfig = field(default_factory=TlsConfig)
