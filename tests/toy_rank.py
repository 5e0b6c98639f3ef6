"""A rank process with a toy engine, for tests of the processes around it. The config is a dictionary."""

from __future__ import annotations

import signal
from typing import Any

from common.errors.base import MeshError, Reason
from common.worker.build import ready_message
from common.worker.process import Rank, serve_rank
from common.worker.start import RankStart
from common.worker.waker import Waker
from tests.toys import toy_engine


def build(start: RankStart, waker: Waker) -> Rank:
    config: dict[str, Any] = start.config_as(dict)
    if config.get("refuse"):
        raise MeshError(Reason.BAD_CHECKPOINT, "no such folder")
    if config.get("stuck"):
        signal.pause()
    if config.get("bug"):
        raise ZeroDivisionError("a bug")
    engine = toy_engine(num_pages=config.get("num_pages", 64))
    return Rank(engine, ready_message(start.rank, engine, backend="", descriptor=b""))


if __name__ == "__main__":
    serve_rank(build)
