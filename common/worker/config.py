"""Settings of a worker; flags bear SGLang's names."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from common.config.bootstrap import BootstrapAddressConfig
from common.config.flags import bad, flag
from common.config.listen import LogConfig, MetricsConfig
from common.config.tls import TlsConfig
from common.config.transfer import (
    IB_DEVICE,
    MOONCAKE_FILE,
    MooncakeFile,
    check_present,
    ib_device_map,
    ib_devices,
    nixl_params,
    read_mooncake_file,
)
from common.engine.config import EngineConfig
from common.rpc.address import is_loopback, join, split

BACKENDS = ("local", "mooncake", "nixl")
EVERYWHERE = ("", "0.0.0.0", "::")  # hosts that a server can listen on, and nobody can reach


@dataclass(frozen=True)
class HandoverConfig:
    """How pages travel between workers."""

    disaggregation_transfer_backend: str = flag("local", "Engine that moves the pages.", choices=BACKENDS)
    disaggregation_ib_device: str | None = flag(
        None,
        "RDMA devices of the transfer engine: mlx5_0 or mlx5_0,mlx5_1 for every GPU, a JSON object from GPU to "
        "devices, or a .json file with one (default: the engine chooses).",
        metavar="NAMES",
    )
    mooncake_config_path: str | None = flag(
        None,
        "Mooncake's JSON file; its local_hostname, protocol and device_name hold for the mooncake backend.",
        env=("MOONCAKE_CONFIG_PATH",),
        metavar="FILE",
    )
    disaggregation_nixl_backend: str = flag(
        "UCX", "NIXL's plugin that moves the pages.", env=("SGLANG_DISAGGREGATION_NIXL_BACKEND",)
    )
    disaggregation_nixl_backend_params: str = flag(
        "{}",
        "Parameters of NIXL's plugin, a JSON object of texts.",
        env=("SGLANG_DISAGGREGATION_NIXL_BACKEND_PARAMS",),
        metavar="JSON",
    )
    optimistic_prefill: bool = flag(False, "Let an idle prefill worker begin before decode has reserved pages.")
    disaggregation_decode_enable_radix_cache: bool = flag(
        False, "Let a decode worker keep prefixes, so that only pages that it lacks travel."
    )
    kv_checksum: str = flag(
        "off",
        "Pages verified on arrival by a checksum; sample takes every 16th. The prefill worker's setting counts.",
        choices=("off", "sample", "full"),
    )
    transfer_timeout: float = flag(30.0, "Seconds after which one submitted transfer counts as failed.")
    disaggregation_thread_pool_size: int | None = flag(
        None,
        "Threads of a rank that write pages to its peers (default: an eighth of three quarters of the cores, at least "
        "4, at most 12, but no more than half of the cores).",
        env=("SGLANG_DISAGGREGATION_THREAD_POOL_SIZE",),
    )
    disaggregation_queue_size: int = flag(
        4,
        "Queues of transfers to each peer. A room stays in one; the threads take turns over all, and each is bounded.",
        env=("SGLANG_DISAGGREGATION_QUEUE_SIZE",),
    )

    def __post_init__(self) -> None:
        if not self.transfer_timeout > 0:
            raise bad(f"--transfer-timeout: {self.transfer_timeout} is not above 0")
        if self.disaggregation_thread_pool_size is not None and self.disaggregation_thread_pool_size < 1:
            raise bad("--disaggregation-thread-pool-size: must be at least 1")
        if self.disaggregation_queue_size < 1:
            raise bad("--disaggregation-queue-size: must be at least 1")
        ib_device_map(self.disaggregation_ib_device)  # which may be refused
        nixl_params(self.disaggregation_nixl_backend_params)

    @property
    def nixl_params(self) -> Mapping[str, str]:
        """Parameters of NIXL's plugin."""
        return nixl_params(self.disaggregation_nixl_backend_params)

    @property
    def copy_threads(self) -> int:
        """Threads that write; the default is SGLang's, but leaves half of the cores to the model."""
        if self.disaggregation_thread_pool_size is not None:
            return self.disaggregation_thread_pool_size
        cores = len(os.sched_getaffinity(0))
        return max(1, min(max(int(0.75 * cores) // 8, 4), 12, cores // 2))


@dataclass(frozen=True)
class WorkerConfig:
    """A worker's front."""

    host: str = flag("127.0.0.1", "Address to listen on.")
    port: int = flag(30000, "gRPC port; 0 picks a free one.")
    advertise_address: str | None = flag(
        None, "host[:port] that others reach this worker by (default: where it listens).", metavar="HOST[:PORT]"
    )
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

    @property
    def advertised(self) -> tuple[str, int | None]:
        """Host that others reach this worker and its ranks by, and the gRPC port if it is not the one listened on."""
        if self.advertise_address is None:
            return self.host, None
        try:
            return split(self.advertise_address)
        except ValueError as error:
            raise bad(f"--advertise-address: {error}") from None

    def address(self, port: int) -> str:
        """`host:port` for others, of a gRPC server that listens on `port`."""
        host, other_port = self.advertised
        return join(host, other_port or port)

    @property
    def mooncake_file(self) -> MooncakeFile:
        """What Mooncake's file says, where Mooncake moves the pages."""
        return read_mooncake_file(self.handover.mooncake_config_path if self.transfer_backend == "mooncake" else None)

    def ib_devices(self, rank: int = 0) -> tuple[str, ...]:
        """RDMA devices of a rank, by its GPU; refused if this machine lacks one. None: the engine chooses."""
        file, flagged = self.mooncake_file, self.handover.disaggregation_ib_device
        if self.transfer_backend not in ("mooncake", "nixl") or file.protocol == "tcp":
            return ()
        devices = ib_devices(flagged, self.engine.base_gpu_id + rank) if flagged is not None else file.devices
        check_present(devices, IB_DEVICE if flagged is not None else MOONCAKE_FILE)
        return devices

    def __post_init__(self) -> None:
        self._check_address()
        self.ib_devices()
        if not self.engine.model_path:
            raise bad("--model-path: name a checkpoint folder or a hub name")
        if self.engine.engine == "emulated" and self.handover.kv_checksum != "off":
            raise bad(f"--kv-checksum: {self.handover.kv_checksum}: the pages of an emulated engine have no bytes")

    def _check_address(self) -> None:
        host, _ = self.advertised
        if host in EVERYWHERE:
            what = "--host" if self.advertise_address is None else "--advertise-address"
            raise bad(f"{what}: others cannot reach {host!r}; --advertise-address says how they can")
        if is_loopback(self.host) and not is_loopback(host):
            raise bad(f"--advertise-address: nobody reaches {host} while --host is {self.host}, loopback alone")
