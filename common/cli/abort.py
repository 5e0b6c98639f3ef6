"""Ends a hand-over that is under way; its request fails with ABORTED."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field

from common.cli import console
from common.config.flags import add_flags, flag, resolve
from pdmesh.v1 import bootstrap_service_pb2 as pb


@dataclass(frozen=True)
class AbortConfig:
    """What the client is told."""

    message: str = flag("", "Why, for the client and for `pdmesh explain`.")
    console: console.ConsoleConfig = field(default_factory=console.ConsoleConfig)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("room", metavar="ROOM", help="the room's id; see `pdmesh rooms`")
    add_flags(parser, AbortConfig)


def run(parsed: argparse.Namespace) -> int:
    config = resolve(AbortConfig, parsed)
    request = pb.AbortRoomRequest(room_id=parsed.room, message=config.message)
    answer = console.run(config.console, lambda mesh: mesh.one("AbortRoom", request))
    if config.console.json:
        console.print_json(console.to_json(answer.room))
    else:
        print(f"room {answer.room.ticket.room_id} has ended: {answer.room.message}")
    return 0
