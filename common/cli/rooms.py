"""Lists the hand-overs of a running mesh, newest first."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field

from common.cli import console, tables
from common.config.flags import add_flags, bad, flag, resolve
from pdmesh.v1 import bootstrap_service_pb2 as pb
from pdmesh.v1 import types_pb2 as types

STATES = ("bootstrapping", "waiting_for_input", "transferring", "success", "failed")


@dataclass(frozen=True)
class RoomsConfig:
    """Which rooms."""

    state: str | None = flag(None, "Only rooms in this state.", choices=STATES)
    worker: str = flag("", "Only rooms of this worker.")
    request_id: str = flag("", "Only rooms of this request.")
    min_age: float = flag(0.0, "Only rooms opened at least so many seconds ago.")
    limit: int = flag(50, "At most so many.")
    console: console.ConsoleConfig = field(default_factory=console.ConsoleConfig)

    def __post_init__(self) -> None:
        if self.limit < 1:
            raise bad("--limit: must be at least 1")
        if not 0 <= self.min_age < float("inf"):
            raise bad("--min-age: must not be negative")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, RoomsConfig)


def run(parsed: argparse.Namespace) -> int:
    config = resolve(RoomsConfig, parsed)
    request = request_of(config)
    rooms = console.run(config.console, lambda mesh: mesh.rooms(request, config.limit))
    if config.console.json:
        console.print_json([console.to_json(room) for room in rooms])
    else:
        console.terminal().print(tables.rooms_table(rooms, time.time()) if rooms else "no such room")
    return 0


def request_of(config: RoomsConfig) -> pb.ListRoomsRequest:
    request = pb.ListRoomsRequest(worker_id=config.worker, request_id=config.request_id)
    if config.state:
        request.state = types.RoomState.Value(f"ROOM_STATE_{config.state.upper()}")
    request.min_age.FromNanoseconds(round(config.min_age * 1e9))
    return request
