"""From settings to an engine, whichever computes. Its module is imported when it is first asked for."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from common.engine.config import EngineConfig
from common.engine.engine import Engine
from common.worker.messages import RankReady

Register = Callable[[int, int, int | None], None]
"""Makes a pool known that the engine allocated: address, bytes, CUDA device or None."""

ENGINES = {"torch": "common.worker.rank", "emulated": "common.engine.emulated"}


def build_engine(
    config: EngineConfig,
    allocate: Callable[[int], memoryview] | None = None,
    register: Register | None = None,
) -> Engine:
    """The engine of `--engine`; `allocate` and `register` are a transfer backend's, if there is a hand-over.

    Raises:
        MeshError: BAD_CHECKPOINT or BAD_CONFIG.
    """
    engine: Engine = importlib.import_module(ENGINES[config.engine]).build_engine(config, allocate, register)
    return engine


def runs_on_gpu(config: EngineConfig) -> bool:
    """Whether the pool will be a GPU's memory. Raises `MeshError` (BAD_CONFIG) for a device that is not there."""
    if config.engine != "torch":
        return False
    on_gpu: bool = importlib.import_module("common.engine.runner").choose_device(config).type == "cuda"
    return on_gpu


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
