"""Tells what became of a request or a room, and why: the cause in a sentence, then what happened, line by line."""

from __future__ import annotations

import argparse
from typing import Any

from rich.markup import escape

from common.cli import console, tables
from common.config.flags import add_flags, resolve
from common.errors.base import MeshError, Reason
from pdmesh.v1 import bootstrap_service_pb2 as pb
from pdmesh.v1 import types_pb2 as types


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", metavar="ID", help="a request's or a room's id")
    add_flags(parser, console.ConsoleConfig)


def run(parsed: argparse.Namespace) -> int:
    config = resolve(console.ConsoleConfig, parsed)
    answer = console.run(config, lambda mesh: explain(mesh, parsed.id))
    if config.json:
        console.print_json(console.to_json(answer))
    else:
        show(answer)
    return 0


async def explain(mesh: console.Bootstraps, name: str) -> Any:
    """What is known of the request `name`, or else of the room. Raises `MeshError` (NOT_FOUND)."""
    try:
        return await mesh.one("Explain", pb.ExplainRequest(request_id=name))
    except MeshError as error:
        if error.reason is not Reason.NOT_FOUND:
            raise
    try:
        return await mesh.one("Explain", pb.ExplainRequest(room_id=name))
    except MeshError as error:
        if error.reason is not Reason.NOT_FOUND:
            raise
        message = f"neither a request nor a room {name!r} is remembered; see --room-history of bootstrap"
        raise MeshError(Reason.NOT_FOUND, message) from None


def show(answer: pb.ExplainResponse) -> None:
    out = console.terminal()
    reason = f" [red]{escape(answer.reason)}[/]" if answer.reason else ""
    out.print(f"[bold]{escape(answer.summary)}[/]{reason}", soft_wrap=True)
    for explained in answer.rooms:
        room = explained.room
        state = tables.coloured(tables.word(types.RoomState, room.state), tables.ROOM_COLOURS)
        ids = f"room {room.ticket.room_id}, request {room.request_id}/{room.index}, attempt {room.ticket.attempt}"
        route = f"{room.prefill_worker_id} → {room.decode_worker_id}, {room.prompt_tokens} prompt tokens"
        out.print(f"\n{escape(ids)}: {state}, {escape(route)}")
        if len(answer.rooms) > 1:
            out.print(escape(explained.summary), soft_wrap=True)
        out.print(tables.timeline_table(explained.timeline))
        if explained.HasField("transfer"):
            out.print(escape(tables.transfer_words(explained.transfer)), soft_wrap=True)
        if explained.pending:
            out.print(f"[yellow]{escape(explained.pending)}[/]", soft_wrap=True)
        if explained.timeline.dropped:
            out.print(f"and {explained.timeline.dropped} more refused events")
    for refused in answer.refused:
        workers = f"{refused.wanted.prefill_worker_id} → {refused.wanted.decode_worker_id}"
        out.print(
            f"\nnot opened, {escape(workers)}: [red]{refused.reason}[/] {escape(refused.message)}", soft_wrap=True
        )
    if answer.HasField("failure"):
        failure = answer.failure
        out.print(f"\nthe router said: [red]{failure.reason}[/] {escape(failure.message)}", soft_wrap=True)
