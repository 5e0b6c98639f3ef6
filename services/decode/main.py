"""The decode worker's process, and the unified worker's."""

from __future__ import annotations

from common.obs import log
from common.rpc import loop
from common.worker.config import WorkerConfig
from common.worker.emulated import make_front
from services.decode.service import DECODE, UNIFIED


def run(config: WorkerConfig, *, unified: bool = False) -> None:
    """Serve until SIGTERM or SIGINT. Raises `MeshError` when the worker cannot start or go on."""
    role = UNIFIED if unified else DECODE
    log.set_up(config.log, role.name)
    loop.run(lambda stop: make_front(role, config).run(stop))
