"""A prefill worker's rank: the model, and a transfer endpoint that writes."""

from __future__ import annotations

from common.transfer.checksum import Hasher
from common.worker.config import WorkerConfig
from common.worker.loop import Emit
from common.worker.process import Rank, serve_rank
from common.worker.start import RankStart
from common.worker.transfer import build_with_transfer, read_config
from common.worker.waker import Waker
from services.prefill.handover import PrefillHandover


def build(start: RankStart, waker: Waker) -> Rank:
    """What `serve_rank` runs."""
    return make(start, read_config(start, "prefill"), waker)


def make(start: RankStart, config: WorkerConfig, waker: Waker) -> Rank:
    """The rank, in whatever process."""
    engine, backend, ready = build_with_transfer(start, config, waker)
    settings = config.handover

    def make_handover(emit: Emit) -> PrefillHandover:
        return PrefillHandover(
            engine,
            backend,
            emit,
            settings.transfer_timeout,
            settings.optimistic_prefill,
            Hasher(engine.runner.read_page, waker.wake),
            settings.kv_checksum,
        )

    return Rank(engine, ready, make_handover)


if __name__ == "__main__":
    serve_rank(build)
