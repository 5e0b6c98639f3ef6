"""Takes a worker out of service: it finishes what it has, takes nothing new, and leaves."""

from __future__ import annotations

import argparse
import asyncio
import time
from dataclasses import dataclass, field

from common.cli import console
from common.cli.workers import all_workers
from common.config.flags import add_flags, bad, flag, resolve
from pdmesh.v1 import bootstrap_service_pb2 as pb
from pdmesh.v1 import types_pb2 as types

POLL_S = 0.5


@dataclass(frozen=True)
class DrainConfig:
    """How long it may take."""

    drain_timeout: float | None = flag(None, "Seconds for what runs there (default: the worker's own).")
    wait: bool = flag(True, "Wait until the worker is gone.")
    console: console.ConsoleConfig = field(default_factory=console.ConsoleConfig)

    def __post_init__(self) -> None:
        if self.drain_timeout is not None and not 0 <= self.drain_timeout < float("inf"):
            raise bad("--drain-timeout: must not be negative")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("worker", metavar="WORKER", help="the worker's id")
    add_flags(parser, DrainConfig)


def run(parsed: argparse.Namespace) -> int:
    config = resolve(DrainConfig, parsed)
    console.run(config.console, lambda mesh: drain(mesh, config, parsed.worker))
    return 0


async def drain(mesh: console.Bootstraps, config: DrainConfig, worker_id: str) -> None:
    """Drain the worker and tell how it goes. Raises `MeshError`."""
    request = pb.DrainWorkerRequest(worker_id=worker_id)
    if config.drain_timeout is not None:
        request.timeout.FromNanoseconds(round(config.drain_timeout * 1e9))
    start = time.monotonic()
    answer = await mesh.one("DrainWorker", request)
    if not config.console.json:
        print(f"{worker_id} drains: {answer.worker.load.running} sequences run there", flush=True)
    if config.wait:
        await wait_until_gone(mesh, worker_id, answer.worker.epoch)
    if config.console.json:
        console.print_json({"worker": console.to_json(answer.worker), "left": config.wait})
    elif config.wait:
        print(f"{worker_id} has left after {time.monotonic() - start:.1f} s")


async def wait_until_gone(mesh: console.Bootstraps, worker_id: str, epoch: int) -> None:
    """Until that life of the worker has ended."""
    while True:
        workers = {worker.worker_id: worker for worker in await all_workers(mesh)}
        worker = workers.get(worker_id)
        if worker is None or worker.epoch != epoch or worker.state == types.WORKER_STATE_OFFLINE:
            return
        await asyncio.sleep(POLL_S)
