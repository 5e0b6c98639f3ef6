"""An engine whose pool belongs to a transfer backend: what the ranks of a hand-over begin with."""

from __future__ import annotations

import os
from collections.abc import Mapping

import msgspec

from common.engine.emulated_times import load_times
from common.engine.engine import Engine
from common.errors.base import MeshError, Reason
from common.obs import log
from common.transfer.base import TransferBackend, TransferConfig, TransferError
from common.transfer.registry import create
from common.worker.build import build_engine, ready_message, runs_on_gpu
from common.worker.config import WorkerConfig
from common.worker.messages import RankReady
from common.worker.start import RankStart
from common.worker.waker import Waker


def read_config(start: RankStart, service: str) -> WorkerConfig:
    """The worker's settings, as its front sent them; sets up this process's log."""
    config = msgspec.msgpack.decode(start.config, type=WorkerConfig)
    log.set_up(config.log, service, rank=start.rank)
    return config


def build_with_transfer(
    start: RankStart, config: WorkerConfig, waker: Waker
) -> tuple[Engine, TransferBackend, RankReady]:
    """Start the backend, load the model, map the pool in the backend's memory.

    Raises:
        MeshError: BAD_CONFIG when the backend cannot be loaded here, or does not do; else as `build_engine`.
    """
    name = config.transfer_backend
    try:
        backend = create(name, transfer_config(config, start.rank), waker.wake)
        if runs_on_gpu(config.engine):  # said before weights are loaded
            check_for_gpu(backend)
        engine = build_engine(config.engine, backend.allocate, backend.register)
        return engine, backend, ready_message(start.rank, engine, name, backend.export())
    except TransferError as error:
        raise MeshError(Reason.BAD_CONFIG, f"--disaggregation-transfer-backend {name}: {error}") from None


def check_for_gpu(backend: TransferBackend, environ: Mapping[str, str] = os.environ) -> None:
    """Refuse what cannot move a pool on a GPU, or would move other memory than the pool's after a while."""
    if not backend.capabilities.device_memory:
        raise TransferError("it moves host memory, and the model runs on a GPU; take nixl or mooncake")
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        if "expandable_segments:true" in environ.get(name, "").lower().replace(" ", ""):
            raise TransferError(
                f"{name}: expandable_segments lets CUDA put other memory behind a registered address; leave it out"
            )


def transfer_config(config: WorkerConfig, rank: int = 0) -> TransferConfig:
    """A rank's endpoint. Raises `MeshError` (BAD_CONFIG) for an emulated engine's times that cannot be had."""
    host, _ = config.advertised
    if config.transfer_backend == "emulated":
        times = load_times(config.engine).transfer
        queues = config.handover.disaggregation_queue_size
        return TransferConfig(
            host, config.host, queues=queues, latency_s=times.latency_s, bytes_per_s=times.bytes_per_s
        )
    mooncake = config.mooncake_file
    return TransferConfig(
        host,
        config.host,
        config.ib_devices(rank),
        config.handover.copy_threads,
        config.handover.disaggregation_queue_size,
        mooncake_host=mooncake.host,
        mooncake_protocol=mooncake.protocol,
        nixl_backend=config.handover.disaggregation_nixl_backend,
        nixl_params=config.handover.nixl_params,
    )
