"""A decode worker's rank: the model, and a transfer endpoint that is written to."""

from __future__ import annotations

from dataclasses import replace

from common.transfer.checksum import Hasher
from common.worker.config import WorkerConfig
from common.worker.process import Rank, serve_rank
from common.worker.start import RankStart
from common.worker.transfer import build_with_transfer, read_config
from common.worker.waker import Waker
from services.decode.handover import DecodeHandover


def build(start: RankStart, waker: Waker) -> Rank:
    """What `serve_rank` runs."""
    return make(start, read_config(start, "decode"), waker)


def make(start: RankStart, config: WorkerConfig, waker: Waker) -> Rank:
    """The rank, in whatever process."""
    keeps = config.handover.disaggregation_decode_enable_radix_cache
    config = replace(config, engine=replace(config.engine, disable_radix_cache=not keeps))
    engine, backend, ready = build_with_transfer(start, config, waker)
    hasher = Hasher(engine.runner.read_page, waker.wake)
    return Rank(engine, ready, lambda emit: DecodeHandover(engine, backend, emit, hasher))


if __name__ == "__main__":
    serve_rank(build)
