"""From settings to an engine, whichever computes. The engine's module is imported here, and only the one asked for."""

from __future__ import annotations

from collections.abc import Callable

from common.engine.config import EngineConfig
from common.engine.engine import Engine
from common.worker.messages import RankReady


def build_engine(
    config: EngineConfig,
    allocate: Callable[[int], memoryview] | None = None,
    register: Callable[[int, int], None] | None = None,
) -> Engine:
    """The engine of `--engine`; `allocate` and `register` are a transfer backend's, if there is a hand-over.

    An emulated engine's pool has a size, which the backend is told, but no memory.

    Raises:
        MeshError: BAD_CHECKPOINT or BAD_CONFIG.
    """
    if config.engine == "emulated":
        from common.engine import emulated

        engine = emulated.build_engine(config)
        if register is not None:
            register(0, engine.allocator.num_pages * engine.runner.layout.page_bytes)
        return engine
    from common.kvcache.pool import allocate_host
    from common.worker import rank

    return rank.build_engine(config, allocate or allocate_host, register)


def ready_message(rank: int, engine: Engine, backend: str, descriptor: bytes) -> RankReady:
    """What a rank tells its front once it can work. `backend` and `descriptor` are empty without a hand-over."""
    runner = engine.runner
    return RankReady(
        rank=rank,
        layout=runner.layout,
        num_pages=engine.allocator.num_pages,
        backend=backend,
        descriptor=descriptor,
        model_path=runner.model_path,
        fingerprint=runner.fingerprint,
        context_length=runner.context_length,
        vocab_size=runner.vocab_size,
    )
