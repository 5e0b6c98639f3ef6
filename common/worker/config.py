"""Settings of a worker; flags bear SGLang's names."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from common.config.bootstrap import BootstrapAddressConfig
from common.config.flags import bad, flag
from common.config.listen import LogConfig, MetricsConfig
from common.config.tls import TlsConfig
from common.engine.config import EngineConfig

BACKENDS = ("local", "mooncake", "nixl")


@dataclass(frozen=True)
class HandoverConfig:
    """How pages travel between workers."""

    disaggregation_transfer_backend: str = flag("local", "Engine that moves the pages.", choices=BACKENDS)
    disaggregation_ib_device: str | None = flag(None, "RDMA device of the transfer engine, such as mlx5_roce0.")
    optimistic_prefill: bool = flag(False, "Let an idle prefill worker begin before decode has reserved pages.")
    transfer_timeout: float = flag(30.0, "Seconds after which one submitted transfer counts as failed.")
    disaggregation_thread_pool_size: int | None = flag(
        None,
        "Threads that copy pages to one peer, with the local backend; the others have their own "
        "(default: an eighth of three quarters of the cores, at least 4, at most 12).",
        env=("SGLANG_DISAGGREGATION_THREAD_POOL_SIZE",),
    )
    disaggregation_queue_size: int = flag(
        4,
        "Queues of transfers that share the threads. Checked, but not used yet: one queue a peer.",
        env=("SGLANG_DISAGGREGATION_QUEUE_SIZE",),
    )

    def __post_init__(self) -> None:
        if not self.transfer_timeout > 0:
            raise bad(f"--transfer-timeout: {self.transfer_timeout} is not above 0")
        if self.disaggregation_thread_pool_size is not None and self.disaggregation_thread_pool_size < 1:
            raise bad("--disaggregation-thread-pool-size: must be at least 1")
        if self.disaggregation_queue_size < 1:
            raise bad("--disaggregation-queue-size: must be at least 1")

    @property
    def copy_threads(self) -> int:
        """Threads that copy to one peer; the default is SGLang's."""
        if self.disaggregation_thread_pool_size is not None:
            return self.disaggregation_thread_pool_size
        return min(max(int(0.75 * len(os.sched_getaffinity(0))) // 8, 4), 12)


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
    tls: TlsConfig = field(default_factory=TlsConfig)

    @property
    def transfer_backend(self) -> str:
        """Name of the backend that moves pages; an emulated engine, whose pool has no memory, brings its own."""
        return "emulated" if self.engine.engine == "emulated" else self.handover.disaggregation_transfer_backend

    def __post_init__(self) -> None:
        if not self.engine.model_path:
            raise bad("--model-path: name a checkpoint folder or a hub name")
