"""Settings of a worker; flags bear SGLang's names."""

from __future__ import annotations

from dataclasses import dataclass, field

from common.config.bootstrap import BootstrapAddressConfig
from common.config.flags import bad, flag
from common.config.listen import LogConfig, MetricsConfig
from common.engine.config import EngineConfig

BACKENDS = ("local", "mooncake", "nixl")


@dataclass(frozen=True)
class HandoverConfig:
    """How pages travel between workers."""

    disaggregation_transfer_backend: str = flag("local", "Engine that moves the pages.", choices=BACKENDS)
    disaggregation_ib_device: str | None = flag(None, "RDMA device of the transfer engine, such as mlx5_roce0.")
    transfer_timeout: float = flag(30.0, "Seconds after which one submitted transfer counts as failed.")

    def __post_init__(self) -> None:
        if not self.transfer_timeout > 0:
            raise bad(f"--transfer-timeout: {self.transfer_timeout} is not above 0")


@dataclass(frozen=True)
class WorkerConfig:
    """A worker's front."""

    host: str = flag("127.0.0.1", "Address to listen on.")
    port: int = flag(30000, "gRPC port; 0 picks a free one.")
    worker_id: str | None = flag(None, "Name in the mesh (default: role, host and port).")
    bootstrap_connect_timeout: float = flag(30.0, "Seconds to wait for bootstrap at start-up.")
    drain_timeout: float = flag(30.0, "Seconds that running sequences have to finish after SIGTERM.")
    bootstrap: BootstrapAddressConfig = field(default_factory=BootstrapAddressConfig)
    handover: HandoverConfig = field(default_factory=HandoverConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    log: LogConfig = field(default_factory=LogConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)

    def __post_init__(self) -> None:
        if not self.engine.model_path:
            raise bad("--model-path: name a checkpoint folder or a hub name")
