"""Shows a running mesh live: its workers, the rooms that are open longest, the rooms that failed last."""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from rich.console import Group, RenderableType
from rich.live import Live
from rich.markup import escape

from common.cli import console, tables
from common.cli.workers import all_workers
from common.config.flags import add_flags, bad, flag, resolve
from common.errors.base import MeshError
from pdmesh.v1 import bootstrap_service_pb2 as pb
from pdmesh.v1 import types_pb2 as types

OPEN = (types.ROOM_STATE_BOOTSTRAPPING, types.ROOM_STATE_WAITING_FOR_INPUT, types.ROOM_STATE_TRANSFERRING)
# Open rooms of a state that are counted; beyond, the figure is a lower bound.
MOST_ROOMS = 1000


@dataclass(frozen=True)
class TopConfig:
    """How often, and how much."""

    interval: float = flag(1.0, "Seconds between two looks.")
    count: int = flag(0, "Looks to take; 0 goes on until Ctrl-C.")
    rows: int = flag(10, "Rooms to show of each kind.")
    console: console.ConsoleConfig = field(default_factory=console.ConsoleConfig)

    def __post_init__(self) -> None:
        if not 0.1 <= self.interval < float("inf"):
            raise bad("--interval: must be at least 0.1")
        if self.count < 0 or self.rows < 1:
            raise bad("--count, --rows: must be positive")


@dataclass(frozen=True)
class Look:
    """The mesh at one moment; `opened` is oldest first."""

    workers: list[types.Worker]
    opened: list[types.Room]
    failed: list[types.Room]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, TopConfig)


def run(parsed: argparse.Namespace) -> int:
    config = resolve(TopConfig, parsed)
    console.run(config.console, lambda mesh: watch(mesh, config))
    return 0


async def watch(mesh: console.Bootstraps, config: TopConfig) -> None:
    """Look and show, again and again. Raises `MeshError` when bootstrap is gone."""
    out = console.terminal()
    with ExitStack() as stack:
        live: Live | None = None
        if out.is_terminal and not config.console.json:
            live = stack.enter_context(Live(console=out, screen=config.count != 1, auto_refresh=False))
        looks = 0
        while True:
            try:
                look = await take_look(mesh, config.rows)
            except MeshError as error:
                if live is None or looks == 0:
                    raise
                live.update(f"[red]{escape(error.message)}[/]", refresh=True)  # it may come back
            else:
                if config.console.json:
                    print(json.dumps(to_json(look)), flush=True)
                elif live:
                    live.update(render(look, config.rows), refresh=True)
                else:
                    out.print(render(look, config.rows))
            looks += 1
            if looks == config.count:
                return
            await asyncio.sleep(config.interval)


async def take_look(mesh: console.Bootstraps, rows: int) -> Look:
    workers, failed, *opened = await asyncio.gather(
        all_workers(mesh),
        mesh.rooms(pb.ListRoomsRequest(state=types.ROOM_STATE_FAILED), rows),
        *(mesh.rooms(pb.ListRoomsRequest(state=state), MOST_ROOMS) for state in OPEN),
    )
    rooms = sorted((room for part in opened for room in part), key=lambda room: room.opened_at.ToNanoseconds())
    return Look(workers, rooms, failed)


def render(look: Look, rows: int) -> RenderableType:
    now = time.time()
    states = Counter(tables.word(types.RoomState, room.state) for room in look.opened)
    counts = ", ".join(f"{count} {state}" for state, count in states.items()) or "none"
    parts: list[RenderableType] = [
        f"[bold]pdmesh[/] {time.strftime('%H:%M:%S')}  {len(look.workers)} workers, open rooms: {counts}\n",
        tables.workers_table(look.workers),
    ]
    if look.opened:
        parts += ["\n[bold]open longest[/]", tables.rooms_table(look.opened[:rows], now)]
    if look.failed:
        parts += ["\n[bold]failed last[/]", tables.rooms_table(look.failed[:rows], now)]
    return Group(*parts)


def to_json(look: Look) -> dict[str, Any]:
    return {
        "at": time.time(),
        "workers": [console.to_json(worker) for worker in look.workers],
        "open": [console.to_json(room) for room in look.opened],
        "failed": [console.to_json(room) for room in look.failed],
    }
