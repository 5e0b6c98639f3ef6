"""What a rank process does from its start to its end, whatever the service.

A service's rank module is a `build` function and `if __name__ == "__main__": serve_rank(build)`.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import zmq

from common.engine.engine import Engine
from common.errors.base import MeshError, Reason
from common.obs.log import get_logger
from common.worker.loop import Emit, Handover, NoHandover, RankLoop
from common.worker.messages import FromRank, RankFailed, RankReady
from common.worker.start import RankStart, configure
from common.worker.waker import Waker

log = get_logger(__name__)

PR_SET_PDEATHSIG = 1
LINGER_MS = 2000  # for last messages to a front that has stopped reading


def nothing() -> None:
    """The default of `Rank.close`."""


@dataclass(frozen=True)
class Rank:
    """What `build` makes: an engine with its pool mapped, and the two ends of the rank's life around it.

    Attributes:
        ready: First message to the front.
        handover: Makes the hand-over; it talks to the front through the function that it is given.
        close: Unmaps the pool; called last, after the hand-over is closed.
    """

    engine: Engine
    ready: RankReady
    handover: Callable[[Emit], Handover] = lambda emit: NoHandover()
    close: Callable[[], None] = nothing


Build = Callable[[RankStart, Waker], Rank]


def serve_rank(build: Build) -> None:
    """Run a rank for the front that started this process; does not return.

    Exits with 0 after `Stop` or SIGTERM, and with 1 after `RankFailed`, which says why. SIGINT is ignored: a
    Ctrl-C reaches the whole terminal's group, and it is the front that stops its ranks. The process dies with
    its front.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    start = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=RankStart)
    die_with_parent(start.front_pid)
    waker = Waker()
    with zmq.Context() as context, context.socket(zmq.PAIR) as socket:
        configure(socket, LINGER_MS)
        socket.connect(start.address)
        try:
            run_rank(build, start, socket, waker)
        except Exception as error:
            if not isinstance(error, MeshError):
                error = internal(error)
            socket.send(msgspec.msgpack.encode(FromRank([RankFailed(start.rank, error.reason, error.message)])))
            code = 1
        else:
            code = 0
    sys.exit(code)


def internal(error: Exception) -> MeshError:
    """What a bug looks like to the front; the log has its traceback."""
    log.exception("the rank failed", exc_info=error)
    return MeshError(Reason.INTERNAL, f"{type(error).__name__}: {error}")


def run_rank(build: Build, start: RankStart, socket: zmq.Socket[bytes], waker: Waker) -> None:
    """Build the rank, tell the front, loop until stopped, close in order."""
    rank = build(start, waker)
    try:
        loop = RankLoop(socket, rank.engine, waker)
        signal.signal(signal.SIGTERM, lambda number, frame: loop.stop())
        loop.emit(rank.ready)
        loop.run(rank.handover(loop.emit))
    finally:
        rank.close()
    # A signal may still come: the waker's descriptor is left to the end of the process.


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when the front ends, however that happens. It may have ended already.

    Linux counts the end of the *thread* that started the child: fronts start ranks from their main thread.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent_pid:
        sys.exit(1)
