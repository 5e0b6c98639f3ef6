"""A worker's rank as it is, but that it writes down when its steps and its transfers began and ended.

`overlap.py` starts such ranks and plays their fronts. Times are those of the monotonic clock, which all processes
of a machine share.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common.worker.transfer
from common.engine.engine import Engine
from common.engine.scheduler import Span
from common.transfer.base import Completion, Run, TransferBackend
from common.worker.loop import Emit, Handover
from common.worker.process import Rank, serve_rank
from common.worker.start import RankStart
from common.worker.waker import Waker

ROLE, TIMES, AT_THE_END = "PDMESH_BENCH_ROLE", "PDMESH_BENCH_TIMES", "PDMESH_BENCH_AT_THE_END"


class Times:
    """Lines of JSON, one an event."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("a", buffering=1)

    def note(self, **event: Any) -> None:
        self.file.write(json.dumps(event) + "\n")


def time_steps(engine: Engine, times: Times) -> None:
    run = engine.runner.step

    def step(spans: Sequence[Span]) -> Any:
        began = time.monotonic()
        sampled = run(spans)
        parts = [(span.sequence.sequence_id, span.start, span.stop) for span in spans]
        times.note(kind="step", began=began, ended=time.monotonic(), parts=parts)
        return sampled

    engine.runner.step = step  # type: ignore[method-assign]


def time_transfers(backend: TransferBackend, times: Times) -> TransferBackend:
    submit, poll = backend.submit, backend.poll

    def timed_submit(peer: Any, runs: Sequence[Run], *arguments: Any, **options: Any) -> Any:
        began = time.monotonic()
        handle = submit(peer, runs, *arguments, **options)
        nbytes = int(sum(length for _, _, length in runs))
        times.note(kind="submit", handle=handle, began=began, ended=time.monotonic(), nbytes=nbytes)
        return handle

    def timed_poll() -> list[Completion]:
        completions = poll()
        for completion in completions:
            times.note(kind="done", handle=completion.handle, seconds=completion.seconds, seen=time.monotonic())
        return completions

    backend.submit, backend.poll = timed_submit, timed_poll  # type: ignore[method-assign]
    return backend


def send_at_the_end(handover: Handover) -> Handover:
    """The control: the hand-over hears of no chunk but the last."""
    on_step = handover.on_step

    def last_only(result: Any) -> None:
        on_step(replace(result, progress=[progress for progress in result.progress if progress.first]))

    handover.on_step = last_only  # type: ignore[method-assign]
    return handover


def build(start: RankStart, waker: Waker) -> Rank:
    """What `serve_rank` runs."""
    times = Times(Path(os.environ[TIMES]))
    create = common.worker.transfer.create
    common.worker.transfer.create = lambda *arguments: time_transfers(create(*arguments), times)
    rank: Rank = importlib.import_module(f"services.{os.environ[ROLE]}.rank").build(start, waker)
    time_steps(rank.engine, times)
    make = rank.handover

    def make_handover(emit: Emit) -> Handover:
        handover = make(emit)
        return send_at_the_end(handover) if os.environ.get(AT_THE_END) else handover

    return replace(rank, handover=make_handover)


if __name__ == "__main__":
    serve_rank(build)
