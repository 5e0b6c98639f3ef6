"""Settings of bootstrap; flags and variables bear SGLang's names where it has them."""

from __future__ import annotations

from dataclasses import dataclass, field

from common.config.bootstrap import DEFAULT_BOOTSTRAP_PORT
from common.config.flags import bad, flag
from common.config.listen import LogConfig, MetricsConfig
from common.config.tls import EtcdTlsConfig, TlsConfig
from common.mesh.room import Timeouts


@dataclass(frozen=True)
class BootstrapConfig:
    """The control plane."""

    host: str = flag("127.0.0.1", "Address to listen on.")
    port: int = flag(DEFAULT_BOOTSTRAP_PORT, "gRPC port; 0 picks a free one.")
    store: str = flag(
        "memory",
        "memory, etcd (a private one) or etcd://[user:password@]host:port[,host:port...]; etcds:// for TLS.",
        secret=True,
    )
    disaggregation_bootstrap_timeout: float = flag(
        300.0,
        "Seconds that a room may wait for decode's reservation.",
        env=("SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT",),
    )
    disaggregation_waiting_timeout: float = flag(
        300.0,
        "Seconds from the reservation to the first write.",
        env=("SGLANG_DISAGGREGATION_WAITING_TIMEOUT",),
    )
    disaggregation_transfer_timeout: float = flag(300.0, "Seconds from the first write to the last.")
    disaggregation_heartbeat_interval: float = flag(
        5.0,
        "Seconds between a worker's signs of life.",
        env=("SGLANG_DISAGGREGATION_HEARTBEAT_INTERVAL",),
    )
    disaggregation_heartbeat_max_failure: int = flag(
        2,
        "Missed signs of life after which a worker is offline.",
        env=("SGLANG_DISAGGREGATION_HEARTBEAT_MAX_FAILURE",),
    )
    on_store_loss: str = flag(
        "serve",
        "What becomes of new requests while the store is away: serve them, or refuse them; running rooms go on.",
        choices=("serve", "refuse"),
    )
    lease_ttl: int = flag(3, "Seconds after which a silent replica's shards are taken over by others (etcd).")
    advertise_address: str | None = flag(
        None, "host:port that others reach this replica by (default: where it listens)."
    )
    room_history: int = flag(10_000, "Closed rooms that are kept for inspection.")

    def __post_init__(self) -> None:
        for name in ("bootstrap_timeout", "waiting_timeout", "transfer_timeout", "heartbeat_interval"):
            if not 0 < getattr(self, f"disaggregation_{name}") < float("inf"):
                raise bad(f"--disaggregation-{name.replace('_', '-')}: must be above 0")
        if self.disaggregation_heartbeat_max_failure < 1:
            raise bad("--disaggregation-heartbeat-max-failure: must be at least 1")
        if self.lease_ttl < 1:
            raise bad("--lease-ttl: must be at least 1")
        if self.room_history < 0:
            raise bad("--room-history: must not be negative")
        if not 0 <= self.port < 65536:
            raise bad(f"--port: {self.port} is not a port")

    @property
    def timeouts(self) -> Timeouts:
        return Timeouts(
            self.disaggregation_bootstrap_timeout,
            self.disaggregation_waiting_timeout,
            self.disaggregation_transfer_timeout,
        )


@dataclass(frozen=True)
class BootstrapProcessConfig:
    """All that a bootstrap process is told."""

    bootstrap: BootstrapConfig = field(default_factory=BootstrapConfig)
    log: LogConfig = field(default_factory=LogConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    tls: TlsConfig = field(default_factory=TlsConfig)
    etcd_tls: EtcdTlsConfig = field(default_factory=EtcdTlsConfig)
