"""One stream to one worker, shared by all sequences that this router has there."""

from __future__ import annotations

import asyncio
import itertools
import random
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

import grpc

from common.config.tls import Credentials
from common.errors.base import MeshError, Reason
from common.mesh.credit import Credit
from common.mesh.outbox import Outbox
from common.obs.log import get_logger
from common.rpc.channel import connect
from pdmesh.v1 import decode_service_pb2, prefill_service_pb2, types_pb2
from pdmesh.v1.decode_service_pb2_grpc import DecodeServiceStub
from pdmesh.v1.prefill_service_pb2_grpc import PrefillServiceStub
from services.router.credits import CreditAccount
from services.router.prefix_index import CachedPrefixes

FIRST_BACKOFF_S, LAST_BACKOFF_S = 0.05, 2.0

Command = TypeVar("Command")
Event = TypeVar("Event", bound="Numbered")
EventIn = TypeVar("EventIn", contravariant=True)

log = get_logger(__name__)
sequence_ids = itertools.count(1)


class Numbered(Protocol):
    """An event of one sequence."""

    @property
    def sequence_id(self) -> int: ...


class Sink(Protocol[EventIn]):
    """Takes the news of one sequence. Both run in the event loop and must neither block nor raise."""

    def on_event(self, event: EventIn) -> None:
        """Something the worker tells."""

    def on_lost(self, error: MeshError) -> None:
        """The stream broke: the worker has given the sequence up, or is gone. Nothing more will come."""


class WorkerLink(ABC, Generic[Command, Event]):
    """The Session stream to a worker, opened again with backoff whenever it breaks, until `close`.

    Commands of one turn of the event loop leave in one message; events reach their sequence's sink by number.
    """

    def __init__(self, record: types_pb2.Worker, on_change: Callable[[], None], tls: Credentials | None = None) -> None:
        self.record = record
        self.prefixes = CachedPrefixes(record.pool_pages)
        self.connected = False
        self._on_change = on_change
        self._sinks: dict[int, Sink[Event]] = {}
        self._outbox: Outbox[Command] = Outbox()
        self._channel = connect(record.address, tls)
        self._last_error = ""
        self._task = asyncio.create_task(self._run(), name=f"link to {record.worker_id}")

    @property
    def worker_id(self) -> str:
        return self.record.worker_id

    @property
    def in_flight(self) -> int:
        """Sequences that are on the worker, as far as this router knows."""
        return len(self._sinks)

    @property
    def available(self) -> bool:
        """Whether new sequences may be sent there."""
        return self.connected and self.record.state == types_pb2.WORKER_STATE_READY

    def start(self, make: Callable[[int], Command], sink: Sink[Event]) -> int:
        """Send the start command that `make` builds for a new sequence id; returns the id.

        Raises `MeshError` (WORKER_LOST) while there is no stream.
        """
        if not self.connected:
            raise self._lost("the stream is down")
        sequence_id = next(sequence_ids)
        self._sinks[sequence_id] = sink
        self._outbox.put(make(sequence_id))
        return sequence_id

    def abort(self, sequence_id: int) -> None:
        """Stop a sequence; its sink hears nothing more. Without effect on one that has ended."""
        if self._sinks.pop(sequence_id, None) is not None:
            self._outbox.put(self.abort_command(sequence_id))

    def forget(self, sequence_id: int) -> None:
        """The sequence is over, nothing more is expected. Idempotent."""
        self._sinks.pop(sequence_id, None)

    async def close(self) -> None:
        """End the stream: the worker aborts what is still on it, and so do we. Idempotent."""
        self._outbox.close()
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await self._channel.close()

    # ---------------------------------------------------------------------------------- of the protocol

    @abstractmethod
    def open(self, channel: grpc.aio.Channel) -> Any:
        """Open the stream."""

    @abstractmethod
    def request(self, commands: list[Command]) -> Any:
        """The message that carries `commands`."""

    @abstractmethod
    def abort_command(self, sequence_id: int) -> Command:
        """The command that stops a sequence."""

    @abstractmethod
    def on_worker_event(self, event: Event) -> None:
        """News of the worker itself."""

    def on_stream(self, up: bool) -> None:
        """The stream is up, or has broken: what the worker told of itself holds no more."""
        self.prefixes.clear()

    # ---------------------------------------------------------------------------------- of the stream

    async def _run(self) -> None:
        backoff_s = FIRST_BACKOFF_S
        try:
            while True:
                problem = await self._converse()
                backoff_s = FIRST_BACKOFF_S if self.connected else min(backoff_s * 2, LAST_BACKOFF_S)
                self._disconnected(problem)
                await asyncio.sleep(backoff_s * random.uniform(0.5, 1.5))
        finally:
            self._disconnected("the link is closed")

    async def _converse(self) -> str:
        """One stream from beginning to end; returns why it ended."""
        self._outbox = Outbox()
        call = self.open(self._channel)
        writer = asyncio.create_task(self._write(call))
        try:
            await call.wait_for_connection()
            self._connected()
            async for response in call:
                for event in response.events:
                    if (sink := self._sinks.get(event.sequence_id)) is not None:
                        sink.on_event(event)
                    elif not event.sequence_id:
                        self.on_worker_event(event)
        except grpc.aio.AioRpcError as error:
            return error.details() or error.code().name
        except Exception as error:  # a defect here: a task that died of it would leave the worker out, in silence
            log.exception("cannot take what a worker says", worker=self.worker_id)
            return f"{type(error).__name__}: {error}"
        finally:
            self._outbox.close()
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)
            call.cancel()
        return "the worker ended the stream"

    async def _write(self, call: Any) -> None:
        try:
            async for commands in self._outbox.batches():
                await call.write(self.request(commands))
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return  # the reader learns why
        except MeshError as error:
            log.error("the stream to a worker stalls", worker=self.worker_id, error=error.message)
            call.cancel()

    def _connected(self) -> None:
        self.connected = True
        self.on_stream(True)
        self._last_error = ""
        log.info("link up", worker=self.worker_id, address=self.record.address)
        self._on_change()

    def _disconnected(self, problem: str) -> None:
        was, self.connected = self.connected, False
        self.on_stream(False)
        sinks, self._sinks = self._sinks, {}
        for sink in sinks.values():
            sink.on_lost(self._lost(problem))
        if problem != self._last_error:  # say it once, not with every attempt
            log.info("link down", worker=self.worker_id, address=self.record.address, error=problem)
            self._last_error = problem
        if was:
            self._on_change()

    def _lost(self, problem: str) -> MeshError:
        message = f"worker {self.worker_id} at {self.record.address}: {problem}"
        return MeshError(Reason.WORKER_LOST, message, retry_after_s=1.0)


PrefillCommand = prefill_service_pb2.PrefillCommand
PrefillEvent = prefill_service_pb2.PrefillEvent
DecodeCommand = decode_service_pb2.DecodeCommand
DecodeEvent = decode_service_pb2.DecodeEvent


class PrefillLink(WorkerLink[PrefillCommand, PrefillEvent]):
    """To a prefill worker."""

    def on_worker_event(self, event: PrefillEvent) -> None:
        if event.HasField("cache"):
            self.prefixes.apply(event.cache)

    def open(self, channel: grpc.aio.Channel) -> Any:
        return PrefillServiceStub(channel).Session(wait_for_ready=True)

    def request(self, commands: list[PrefillCommand]) -> prefill_service_pb2.PrefillServiceSessionRequest:
        return prefill_service_pb2.PrefillServiceSessionRequest(commands=commands)

    def abort_command(self, sequence_id: int) -> PrefillCommand:
        return PrefillCommand(abort=prefill_service_pb2.PrefillAbort(sequence_id=sequence_id))


class DecodeLink(WorkerLink[DecodeCommand, DecodeEvent]):
    """To a decode or unified worker. `on_credit` is called whenever the worker has published new credit."""

    on_credit: Callable[[], None] | None = None

    def __init__(self, record: types_pb2.Worker, on_change: Callable[[], None], tls: Credentials | None = None) -> None:
        self.account = CreditAccount()
        super().__init__(record, on_change, tls)

    @property
    def pool_tokens(self) -> int:
        """Tokens that its whole KV pool holds; 0 when it does not tell."""
        return self.record.pool_pages * self.record.kv_layout.page_size

    def on_worker_event(self, event: DecodeEvent) -> None:
        if event.HasField("credit"):
            self._publish(event.credit.credit, event.credit.last_start)
        elif event.HasField("cache"):
            self.prefixes.apply(event.cache)

    def on_stream(self, up: bool) -> None:
        super().on_stream(up)
        self.account.forget()
        if up and self.record.load.HasField("credit"):
            self._publish(self.record.load.credit, 0)  # until the stream's first word

    def _publish(self, credit: types_pb2.Credit, last_start: int) -> None:
        self.account.publish(credit_from(credit, self.record.kv_layout.page_size), last_start)
        if self.on_credit:
            self.on_credit()

    def open(self, channel: grpc.aio.Channel) -> Any:
        return DecodeServiceStub(channel).Session(wait_for_ready=True)

    def request(self, commands: list[DecodeCommand]) -> decode_service_pb2.DecodeServiceSessionRequest:
        return decode_service_pb2.DecodeServiceSessionRequest(commands=commands)

    def abort_command(self, sequence_id: int) -> DecodeCommand:
        return DecodeCommand(abort=decode_service_pb2.DecodeAbort(sequence_id=sequence_id))


def credit_from(message: types_pb2.Credit, page_size: int) -> Credit:
    return Credit(message.pages, message.sequences, message.limit_pages, message.reserved_tokens, page_size)
