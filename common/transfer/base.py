"""The transfer seam: how pages get from one process's pool into another's.

One `TransferBackend` per rank process. A prefill rank writes, a decode rank is written to; both allocate and
register one pool for their whole life. The order of a hand-over is: `connect`, `submit` (a chunk at a time), `poll`
until every handle is DONE, then `notify`, whose payload reaches the peer's `received` only after all the bytes are
there.

Promises that every backend keeps (tests/contract/test_transfer*.py):
- Nothing but `disconnect` and `close` blocks, neither for the length of a copy nor for a peer that does not answer.
  Work happens in the backend's own threads without the GIL; after each news they call `wake`.
- Every handle ends: DONE, or FAILED with a sentence, in bounded time. A peer whose process ends, or whose connection
  breaks, fails its handles at once; one that does not answer fails them after `UNANSWERED_S`.
- What is submitted with one key is written in that order. How much may wait is bounded: ask `accepts` first.
- After FAILED the bytes may still land, until `quiet` says that they do not. A failed write harms no other one.
- A connection that was lost is lost with its `PeerId`. Its writer, mapping and sockets are let go at once, and the peer
  is probed with growing intervals: as soon as it answers, `connect` gives a new `PeerId`. Until then it raises.
- `close` and `disconnect` are idempotent, and may block for seconds when an engine is in the middle of a call to a peer
  that does not answer (each backend's module says for how long). `close` ends all threads; the pool stays mapped
  until after it.
- Every method may be called from any thread. `wake` is called from the backend's threads and must not block.
- A process that is stopped, or cut off, may go on to write later: only its own word, or its end, proves that it
  does not. `fence` tells its end. A process lives through several lives in the control plane; `live` numbers them,
  so that what it was granted in one life is fenced off without barring its later ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple, NewType, Protocol

import numpy as np
from numpy.typing import NDArray


class TransferError(Exception):
    """A transfer engine is missing, misconfigured, or refused a call; the message says which and why."""


class Run(NamedTuple):
    """A piece to copy: byte offsets into the local and the peer's pool, and its length in bytes."""

    local_offset: int
    remote_offset: int
    nbytes: int


Pieces = NDArray[np.int64]
"""Many runs, `[n, 3]`: local offset, remote offset, length, in bytes."""


class HandleState(Enum):
    """How a submitted transfer ended."""

    DONE = "done"
    FAILED = "failed"


Handle = NewType("Handle", int)
PeerId = NewType("PeerId", int)


@dataclass(frozen=True)
class Completion:
    """The end of one submitted transfer.

    `seconds` is the time from submission, of which `queued_s` passed before its first byte was given to the engine;
    `nbytes` and `descriptors` are what was submitted: bytes, and the pieces that they come in.
    """

    handle: Handle
    state: HandleState
    error: str = ""
    seconds: float = 0.0
    queued_s: float = 0.0
    nbytes: int = 0
    descriptors: int = 0


@dataclass(frozen=True)
class Capabilities:
    """What a backend can do; the same on every machine."""

    moves_bytes: bool = True
    device_memory: bool = False  # whether the pool may be a GPU's


@dataclass(frozen=True)
class TransferConfig:
    """Settings of a rank's transfer endpoint. `host` is the address that peers reach.

    `threads` copy at once, and what waits for them does so in `queues` queues a peer.
    The endpoint listens on `listen` where that is another address. Mooncake's engines are reached by `mooncake_host`
    instead, if it is set, and `mooncake_protocol` (tcp or rdma) is theirs. `latency_s` and `bytes_per_s` (0: no
    limit) are how long the emulated backend takes.
    """

    host: str = "127.0.0.1"
    listen: str = ""
    ib_devices: tuple[str, ...] = ()
    threads: int = 1
    queues: int = 4
    mooncake_host: str = ""
    mooncake_protocol: str = ""
    nixl_backend: str = "UCX"
    nixl_params: Mapping[str, str] = field(default_factory=dict)
    latency_s: float = 0.0
    bytes_per_s: float = 0.0


class TransferBackend(Protocol):
    """One process's endpoint."""

    name: str
    capabilities: Capabilities

    def allocate(self, nbytes: int) -> memoryview:
        """Allocate and register the pool: zeroed, 2 MiB aligned host memory. Once, before anything else."""
        ...

    def register(self, address: int, nbytes: int, gpu: int | None = None) -> None:
        """Register memory that the caller owns as the pool, instead of `allocate`: host memory, or that of CUDA
        device `gpu`, as it is. What the caller wrote there is finished before it submits: engines know no streams.

        Raises `TransferError` for a device's memory where `capabilities.device_memory` is false.
        """
        ...

    def export(self) -> bytes:
        """Opaque, versioned description of this endpoint, with its incarnation, for `connect` elsewhere."""
        ...

    def connect(self, descriptor: bytes) -> PeerId:
        """Reach a peer, in the life of this moment. Does not wait for its answer: `submit` may follow at once.

        Connecting to the same incarnation again gives the same peer while it is there. Raises `TransferError` for
        a foreign descriptor, and for a peer that was lost and has not answered since.
        """
        ...

    def disconnect(self, peer: PeerId) -> None:
        """Forget a peer; handles under way end as FAILED. When it returns, nothing more is written there."""
        ...

    def live(self, epoch: int) -> None:
        """From now on this endpoint reaches its peers as one of the life `epoch`; 0 until then."""
        ...

    def fence(self, descriptor: bytes, epoch: int) -> bool:
        """Refuse all further connections that the endpoint `descriptor` dials in its life `epoch` or before.

        True once none is open, and nothing that came over one can land here any more. Never blocks; call it again
        until then (`wake` is called when a connection ends). Raises `TransferError` for a foreign descriptor.
        """
        ...

    def submit(self, peer: PeerId, runs: Sequence[Run] | Pieces, timeout_s: float, key: int = 0) -> Handle:
        """Begin to copy `runs`, already coalesced; none are no mistake. `key`, the room, picks the queue.

        Raises `TransferError` for a run outside either pool, for a peer that is gone, and for a queue that is full.
        """
        ...

    def accepts(self, peer: PeerId, key: int = 0) -> bool:
        """Whether the queue of `key` takes more; if not, ask again when a transfer has ended.

        True for a peer that is gone: `submit` tells.
        """
        ...

    def cancel(self, handle: Handle) -> None:
        """End a transfer as FAILED, before its time and at no cost to others; what has begun may still land."""
        ...

    def quiet(self, handle: Handle) -> bool:
        """Whether a transfer that has ended can write no more. `wake` is called when it becomes true."""
        ...

    def notify(self, peer: PeerId, payload: bytes) -> None:
        """Send `payload` (at most 64 KiB) to the peer, after everything that `poll` told as DONE.

        To a peer that has not answered yet it goes when it does. Raises `TransferError` for one that is gone.
        """
        ...

    def poll(self) -> list[Completion]:
        """Transfers that ended since the last call."""
        ...

    def received(self) -> list[bytes]:
        """Payloads that peers sent since the last call, in the order of each peer."""
        ...

    def close(self) -> None:
        """Disconnect all peers, end the threads, free the engine."""
        ...


Wake = Callable[[], None]


def no_wake() -> None:
    """A `wake` for callers that poll."""
