"""Lists the workers of a running mesh with their load and their pages."""

from __future__ import annotations

import argparse
from typing import Any

from common.cli import console, tables
from common.config.flags import add_flags, resolve
from pdmesh.v1 import bootstrap_service_pb2 as pb


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, console.ConsoleConfig)


def run(parsed: argparse.Namespace) -> int:
    config = resolve(console.ConsoleConfig, parsed)
    workers = console.run(config, all_workers)
    if config.json:
        console.print_json([console.to_json(worker) for worker in workers])
    else:
        console.terminal().print(tables.workers_table(workers) if workers else "no worker is registered")
    return 0


async def all_workers(mesh: console.Bootstraps) -> list[Any]:
    """Every worker once, by id; of two replicas' records that with the higher epoch."""
    latest: dict[str, Any] = {}
    for answer in await mesh.all("ListWorkers", pb.ListWorkersRequest()):
        for worker in answer.workers:
            known = latest.get(worker.worker_id)
            if known is None or worker.epoch > known.epoch:
                latest[worker.worker_id] = worker
    return [latest[name] for name in sorted(latest)]
