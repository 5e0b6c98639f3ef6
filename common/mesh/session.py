"""A bidirectional stream to bootstrap that is opened again whenever it breaks."""

from __future__ import annotations

import asyncio
import random
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, Generic, TypeVar

import grpc

from common.config.tls import Credentials
from common.errors.base import MeshError, Reason
from common.mesh.outbox import Outbox
from common.obs.log import get_logger
from common.rpc.channel import connect, error_from
from pdmesh.v1 import bootstrap_service_pb2_grpc

Up = TypeVar("Up")
Down = TypeVar("Down")

FIRST_BACKOFF_S, LAST_BACKOFF_S = 0.1, 1.0
GOODBYE_S = 1.0

log = get_logger(__name__)


class Session(ABC, Generic[Up, Down]):
    """Runs from `start` to `close`, in one task. Callbacks run in the event loop and must not block."""

    def __init__(self, address: str, tls: Credentials | None = None) -> None:
        self.address = address
        self.tls = tls
        self.outbox: Outbox[Up] = Outbox()
        self._task: asyncio.Task[None] | None = None
        self._backoff_s = FIRST_BACKOFF_S
        self._last_error = ""
        self.closing = False

    @abstractmethod
    def open(self, stub: bootstrap_service_pb2_grpc.BootstrapServiceAsyncStub) -> Any:
        """Start the call."""

    @abstractmethod
    def request(self, events: list[Up]) -> Any:
        """The message that carries `events`."""

    @abstractmethod
    def opened(self) -> None:
        """A new stream: what must be said first goes into the outbox."""

    @abstractmethod
    def receive(self, event: Down) -> None:
        """Something bootstrap says."""

    @abstractmethod
    def lost(self, error: MeshError) -> None:
        """The stream broke or could not be opened, and will be tried again; or, while `closing`, it was closed."""

    def start(self) -> None:
        """Begin to connect; returns at once."""
        self._task = asyncio.create_task(self._run(), name=f"session with {self.address}")

    async def close(self) -> None:
        """Send what is queued, say goodbye and stop. Idempotent."""
        self.closing = True
        self.outbox.close()
        task, self._task = self._task, None
        if task is None:
            return
        await asyncio.wait([task], timeout=GOODBYE_S)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        self.lost(unreachable(self.address, "the session was closed"))

    def established(self) -> None:
        """To be called by `receive` once bootstrap has accepted the session."""
        self._backoff_s = FIRST_BACKOFF_S
        self._last_error = ""
        log.info("session with bootstrap established", address=self.address)

    async def turn(self) -> None:
        """Wait until a stream may be opened; for sessions that must not all begin at once."""

    async def _run(self) -> None:
        while not self.closing:
            await self.turn()
            error = await self._converse()
            if self.closing:
                return
            self.lost(error)
            if error.message != self._last_error:  # say it once, not with every attempt
                log.warning("no session with bootstrap", address=self.address, error=error.message)
                self._last_error = error.message
            await asyncio.sleep(self._backoff_s * random.uniform(0.5, 1.5))
            self._backoff_s = min(self._backoff_s * 2, LAST_BACKOFF_S)

    async def _converse(self) -> MeshError:
        """One stream from beginning to end; returns why it ended."""
        self.outbox = Outbox()
        # a channel of its own: no back-off but ours
        channel = connect(self.address, self.tls)
        try:
            call = self.open(bootstrap_service_pb2_grpc.BootstrapServiceStub(channel))
            writer = asyncio.create_task(self._write(call))
            try:
                self.opened()
                async for response in call:
                    events: Iterable[Down] = response.events
                    for event in events:
                        self.receive(event)
            finally:
                self.outbox.close()
                writer.cancel()
                await asyncio.gather(writer, return_exceptions=True)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNAVAILABLE and error_from(error).reason is Reason.WORKER_LOST:
                return unreachable(self.address, error.details() or "")
            return error_from(error)
        except Exception as error:  # a defect here: a task that died of it would leave nobody connected, in silence
            log.exception("cannot take what bootstrap says", address=self.address)
            return MeshError(Reason.INTERNAL, f"{type(error).__name__}: {error}")
        finally:
            await channel.close()
        return unreachable(self.address, "the stream ended")

    async def _write(self, call: Any) -> None:
        """Send batches until the outbox or the call ends; an error of the call is told by its reader."""
        try:
            async for batch in self.outbox.batches():
                await call.write(self.request(batch))
            await call.done_writing()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return
        except Exception:
            log.exception("cannot write to bootstrap")
            call.cancel()


def unreachable(address: str, why: str) -> MeshError:
    return MeshError(Reason.BOOTSTRAP_UNREACHABLE, f"bootstrap at {address} cannot be reached: {why}")
