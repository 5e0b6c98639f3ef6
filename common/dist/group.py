"""Ranks that compute one thing together, and what they exchange."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist


class Group(Protocol):
    """Some ranks of a worker. Every call is made by all of them, in the same order, with tensors of the same shape.

    Attributes:
        rank: Number of this process among them.
        size: How many they are.
    """

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def subgroup(self, ranks: Sequence[Sequence[int]]) -> Group:
        """This rank's group of `ranks`, no two of which share a rank."""
        ...

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks; `x` may be overwritten."""
        ...

    def all_gather(self, x_TI: torch.Tensor) -> torch.Tensor:
        """All ranks' columns beside each other, in the order of the ranks: `[T, size * I]`."""
        ...

    def all_to_all(self, x: torch.Tensor, counts: Sequence[int], received: Sequence[int]) -> torch.Tensor:
        """The first `counts[0]` rows of `x` go to rank 0, the next to rank 1, and so on; back come, in the order of the
        ranks, `received[0]` rows from rank 0 and so on. Here alone shapes differ between ranks, in the first dimension.
        """
        ...


@dataclass(frozen=True)
class Alone:
    """One rank; nothing is exchanged."""

    rank: int = 0
    size: int = 1

    def subgroup(self, ranks: Sequence[Sequence[int]]) -> Group:
        return self

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def all_gather(self, x_TI: torch.Tensor) -> torch.Tensor:
        return x_TI

    def all_to_all(self, x: torch.Tensor, counts: Sequence[int], received: Sequence[int]) -> torch.Tensor:
        return x


ALONE = Alone()


class TorchGroup:
    """A process group of torch.distributed: gloo on CPU, NCCL on GPUs."""

    def __init__(self, group: dist.ProcessGroup, timeout: timedelta) -> None:
        self.group = group
        self.timeout = timeout
        self.rank = group.rank()
        self.size = group.size()

    def subgroup(self, ranks: Sequence[Sequence[int]]) -> Group:
        """See `Group.subgroup`; only for the group of all ranks."""
        mine: Group = ALONE
        for some in ranks:
            if len(some) == self.size:
                mine = self
            elif len(some) > 1:  # torch wants all ranks to make all groups, also those of others
                group = dist.new_group(list(some), timeout=self.timeout)
                if self.rank in some:
                    mine = TorchGroup(group, self.timeout)
        return mine

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """See `Group.all_reduce`."""
        if x.numel():
            dist.all_reduce(x, group=self.group)
        return x

    def all_gather(self, x_TI: torch.Tensor) -> torch.Tensor:
        """See `Group.all_gather`."""
        if not x_TI.numel():
            return x_TI.new_empty((len(x_TI), self.size * x_TI.shape[1]))
        parts = [torch.empty_like(x_TI) for _ in range(self.size)]
        dist.all_gather(parts, x_TI.contiguous(), group=self.group)
        return torch.cat(parts, 1)

    def all_to_all(self, x: torch.Tensor, counts: Sequence[int], received: Sequence[int]) -> torch.Tensor:
        """See `Group.all_to_all`."""
        out = x.new_empty((sum(received), *x.shape[1:]))
        dist.all_to_all_single(out, x.contiguous(), list(received), list(counts), group=self.group)
        return out


def join_group(backend: str, address: str, rank: int, size: int, timeout_s: float) -> Group:
    """Meet the other ranks at `address` (`tcp://host:port` or `file:///path`); blocks until all are there.

    Call it once a process, and `leave_group` in the end.

    Raises:
        RuntimeError: The others did not come within `timeout_s`, or do not agree. `timeout_s` also bounds every later
            exchange.
    """
    if size == 1:
        return ALONE
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group(backend, init_method=address, rank=rank, world_size=size, timeout=timeout)
    world = dist.group.WORLD
    assert world is not None
    return TorchGroup(world, timeout)


def leave_group() -> None:
    """Undo `join_group`. Idempotent."""
    if dist.is_initialized():
        dist.destroy_process_group()
