"""The front's side of a rank: starts the process, talks to it, notices its death, stops it."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from common.errors.base import MeshError, Reason
from common.obs.log import get_logger
from common.worker.messages import (
    AbortSequence,
    FromRank,
    RankFailed,
    RankReady,
    RoomEnded,
    RoomReleased,
    RoomReserved,
    StartSequence,
    Stop,
    ToRank,
)
from common.worker.start import RankStart, configure

log = get_logger(__name__)

ForRank = StartSequence | AbortSequence | RoomReserved | RoomEnded | RoomReleased | Stop

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
MAX_FOLDER_LENGTH = 60  # of the temporary folder; a Unix socket's whole path has at most 107 characters
DRAIN_S = 0.1  # for the last messages of a process that has exited; they are in the kernel already
TERMINATE_S = 2.0  # from SIGTERM to SIGKILL


def rank_environment(
    cpu_threads: int | None, sharing: int = 1, environ: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """A rank's environment: `cpu_threads` for its kernels, or what the user's OMP_NUM_THREADS says, or its share.

    The share is that of one among `sharing` ranks on this machine's usable cores, at least 1. More threads than
    idle cores cost far more than they give: an OpenMP team waits for its slowest thread.
    """
    if cpu_threads is None and "OMP_NUM_THREADS" in environ:
        return dict(environ)
    threads = cpu_threads or max(1, len(os.sched_getaffinity(0)) // sharing)
    return {**environ, **dict.fromkeys(THREAD_VARIABLES, str(threads))}


class RankProcess:
    """A running rank. Made by `spawn`; all methods belong to the event loop that called it.

    Attributes:
        rank: Its number.
        ready: What it said when it was ready.
    """

    ready: RankReady

    def __init__(
        self,
        rank: int,
        process: asyncio.subprocess.Process,
        socket: zmq.asyncio.Socket,
        on_batch: Callable[[FromRank], None],
        on_exit: Callable[[MeshError], None],
    ) -> None:
        self.rank = rank
        self._process = process
        self._socket = socket
        self._on_batch = on_batch
        self._on_exit = on_exit
        self._started: asyncio.Future[FromRank] = asyncio.get_running_loop().create_future()
        self._outbox: list[ForRank] = []
        self._failure: MeshError | None = None
        self._stopping = False
        self._reader = asyncio.create_task(self._read(), name=f"rank-{rank}-reader")

    @classmethod
    async def spawn(
        cls,
        module: str,
        config: Any,
        *,
        on_batch: Callable[[FromRank], None],
        on_exit: Callable[[MeshError], None],
        rank: int = 0,
        cpu_threads: int | None = None,
        sharing: int = 1,
    ) -> RankProcess:
        """Start `python -m module` and wait until its model is loaded and its pool mapped.

        Call it from the main thread: the rank dies with the thread that started it. `config` is a dataclass of
        plain values, which reaches the rank through a pipe; the threads are `rank_environment`'s. `on_batch` gets
        what the rank says, a step at a time, after this returned. `on_exit` is called once, after the last batch,
        if the rank ends without being told to; the reason is its own, or WORKER_LOST.

        Raises:
            MeshError: The rank cannot start; the reason is its own, or WORKER_LOST if it died without one.
        """
        folder = tempfile.mkdtemp(
            prefix="pdmesh-", dir="/tmp" if len(tempfile.gettempdir()) > MAX_FOLDER_LENGTH else None
        )
        address = f"ipc://{folder}/rank"
        socket = zmq.asyncio.Context().socket(zmq.PAIR)
        configure(socket, linger_ms=0)
        started: RankProcess | None = None
        try:
            socket.bind(address)
            environment = rank_environment(cpu_threads, sharing)
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", module, stdin=asyncio.subprocess.PIPE, env=environment
            )
            started = cls(rank, process, socket, on_batch, on_exit)
            await started._begin(RankStart(address, os.getpid(), rank, msgspec.msgpack.encode(config)))
        except BaseException:
            if started is not None:
                await started.kill()
            else:
                close_socket(socket)
            raise
        finally:
            # The two are connected, or never will be: nothing stays behind even if the front is killed.
            shutil.rmtree(folder, ignore_errors=True)
        return started

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def send(self, message: ForRank) -> None:
        """Send a message; those of one turn of the event loop leave as one batch.

        To a rank that has ended it does nothing: `on_exit` has told.
        """
        if not self._outbox:
            asyncio.get_running_loop().call_soon(self._flush)
        self._outbox.append(message)

    async def stop(self, timeout_s: float = 10.0) -> None:
        """End the rank: `Stop`, after `timeout_s` SIGTERM, then SIGKILL. Idempotent."""
        self._stopping = True
        self.send(Stop())
        await asyncio.wait({self._reader}, timeout=timeout_s)
        if not self._reader.done():
            log.warning("a rank did not stop; terminating it", rank=self.rank, pid=self.pid)
            with suppress(ProcessLookupError):
                self._process.terminate()
            await asyncio.wait({self._reader}, timeout=TERMINATE_S)
        await self.kill()

    async def kill(self) -> None:
        """End the rank at once, if it has not ended. Idempotent."""
        self._stopping = True
        with suppress(ProcessLookupError):
            self._process.kill()
        await asyncio.shield(self._reader)
        close_socket(self._socket)

    async def _begin(self, start: RankStart) -> None:
        """Tell the rank how to start and wait for its first message."""
        pipe = self._process.stdin
        assert pipe is not None
        pipe.write(msgspec.msgpack.encode(start))
        with suppress(ConnectionError):  # it died: the reader tells how
            await pipe.drain()
        pipe.close()
        first = await self._started
        ready, *rest = first.messages
        if not isinstance(ready, RankReady):
            raise MeshError(Reason.INTERNAL, f"rank {self.rank} began with {type(ready).__name__}")
        self.ready = ready
        # After our caller's next lines: it may have to note this object before it is called back.
        asyncio.get_running_loop().call_soon(self._on_batch, FromRank(rest, first.load))

    def _flush(self) -> None:
        batch, self._outbox = self._outbox, []
        if not self._reader.done() and not self._socket.closed:
            self._socket.send(msgspec.msgpack.encode(ToRank(batch)))

    async def _read(self) -> None:
        """Hand on what the rank says until the process has exited and all that it sent is here."""
        decoder = msgspec.msgpack.Decoder(FromRank)
        exited = asyncio.ensure_future(self._process.wait())
        while True:
            received: asyncio.Future[bytes] = self._socket.recv()
            await asyncio.wait({received, exited}, return_when=asyncio.FIRST_COMPLETED)
            if not received.done():
                await asyncio.wait({received}, timeout=DRAIN_S)
            if not received.done():
                received.cancel()
                break
            self._deliver(decoder.decode(received.result()))
        self._tell_exit()

    def _deliver(self, batch: FromRank) -> None:
        match batch.messages:
            case [RankFailed(_, reason, message)]:
                self._failure = MeshError(Reason(reason), message)
            case _ if not self._started.done():
                self._started.set_result(batch)
            case _:
                self._on_batch(batch)

    def _tell_exit(self) -> None:
        code = self._process.returncode or 0
        how = f"was killed by signal {-code}" if code < 0 else f"exited with status {code}"
        error = self._failure or MeshError(Reason.WORKER_LOST, f"rank {self.rank} (pid {self.pid}) {how}")
        if not self._started.done():
            self._started.set_exception(error)
        elif not self._stopping:
            self._on_exit(error)


def close_socket(socket: zmq.asyncio.Socket) -> None:
    """Close a socket and the context that was made for it."""
    socket.close()
    socket.context.term()
