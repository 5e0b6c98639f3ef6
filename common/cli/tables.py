"""Workers, rooms and timelines as rich shows them: messages in, tables out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp
from rich.markup import escape
from rich.table import Table

from pdmesh.v1 import bootstrap_service_pb2 as pb
from pdmesh.v1 import types_pb2 as types

WORKER_COLOURS = {"READY": "green", "SUSPECT": "yellow", "DRAINING": "cyan", "OFFLINE": "red"}
ROOM_COLOURS = {"SUCCESS": "green", "FAILED": "red"}


def workers_table(workers: Iterable[types.Worker]) -> Table:
    table = plain("WORKER", "ROLE", "STATE", "ADDRESS", "MODEL")
    for name in ("RUNNING", "WAITING", "CREDIT", "FREE", "RESERVED", "IN USE", "CACHED", "QUARANTINED", "AUDIT"):
        table.add_column(name, justify="right")
    for worker in workers:
        state, load = word(types.WorkerState, worker.state), worker.load
        credit = str(load.credit.pages) if load.HasField("credit") else ""
        table.add_row(
            escape(worker.worker_id),
            word(types.WorkerRole, worker.role).lower(),
            coloured(state, WORKER_COLOURS),
            escape(worker.address),
            escape(worker.model.served_model_name),
            f"{load.running}/{worker.max_running_requests}",
            str(load.waiting),
            credit,
            *(str(pages) for pages in ledger_cells(load.ledger)),
            audit(load.audit),
        )
    return table


def audit(found: types.LedgerAudit) -> str:
    """What a worker's own audits of its pages found."""
    if not found.runs:
        return ""
    if not found.leaked_pages and not found.disputed_pages:
        return "ok"
    return f"[red]{found.leaked_pages} leaked, {found.disputed_pages} disputed[/]"


def rooms_table(rooms: Iterable[types.Room], now: float) -> Table:
    table = plain("ROOM", "REQUEST", "STATE", "PREFILL", "DECODE")
    for name in ("TOKENS", "AGE", "IN STATE"):
        table.add_column(name, justify="right")
    table.add_column("WHY")
    for room in rooms:
        table.add_row(
            room.ticket.room_id,
            escape(f"{room.request_id}/{room.index} #{room.ticket.attempt}"),
            coloured(word(types.RoomState, room.state), ROOM_COLOURS),
            escape(room.prefill_worker_id),
            escape(room.decode_worker_id),
            str(room.prompt_tokens),
            age(room.opened_at, now),
            age(room.changed_at, now),
            escape(f"{room.reason}: {room.message}" if room.reason else ""),
        )
    return table


def timeline_table(timeline: pb.Timeline) -> Table:
    """What happened to a room; times are since its first moment."""
    table = plain()
    table.add_column("AFTER", justify="right")
    for name in ("EVENT", "BY", "STATE", "PREFILL THEN", "DECODE THEN", "WHY"):
        table.add_column(name)
    moments = timeline.moments
    start = seconds_of(moments[0].at) if moments else 0.0
    for moment in moments:
        times = f" {moment.count} times" if moment.count > 1 else ""
        why = f"{moment.reason}: {moment.message}" if moment.reason else moment.message
        if moment.refused:
            why = f"refused{times}, {moment.refused}: {moment.refusal}" + (f" ({why})" if why else "")
        table.add_row(
            f"{seconds_of(moment.at) - start:.3f} s",
            moment.event,
            escape(moment.by),
            coloured(word(types.RoomState, moment.state), ROOM_COLOURS),
            figures(moment.prefill if moment.HasField("prefill") else None),
            figures(moment.decode if moment.HasField("decode") else None),
            escape(why),
        )
    return table


def transfer_words(transfer: types.TransferStats) -> str:
    """How a room's pages travelled, in a line."""
    pieces = "piece" if transfer.descriptors == 1 else "pieces"
    took, queued, hidden, exposed = (
        f"{duration.ToNanoseconds() / 1e9:.4f} s"
        for duration in (transfer.duration, transfer.queued, transfer.hidden, transfer.exposed)
    )
    rate = f" ({transfer.bytes_per_second / 1e6:,.1f} MB/s)" if transfer.bytes_per_second else ""
    return (
        f"{transfer.bytes / 1e6:,.3f} MB in {transfer.descriptors} {pieces} by {transfer.backend} in {took}{rate}, "
        f"{hidden} of it while the prompt was computed; {queued} in the queue; done {exposed} after the prompt"
    )


def figures(worker: pb.WorkerFigures | None) -> str:
    """A worker's load in a few words."""
    if worker is None:
        return "unknown"
    load = worker.load
    cells = ledger_cells(load.ledger)
    words = f"{load.running} run, {load.waiting} wait, {cells[0]}/{sum(cells)} free"
    if load.HasField("credit"):
        words += f", credit {load.credit.pages}"
    state = word(types.WorkerState, worker.state)
    return words if state == "READY" else f"{coloured(state, WORKER_COLOURS)} {words}"


def ledger_cells(ledger: types.Ledger) -> tuple[int, int, int, int, int]:
    return ledger.free, ledger.reserved, ledger.in_use, ledger.cached, ledger.quarantined


def plain(*columns: str) -> Table:
    return Table(*columns, box=None, pad_edge=False, header_style="bold")


def word(enum: Any, value: int) -> str:
    """A value of a proto's enum without the enum's prefix, such as READY."""
    prefix = enum.Name(0).removesuffix("UNSPECIFIED")
    return str(enum.Name(value).removeprefix(prefix))


def coloured(text: str, colours: dict[str, str]) -> str:
    return f"[{colours[text]}]{text}[/]" if text in colours else text


def seconds_of(time: Timestamp) -> float:
    return time.ToNanoseconds() / 1e9


def age(since: Timestamp, now: float) -> str:
    """How long ago, as people read it."""
    value = max(0.0, now - seconds_of(since))
    if value < 100:
        return f"{value:.1f} s"
    return f"{value / 60:.0f} min" if value < 6000 else f"{value / 3600:.1f} h"
