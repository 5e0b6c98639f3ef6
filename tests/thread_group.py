"""Ranks as threads of one process: groups without processes, to try what stands on them in many shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Lock
from typing import Any, TypeVar

import torch

T = TypeVar("T")
WAIT_S = 30.0  # for the others; then the test fails


class Meeting:
    """Where some ranks meet."""

    def __init__(self, size: int) -> None:
        self.barrier = Barrier(size)
        self.slots: list[Any] = [None] * size


class World:
    """All meetings of some ranks; aborted together."""

    def __init__(self) -> None:
        self.lock = Lock()
        self.meetings: dict[tuple[Any, ...], Meeting] = {}

    def meeting(self, key: tuple[Any, ...], size: int) -> Meeting:
        with self.lock:
            return self.meetings.setdefault(key, Meeting(size))

    def abort(self) -> None:
        with self.lock:
            for meeting in self.meetings.values():
                meeting.barrier.abort()


class ThreadGroup:
    """See `common.dist.group.Group`. Shapes that disagree between ranks are caught."""

    def __init__(self, rank: int, size: int, world: World, key: tuple[Any, ...] = ()) -> None:
        self.rank = rank
        self.size = size
        self.world = world
        self.meeting = world.meeting(key, size)
        self.subgroups = 0

    def subgroup(self, ranks: Sequence[Sequence[int]]) -> ThreadGroup:
        """This rank's group of some that no two share a rank of."""
        self.subgroups += 1
        mine = next(tuple(some) for some in ranks if self.rank in some)
        return ThreadGroup(mine.index(self.rank), len(mine), self.world, (self.subgroups, mine))

    def everybodys(self, mine: Any) -> list[Any]:
        slots, barrier = self.meeting.slots, self.meeting.barrier
        slots[self.rank] = mine
        barrier.wait(WAIT_S)
        everybodys = list(slots)
        barrier.wait(WAIT_S)
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
    world = World()

    def run(rank: int) -> T:
        try:
            return rank_main(ThreadGroup(rank, size, world))
        except BaseException:
            world.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(run, rank) for rank in range(size)]
        errors = [error for future in futures if (error := future.exception())]
    for error in sorted(errors, key=lambda error: type(error).__name__ == "BrokenBarrierError"):
        raise error
    return [future.result() for future in futures]
