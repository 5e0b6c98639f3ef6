"""Ranks as threads of one process: a `Group` without processes, to try what stands on one with many shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any, TypeVar

import torch

T = TypeVar("T")
WAIT_S = 30.0  # for the others; then the test fails


class ThreadGroup:
    """See `common.dist.group.Group`. Shapes that disagree between ranks are caught."""

    def __init__(self, rank: int, size: int, slots: list[Any], barrier: Barrier) -> None:
        self.rank = rank
        self.size = size
        self.slots = slots
        self.barrier = barrier

    def everybodys(self, mine: Any) -> list[Any]:
        self.slots[self.rank] = mine
        self.barrier.wait(WAIT_S)
        everybodys = list(self.slots)
        self.barrier.wait(WAIT_S)
        return everybodys

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack(self.everybodys(x)).sum(0)

    def all_gather(self, x_TI: torch.Tensor) -> torch.Tensor:
        return torch.cat(self.everybodys(x_TI), 1)

    def all_to_all(self, x: torch.Tensor, counts: Sequence[int], received: Sequence[int]) -> torch.Tensor:
        assert sum(counts) == len(x)
        parts = [theirs[self.rank] for theirs in self.everybodys(x.split(list(counts)))]
        assert [len(part) for part in parts] == list(received)
        return torch.cat(parts)


def run_threads(size: int, rank_main: Callable[[ThreadGroup], T]) -> list[T]:
    """What `rank_main` returns on each of `size` ranks. If one raises, all end, and the first error is raised."""
    barrier, slots = Barrier(size), [None] * size

    def run(rank: int) -> T:
        try:
            return rank_main(ThreadGroup(rank, size, slots, barrier))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(run, rank) for rank in range(size)]
        errors = [error for future in futures if (error := future.exception())]
    for error in errors:
        if type(error).__name__ != "BrokenBarrierError":
            raise error
    return [future.result() for future in futures]
