"""Starts many emulated workers in one process: to try routing, capacity and the control plane at scale.

Each is a whole worker to the mesh, with its own address, session, heartbeats, pages and hand-overs, but its engine is
emulated. Takes every setting of a worker; with a given --worker-id the workers are called that, and a number.
"""

from __future__ import annotations

import argparse
import asyncio
import resource
from dataclasses import dataclass, replace
from typing import Any

from common.cli.default_model import default_model_path
from common.config.flags import add_flags, bad, flag, resolve
from common.obs import log
from common.rpc import loop
from common.rpc.announce import announce
from common.worker.config import WorkerConfig
from common.worker.emulated import LocalFront

ROLES = ("prefill", "decode", "unified", "pd")
OWN = ("port", "engine", "metrics-port")  # which each worker cannot have

logger = log.get_logger(__name__)


@dataclass(frozen=True)
class EmulateConfig:
    """Settings of `pdmesh emulate` itself, and those whose defaults differ for it."""

    workers: int = flag(100, "How many workers.")
    role: str = flag("pd", "What they are; pd is prefill and decode by turns.", choices=ROLES)
    model_path: str = flag(
        "",
        "Folder or hub name whose config.json and tokenizer are used (default: the model in the box).",
        aliases=("--model",),
    )

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise bad("--workers: must be at least 1")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, EmulateConfig, WorkerConfig, skip=OWN)


def run(parsed: argparse.Namespace) -> int:
    emulate = resolve(EmulateConfig, parsed, file_of=(WorkerConfig,))
    given = argparse.Namespace(**{**vars(parsed), "engine": "emulated", "port": 0})
    given.model_path = emulate.model_path or str(default_model_path())
    config = resolve(WorkerConfig, given, file_of=(EmulateConfig,))
    if config.advertised[1]:
        raise bad("--advertise-address: many workers cannot share a port; give the host alone")
    log.set_up(config.log, "emulate")
    raise_descriptor_limit()
    loop.run(lambda stop: serve(emulate, config, stop))
    return 0


async def serve(emulate: EmulateConfig, config: WorkerConfig, stop: asyncio.Event) -> None:
    """Until SIGTERM or SIGINT, or until one worker cannot go on. Raises its `MeshError` then."""
    roles = ("prefill", "decode") if emulate.role == "pd" else (emulate.role,)
    name = config.worker_id or "emulated"
    fronts = [
        make_front(roles[i % len(roles)], replace(config, worker_id=f"{name}-{roles[i % len(roles)]}-{i}"))
        for i in range(emulate.workers)
    ]
    ready = asyncio.create_task(tell_when_ready(fronts))
    try:
        async with asyncio.TaskGroup() as group:
            for front in fronts:
                group.create_task(front.serve(stop))
    except* Exception as errors:
        raise errors.exceptions[0] from None
    finally:
        ready.cancel()


async def tell_when_ready(fronts: list[LocalFront[Any]]) -> None:
    for front in fronts:
        await front.registered.wait()
    logger.info("ready", workers=len(fronts))
    announce("emulate")


def make_front(role: str, config: WorkerConfig) -> LocalFront[Any]:
    """One worker. The services are imported here: a command must not make `pdmesh --help` slow."""
    if role == "prefill":
        from services.prefill.service import ROLE

        return LocalFront(ROLE, config)
    from services.decode.service import DECODE, UNIFIED

    return LocalFront(DECODE if role == "decode" else UNIFIED, config)


def raise_descriptor_limit() -> None:
    """As many open files as this user may have: a worker has half a dozen, and one for each peer."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
