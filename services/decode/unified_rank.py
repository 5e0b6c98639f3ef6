"""A unified worker's rank: the model alone, no hand-over."""

from __future__ import annotations

from common.worker.build import build_engine, ready_message
from common.worker.config import WorkerConfig
from common.worker.process import Rank, serve_rank
from common.worker.start import RankStart
from common.worker.transfer import read_config
from common.worker.waker import Waker


def build(start: RankStart, waker: Waker) -> Rank:
    """What `serve_rank` runs."""
    return make(start, read_config(start, "unified"), waker)


def make(start: RankStart, config: WorkerConfig, waker: Waker) -> Rank:
    """The rank, in whatever process."""
    engine = build_engine(config.engine)
    return Rank(engine, ready_message(start.rank, engine, "", b""))


if __name__ == "__main__":
    serve_rank(build)
