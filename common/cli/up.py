"""Starts a whole mesh on this machine, each service its own process, and stops it on Ctrl-C.

Takes every setting of the router, the workers and bootstrap as well. Without --model-path it serves the model in
the box, which adds two integers.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shlex
import sys
from pathlib import Path

from common.cli.launch import SERVICES, Launch, UpConfig
from common.cli.supervisor import ChildEnded
from common.config.flags import add_flags, bad, resolve
from common.rpc import loop
from services.router.config import RouterConfig

# Settings that `up` gives each process itself.
OWN = ("bootstrap", "worker-id", "metrics-port", "advertise-address")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, UpConfig, *SERVICES, skip=OWN)


def run(parsed: argparse.Namespace) -> int:
    config = resolve(UpConfig, parsed, file_of=SERVICES)
    if config.status_file:
        path = Path(config.status_file)
        if not path.parent.is_dir():
            raise bad(f"--status-file: {path.parent} is not a folder")
        path.unlink(missing_ok=True)
    return loop.run(lambda stop: serve(config, parsed, stop))


async def serve(config: UpConfig, parsed: argparse.Namespace, stop: asyncio.Event) -> int:
    """Until Ctrl-C (0) or the end of any process of the mesh (1)."""
    launch = Launch(config, parsed)
    coming_up = asyncio.create_task(launch.start())
    asked = asyncio.create_task(stop.wait())
    failure = asyncio.create_task(launch.supervisor.failure())
    try:
        await asyncio.wait((coming_up, asked, failure), return_when=asyncio.FIRST_COMPLETED)
        if coming_up.done():
            tell(launch, coming_up.result(), config.status_file)
            await asyncio.wait((asked, failure), return_when=asyncio.FIRST_COMPLETED)
        if failure.done():
            raise failure.result()
        print("pdmesh: stopping", file=sys.stderr, flush=True)
        return 0
    except ChildEnded as error:
        print(f"pdmesh: {error}\npdmesh: stopping the mesh", file=sys.stderr, flush=True)
        return 1
    finally:
        for task in (coming_up, asked, failure):
            task.cancel()
        await asyncio.gather(coming_up, asked, failure, return_exceptions=True)
        await launch.stop()


def tell(launch: Launch, model: str, status_file: str | None) -> None:
    """Write the status file and print where the mesh is reached."""
    if status_file:
        path = Path(status_file)
        launch.on_restarted = lambda: write_status(launch, path)
        write_status(launch, path)
    router = launch.listening("router")
    bootstraps = [child.listening.grpc for child in launch.of("bootstrap") if child.listening]
    url = f"{'https' if launch.settings(RouterConfig).http_tls_cert else 'http'}://{reachable(router.http or '')}"
    question = {"model": model, "messages": [{"role": "user", "content": "What is 123 + 456?"}], "temperature": 0}
    body = shlex.quote(json.dumps(question))
    print(
        f"\npdmesh serves {model}; workers: {launch.describe_workers()}. Ctrl-C stops it.\n"
        f"  HTTP       {url}\n"
        f"  gRPC       {reachable(router.grpc or '')}\n"
        f"  bootstrap  {', '.join(map(str, bootstraps))}\n\n"
        f"curl -s {url}/v1/chat/completions -H 'Content-Type: application/json' -d {body}\n",
        flush=True,
    )


def write_status(launch: Launch, path: Path) -> None:
    write_atomically(path, json.dumps(launch.status(), indent=2) + "\n")


def reachable(address: str) -> str:
    """An address that can be called: one that listens everywhere is reached on loopback."""
    host, _, port = address.rpartition(":")
    return f"127.0.0.1:{port}" if host in ("0.0.0.0", "[::]", "::") else address


def write_atomically(path: Path, text: str) -> None:
    """Whoever sees the file sees all of it."""
    part = path.with_name(f"{path.name}.{os.getpid()}")
    part.write_text(text)
    part.replace(path)
