"""The front's side of a rank: starts the process, talks to it, notices its death, stops it."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from typing import Protocol

import msgspec
import zmq

from common.config.temporary import make_folder
from common.errors.base import MeshError, Reason
from common.obs.log import get_logger
from common.worker.messages import (
    AbortSequence,
    FromRank,
    RankFailed,
    RankReady,
    Registered,
    RoomEnded,
    RoomReleased,
    RoomReserved,
    StartSequence,
    Stop,
    ToRank,
)
from common.worker.start import RankStart, configure

log = get_logger(__name__)

ForRank = StartSequence | AbortSequence | RoomReserved | RoomEnded | RoomReleased | Registered | Stop

PREFIX = "pdmesh-rank-"  # of the folder in which front and rank meet
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
# How long OpenMP's threads look for each other before they sleep; its default of 300,000 is milliseconds. Measured:
# 3 % of a step slower where cores are idle, several times as fast where another process wants one of them.
SPIN = {"GOMP_SPINCOUNT": "5000"}
MAX_FOLDER_LENGTH = 60  # of the temporary folder; a Unix socket's whole path has at most 107 characters
DRAIN_S = 0.1  # for the last messages of a process that has exited; they are in the kernel already
TERMINATE_S = 2.0  # from SIGTERM to SIGKILL


def rank_environment(
    cpu_threads: int | None, sharing: int = 1, environ: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """A rank's environment: `cpu_threads` for its kernels, or what the user's OMP_NUM_THREADS says, or its share.

    The share is that of one among `sharing` ranks on this machine's usable cores, at least 1. More threads than
    idle cores cost far more than they give: an OpenMP team waits for its slowest thread. It does not spin for long,
    unless the user's OMP_WAIT_POLICY or GOMP_SPINCOUNT say so.
    """
    defaults = {} if "OMP_WAIT_POLICY" in environ else SPIN
    if cpu_threads is None and "OMP_NUM_THREADS" in environ:
        return {**defaults, **environ}
    threads = cpu_threads or max(1, len(os.sched_getaffinity(0)) // sharing)
    return {**defaults, **environ, **dict.fromkeys(THREAD_VARIABLES, str(threads))}


class RankLink(Protocol):
    """A front's rank, wherever it runs."""

    ready: RankReady

    def send(self, message: ForRank) -> None:
        """Send a message; to a rank that has ended it does nothing."""

    def batches(self) -> AsyncIterator[FromRank]:
        """What the rank says, until it was stopped. Raises `MeshError` if it ended without being told to."""
        ...

    async def stop(self, timeout_s: float = 10.0) -> None:
        """End the rank. Idempotent; `batches` ends as well."""


class RankProcess:
    """A running rank. Made by `spawn`; all methods belong to the event loop that called it.

    Attributes:
        rank: Its number.
        ready: What it said when it was ready.
    """

    ready: RankReady

    def __init__(self, rank: int, process: asyncio.subprocess.Process, socket: zmq.Socket[bytes]) -> None:
        self.rank = rank
        self._process = process
        self._socket = socket
        self._batches: asyncio.Queue[FromRank | None] = asyncio.Queue()  # None is the end
        self._outbox: list[ForRank] = []
        self._failure: MeshError | None = None
        self._stopping = False
        self._decoder = msgspec.msgpack.Decoder(FromRank)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(socket.fileno(), self._receive)
        self._reader = asyncio.create_task(self._until_exit(), name=f"rank-{rank}-reader")

    @classmethod
    async def spawn(
        cls,
        module: str,
        config: bytes,
        *,
        rank: int = 0,
        cpu_threads: int | None = None,
        sharing: int = 1,
    ) -> RankProcess:
        """Start `python -m module` and wait until its model is loaded and its pool mapped; `ready` is set then.

        Call it from the main thread: the rank dies with the thread that started it. `config`, as the module reads
        it, reaches the rank through a pipe. For the threads see `rank_environment`.

        Raises:
            MeshError: The rank cannot start; the reason is its own, or WORKER_LOST if it died without one.
        """
        folder = make_folder(PREFIX, "/tmp" if len(tempfile.gettempdir()) > MAX_FOLDER_LENGTH else None)
        address = f"ipc://{folder}/rank"
        socket = zmq.Context().socket(zmq.PAIR)
        configure(socket, linger_ms=0)
        started: RankProcess | None = None
        try:
            socket.bind(address)
            environment = rank_environment(cpu_threads, sharing)
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", module, stdin=asyncio.subprocess.PIPE, env=environment
            )
            started = cls(rank, process, socket)
            await started._begin(RankStart(address, os.getpid(), rank, config))
        except BaseException:
            if started is not None:
                await started.kill()
            else:
                close_socket(socket)
            raise
        finally:
            # The two are connected, or never will be: nothing stays behind even if the front is killed later.
            shutil.rmtree(folder, ignore_errors=True)
        return started

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def send(self, message: ForRank) -> None:
        """Send a message; those of one turn of the event loop leave as one batch.

        To a rank that has ended it does nothing: `batches` tells.
        """
        if not self._outbox:
            asyncio.get_running_loop().call_soon(self._flush)
        self._outbox.append(message)

    async def batches(self) -> AsyncIterator[FromRank]:
        """What the rank says, a step at a time, until it was stopped. For one consumer.

        Raises:
            MeshError: The rank ended without being told to; the reason is its own, or WORKER_LOST.
        """
        while (batch := await self._batches.get()) is not None:
            yield batch
        if not self._stopping:
            raise self._loss()

    async def stop(self, timeout_s: float = 10.0) -> None:
        """End the rank: `Stop`, after `timeout_s` SIGTERM, then SIGKILL. Idempotent; `batches` ends as well."""
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
        if (first := await self._batches.get()) is None:
            raise self._loss()
        ready, *rest = first.messages
        if not isinstance(ready, RankReady):
            raise MeshError(Reason.INTERNAL, f"rank {self.rank} began with {type(ready).__name__}")
        self.ready = ready
        self._batches.put_nowait(FromRank(rest, first.load))

    def _flush(self) -> None:
        batch, self._outbox = self._outbox, []
        if not self._reader.done() and not self._socket.closed:
            self._socket.send(msgspec.msgpack.encode(ToRank(batch)), zmq.NOBLOCK)
            self._receive()

    def _receive(self) -> None:
        """Queue all that the rank has said.

        Called when the socket's descriptor is readable, and after sending: it tells of changes alone, and ZeroMQ
        may take note of one while it sends. (`zmq.asyncio` does the same, for several times the cost of a message.)
        """
        while True:
            try:
                data = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            batch = self._decoder.decode(data)
            match batch.messages:
                case [RankFailed(_, reason, message)]:
                    self._failure = MeshError(Reason(reason), message)
                case _:
                    self._batches.put_nowait(batch)

    async def _until_exit(self) -> None:
        """Until the process has exited and all that it sent is here; then `batches` ends."""
        try:
            await self._process.wait()
            await asyncio.sleep(DRAIN_S)
            self._receive()
        finally:
            self._loop.remove_reader(self._socket.fileno())
            self._batches.put_nowait(None)

    def _loss(self) -> MeshError:
        code = self._process.returncode or 0
        how = f"was killed by signal {-code}" if code < 0 else f"exited with status {code}"
        return self._failure or MeshError(Reason.WORKER_LOST, f"rank {self.rank} (pid {self.pid}) {how}")


def close_socket(socket: zmq.Socket[bytes]) -> None:
    """Close a socket and the context that was made for it."""
    socket.close()
    socket.context.term()
