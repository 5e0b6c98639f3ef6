"""The torch engine: a model, and the memory of its pool."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from common.engine.config import EngineConfig
from common.engine.engine import Engine
from common.engine.runner import ModelRunner
from common.errors.base import MeshError, Reason
from common.kvcache.allocator import PageAllocator
from common.kvcache.layout import KvLayout
from common.kvcache.pool import KvPool
from common.worker.build import Register

MAX_CPU_POOL_BYTES = 4 * 2**30
CPU_POOL_SHARE = 0.25  # of the memory that is available: several workers often share one machine
# A core computes as many prompt tokens a second in steps of this size as in larger ones, which only make others wait.
CPU_CHUNK_TOKENS = 256


def default_num_pages(config: EngineConfig, layout: KvLayout, context_length: int, device: torch.device) -> int:
    """Pages of the KV pool, once the weights are loaded.

    `--max-total-tokens` decides if it is set. On CUDA it is what the weights leave of `--mem-fraction-static` of the
    device's memory, at most what is free: other workers may have their own share. On CPU it is what
    `--max-running-requests` full contexts need, but at most a quarter of the memory that is available, and at most
    4 GiB.

    Raises:
        MeshError: BAD_CONFIG; not one page fits.
    """
    if config.max_total_tokens is not None:
        num_pages = config.max_total_tokens // layout.page_size
    elif device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        own_share = int(total * config.mem_fraction_static) - torch.cuda.memory_reserved(device)
        num_pages = min(own_share, free) // layout.page_bytes
    else:
        wanted = config.max_running_requests * layout.pages_for(context_length)
        most = min(int(available_bytes() * CPU_POOL_SHARE), MAX_CPU_POOL_BYTES)
        num_pages = min(wanted, most // layout.page_bytes)
    if num_pages < 1:
        raise MeshError(
            Reason.BAD_CONFIG,
            f"no page of {layout.page_bytes} bytes fits in the KV pool; "
            "see --max-total-tokens and --mem-fraction-static",
        )
    return num_pages


def available_bytes(meminfo: str = "/proc/meminfo", cgroup: str = "/sys/fs/cgroup") -> int:
    """Host memory that can be had without swapping, and within this process's control group (version 2)."""
    lines = dict(line.split(":", 1) for line in Path(meminfo).read_text().splitlines())
    available = int(lines["MemAvailable"].split()[0]) * 1024
    limit, used = Path(cgroup, "memory.max"), Path(cgroup, "memory.current")
    if limit.exists() and (most := limit.read_text().strip()) != "max":
        available = min(available, max(0, int(most) - int(used.read_text())))
    return available


def build_engine(
    config: EngineConfig,
    allocate: Callable[[int], memoryview] | None = None,
    register: Register | None = None,
) -> Engine:
    """Load the model and give it a pool.

    On CPU the pool's memory comes from `allocate` (bytes), which a transfer backend provides; it must stay mapped
    until the engine is no longer used; without it the pool has memory of its own. On CUDA the pool is the device's,
    and `register` (address, bytes, device) makes it known to the backend.

    Raises:
        MeshError: BAD_CHECKPOINT or BAD_CONFIG.
    """
    runner = ModelRunner.load(config)
    num_pages = default_num_pages(config, runner.layout, runner.context_length, runner.device)
    if runner.device.type == "cpu":
        buffer = allocate(num_pages * runner.layout.page_bytes) if allocate else None
        pool = KvPool(runner.layout, num_pages, buffer=buffer)
        config = replace(config, chunked_prefill_size=config.chunked_prefill_size or CPU_CHUNK_TOKENS)
    else:
        pool = KvPool(runner.layout, num_pages, device=runner.device)
        if register is not None:
            register(pool.address, pool.nbytes, runner.device.index)
    runner.attach_pool(pool)
    return Engine(runner, PageAllocator(num_pages), config)
