"""The prefill worker's process."""

from __future__ import annotations

from common.obs import log
from common.rpc import loop
from common.worker.config import WorkerConfig
from common.worker.emulated import make_front
from services.prefill.service import ROLE


def run(config: WorkerConfig) -> None:
    """Serve until SIGTERM or SIGINT. Raises `MeshError` when the worker cannot start or go on."""
    log.set_up(config.log, ROLE.name)
    loop.run(lambda stop: make_front(ROLE, config).run(stop))
