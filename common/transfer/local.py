"""Transfer within one host: the pool is an anonymous file that the writer maps and copies into.

The pool of a rank is a memfd whose size is sealed. A peer that connects over the control channel (an abstract
AF_UNIX socket, of the same user and in the same network namespace) is handed its descriptor, maps it, and
copies, with as many workers as the sender pool has, without the GIL. Nothing has a name in a file system, so nothing
is left behind, however a process ends.

Fencing: a mapping cannot be revoked, so a writer is fenced off when its process has ended, or has closed the
connection after unmapping the pool. A stopped process keeps its connection and its mapping: its pages stay in
quarantine until it is let go on, or killed. Nothing is on its way once the process has ended.

The pool is host memory: no other process can map a GPU's this way, so that one is refused, with a reason. For models
on GPUs take `nixl`, which on one host copies from GPU to GPU by itself, or `mooncake`.

A write needs nothing of the peer's process: into a stopped one it succeeds, and into the pool of one that died
it is harmless. The writer is quiet when the copies under way have ended, at most 64 MiB a worker; a lost peer's pool
is then unmapped, and `disconnect` waits for that.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence

from common.transfer.base import Capabilities, Pieces, TransferBackend, TransferConfig, TransferError, Wake
from common.transfer.channel import Link
from common.transfer.endpoint import Endpoint, Pool
from common.transfer.memory import address_of, check_memfd, create_memfd, map_memory
from common.transfer.peers import Descriptor
from common.transfer.sender import GiveUp, Writer

# A worker's turn at a queue: about 4 ms of copying.
_PART_BYTES = 64 << 20


def load() -> None:
    """Nothing to import; raises `TransferError` where the system has no memfd."""
    if not hasattr(os, "memfd_create"):
        raise TransferError("the local transfer backend needs Linux (memfd_create)")


def create(config: TransferConfig, wake: Wake) -> TransferBackend:
    """An endpoint; its engine is the kernel."""
    load()
    return LocalEndpoint(config, wake)


class LocalEndpoint(Endpoint):
    """Endpoint of the local backend. A pool given to `register` can be written from, not into."""

    name = "local"
    part_bytes = _PART_BYTES
    capabilities = Capabilities()

    def __init__(self, config: TransferConfig, wake: Wake) -> None:
        super().__init__(config, wake)
        self._fd: int | None = None

    def _map_pool(self, nbytes: int) -> memoryview:
        if self._fd is not None:
            raise TransferError("the endpoint has its pool already")
        self._fd = create_memfd(nbytes)
        return map_memory(nbytes, self._fd)

    def _control_address(self) -> str:
        return f"\0pdmesh-transfer-{self.incarnation.hex()}"

    def _shared_fds(self) -> Sequence[int]:
        return () if self._fd is None else (self._fd,)

    def _start_engine(self, pool: Pool) -> None:
        return

    def _engine_info(self) -> bytes:
        return b""

    def _open_writer(self, pool: Pool, peer: Descriptor, link: Link) -> Writer:
        if not link.fds:
            raise TransferError("the peer's pool is not shared memory; nothing can be written there")
        check_memfd(link.fds[0], peer.pool_bytes)
        return _LocalWriter(pool, map_memory(peer.pool_bytes, link.fds[0]))

    def _stop_engine(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


class _LocalWriter:
    """Copies into a mapping of the peer's pool."""

    parallel = True

    def __init__(self, pool: Pool, target: memoryview) -> None:
        self._source_address = pool.address
        self._target = target
        self._target_address = address_of(target)

    def write(self, pieces: Pieces, give_up: GiveUp) -> None:
        if give_up():
            raise TransferError("given up")
        sources, targets = pieces[:, 0] + self._source_address, pieces[:, 1] + self._target_address
        copy = ctypes.memmove
        for source, target, nbytes in zip(sources.tolist(), targets.tolist(), pieces[:, 2].tolist(), strict=True):
            copy(target, source, nbytes)

    def close(self) -> None:
        self._target.release()
