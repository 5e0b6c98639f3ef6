"""A worker's front: the process between the mesh and the ranks. It speaks gRPC and never imports torch.

Prefill, decode and unified workers differ in the service that they show to routers and in how a rank's message
looks there; that difference is a `Role`. Everything else is here.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Generic, TypeVar

import msgspec
from google.protobuf.timestamp_pb2 import Timestamp

from common.config.tls import Credentials
from common.config.tls import load as load_tls
from common.engine.messages import Arrivals, Ledger, Load, Retracted, SequenceFailed, Tokens
from common.errors.base import MeshError, Reason
from common.kvcache.hashes import CacheChanges
from common.kvcache.ledger import Audit
from common.mesh.credit import Credit
from common.mesh.wire import ticket_from
from common.mesh.worker_session import WorkerSession
from common.obs import log, metrics
from common.rpc.address import join
from common.rpc.announce import announce
from common.rpc.server import Server, Service, make_server
from common.worker import arrival_metrics, audit_metrics, convert, transfer_metrics
from common.worker.cache_news import CacheTeller
from common.worker.config import WorkerConfig
from common.worker.credit import CreditTeller, Throttle
from common.worker.held import HeldRooms
from common.worker.messages import (
    AbortSequence,
    FromRank,
    Prefilled,
    RankFailed,
    RankReady,
    Registered,
    RoomQuiet,
    RoomTransferred,
    StartSequence,
)
from common.worker.ranks import RankLink, RankProcess
from common.worker.sessions import Session, Sessions
from pdmesh.v1 import bootstrap_service_pb2 as bootstrap_pb
from pdmesh.v1 import types_pb2 as pb

logger = log.get_logger(__name__)

E = TypeVar("E")
SequenceNews = Tokens | Prefilled | Retracted | SequenceFailed

# A load that changes with every step is told to bootstrap at most this often, beside the heartbeats. Routers
# hear of credit directly, and at once.
LOAD_INTERVAL_S = 0.25

KV_PAGES = metrics.gauge("kv_pages", "Pages of the KV pool by ledger state.", ("state",))
RUNNING = metrics.gauge("running_sequences", "Sequences in the running batch.")
WAITING = metrics.gauge("waiting_sequences", "Sequences that wait for a slot, pages or a hand-over.")
CREDIT_PAGES = metrics.gauge("credit_pages", "Pages that may still be promised, growth of what runs counted.")
CREDIT_SEQUENCES = metrics.gauge("credit_sequences", "Places in the running batch that nobody has or waits for.")
GENERATED = metrics.counter("generated_tokens_total", "Tokens sent to routers.")
RETRACTED = metrics.counter("retracted_sequences_total", "Sequences that gave their pages back so that others grow.")
ENDED = metrics.counter("sequences_ended_total", "Sequences that ended on this worker.", ("outcome",))

OUTCOME: dict[type, str] = {SequenceFailed: "failed", Retracted: "retracted"}


@dataclass(frozen=True)
class Role(Generic[E]):
    """What sets prefill, decode and unified apart."""

    name: str  # "prefill", "decode" or "unified"
    proto: pb.WorkerRole.ValueType
    rank_module: str
    make_service: Callable[[Front[E]], Service]
    to_event: Callable[[int, SequenceNews], E]
    to_cache_event: Callable[[pb.PrefixCacheUpdate], E]
    to_credit_event: Callable[[Credit, int], E] | None = None  # where there is credit


class Front(Generic[E]):
    """One worker, from start to stop: `await Front(role, config).run(stop)`."""

    def __init__(self, role: Role[E], config: WorkerConfig) -> None:
        self.role = role
        self.config = config
        self.sessions = Sessions[E]()
        self._accepting = False
        self._load = Load(0, 0, 0, Ledger(0))
        self._audit = Audit()
        self._load_teller = Throttle(lambda: self._mesh.heartbeat(), LOAD_INTERVAL_S)
        self._cache_teller = CacheTeller(self.sessions, role.to_cache_event)
        self._credit_teller = CreditTeller(self.sessions, role.to_credit_event) if role.to_credit_event else None
        self._held = HeldRooms(prefill=role.proto == pb.WORKER_ROLE_PREFILL)
        self._idle = asyncio.Event()
        self._idle.set()
        self._failure: MeshError | None = None
        self._stop: asyncio.Event
        self._drain_timeout_s = config.drain_timeout
        self._tls: Credentials | None = None
        self._server: Server
        self._rank: RankLink
        self._mesh: WorkerSession

    # ------------------------------------------------------------------------------------ life

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until `stop` is set or the rank is gone. Raises `MeshError` when it cannot start or go on."""
        host = self.config.host
        metrics_port, stop_metrics = metrics.serve(host, self.config.metrics.metrics_port)
        try:
            await self.serve(
                stop, lambda address: announce(self.role.name, grpc=address, metrics=join(host, metrics_port))
            )
        finally:
            stop_metrics()

    async def serve(self, stop: asyncio.Event, on_listening: Callable[[str], None] = lambda address: None) -> None:
        """`run` without the things that a process has once; `on_listening` is told where it listens."""
        config = self.config
        self._stop = stop
        self._tls = load_tls(config.tls)
        self._server = make_server(config.host, config.port, [self.role.make_service(self)], tls=self._tls)
        try:
            await self._server.start()
            on_listening(self._server.address)
            if await self._spawn_rank(stop):
                self._mesh = self._make_session()
                reader = asyncio.create_task(self._read_rank(stop))
                try:
                    await self._serve(stop)
                finally:
                    await self._rank.stop()
                    await reader
        finally:
            await self._server.stop()
        if self._failure:
            raise self._failure

    async def _spawn_rank(self, stop: asyncio.Event) -> bool:
        """Load the model; False when `stop` was set before it was there."""
        threads = self.config.engine.cpu_threads
        config = msgspec.msgpack.encode(self.config)
        spawn = RankProcess.spawn(self.role.rank_module, config, cpu_threads=threads)
        loading = asyncio.create_task(spawn)
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait((loading, stopped), return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if not loading.done():
            loading.cancel()
            await asyncio.gather(loading, return_exceptions=True)
            return False
        self._rank = loading.result()
        return True

    def _make_session(self) -> WorkerSession:
        assert self._rank.ready  # `spawn` has returned
        record = self._describe(self._rank.ready)
        return WorkerSession(
            self.config.bootstrap.address,
            lambda: record,
            lambda: convert.load_to(self._load, self._audit),
            self._on_control,
            on_registered=self._on_registered,
            tls=self._tls,
            held=self._held.announce,
        )

    async def _serve(self, stop: asyncio.Event) -> None:
        self._accepting = True  # before routers hear of this worker
        self._mesh.start()
        try:
            await self._register(stop)
            await stop.wait()
            if self._failure:
                await self._fall(self._failure)
            else:
                await self._drain()
        finally:
            self._load_teller.close()
            self._cache_teller.close()
            if self._credit_teller:
                self._credit_teller.close()
            await self._mesh.close()

    async def _register(self, stop: asyncio.Event) -> None:
        """Wait for the first registration; a bootstrap that is not there ends the worker with a reason."""
        timeout_s = self.config.bootstrap_connect_timeout
        tasks = [asyncio.create_task(event.wait()) for event in (self._mesh.registered, stop)]
        done, waiting = await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        for task in waiting:
            task.cancel()
        if not done:
            address = self.config.bootstrap.address
            raise MeshError(Reason.BOOTSTRAP_UNREACHABLE, f"no bootstrap answered at {address} within {timeout_s:g} s")
        if not stop.is_set():
            await self._server.set_serving(True)
            logger.info("ready", worker=self._mesh.worker_id, address=self._server.address)

    async def _fall(self, failure: MeshError) -> None:
        """The rank is gone, and all that it did: say so at once."""
        self._accepting = False
        await self._server.set_serving(False)
        for sequence_id in self.sessions.running():
            self._on_sequence(SequenceFailed(sequence_id, Reason.WORKER_LOST, failure.message))
        self.sessions.close_all()

    async def _drain(self) -> None:
        """Refuse new sequences, let running ones finish within the drain timeout."""
        self._accepting = False
        await self._server.set_serving(False)
        self._mesh.draining()
        try:
            await asyncio.wait_for(self._idle.wait(), self._drain_timeout_s)
        except TimeoutError:
            logger.warning("sequences still running at the end of the drain", sequences=len(self.sessions))
        self.sessions.close_all()

    # ------------------------------------------------------------------------------------ routers

    async def serve_session(
        self, requests: AsyncIterator[Any], apply: Callable[[Session[E], Any], None]
    ) -> AsyncIterator[list[E]]:
        """One router's stream: `apply` each request, yield batches of events. A broken one aborts what it left."""
        session = self.sessions.open()
        if self._credit_teller:
            self._credit_teller.opened(session)
        self._cache_teller.opened(session)

        async def read() -> None:
            try:
                async for request in requests:
                    apply(session, request)
            finally:
                session.outbox.close()

        reader = asyncio.create_task(read())
        try:
            async for batch in session.outbox.batches():
                yield batch
            if reader.done():
                reader.result()  # a command that cannot be read ends the stream with its error
        finally:
            reader.cancel()
            for sequence_id in self.sessions.drop(session):
                self._rank.send(AbortSequence(sequence_id))
            self._check_idle()

    def start(
        self,
        session: Session[E],
        number: int,
        request_id: str,
        ticket: pb.Ticket | None,
        prompt_ids: list[int],
        sampling: pb.SamplingParams,
        output_ids: list[int],
        writer: pb.Writer | None = None,
    ) -> None:
        """Begin the router's sequence `number`.

        `output_ids` are what an earlier attempt generated; `writer` is who brings the pages, if another worker does.
        """
        if not self._accepting:
            failed = SequenceFailed(0, Reason.DRAINING, "the worker is starting or draining")
            session.outbox.put(self.role.to_event(number, failed))
            return
        sequence_id = self.sessions.add(session, number)
        self._idle.clear()
        if ticket:
            self._held.started(sequence_id, ticket, writer)
        self._rank.send(
            StartSequence(
                sequence_id=sequence_id,
                request_id=request_id,
                ticket=ticket_from(ticket) if ticket else None,
                prompt_ids=prompt_ids,
                sampling=convert.sampling_from(sampling),
                output_ids=output_ids,
            )
        )

    def abort(self, session: Session[E], number: int) -> None:
        """Stop a sequence; one that has just ended is no error."""
        if (sequence_id := session.sequences.get(number)) is not None:
            self.sessions.end(sequence_id)
            self._rank.send(AbortSequence(sequence_id))
            ENDED.labels("abort").inc()
            self._check_idle()

    # ------------------------------------------------------------------------------------ ranks

    async def _read_rank(self, stop: asyncio.Event) -> None:
        """Pass on what the rank says. A rank that is gone takes its worker with it, and so does a defect here."""
        try:
            async for batch in self._rank.batches():
                self._on_rank(batch)
        except MeshError as error:
            logger.error("the rank is gone", reason=error.reason, message=error.message)
            self._failure = error
            stop.set()
        except Exception as error:  # nobody would read the rank from here on: every stream would hang
            logger.exception("cannot pass on what the rank says")
            self._failure = MeshError(Reason.INTERNAL, f"{type(error).__name__}: {error}")
            stop.set()

    def _on_rank(self, batch: FromRank) -> None:
        """A step's news: sequences' to their routers, and then, for nobody waits for them, rooms' to bootstrap."""
        of_rooms = []
        for message in batch.messages:
            match message:
                case Tokens() | Prefilled() | Retracted() | SequenceFailed():
                    self._on_sequence(message)
                    if isinstance(message, Prefilled):
                        transfer_metrics.publish(message)
                case Audit():
                    self._on_audit(message)
                case CacheChanges():
                    self._cache_teller.update(message)
                case RankReady() | RankFailed():
                    raise TypeError(f"a rank that runs sent {type(message).__name__}")
                case _:
                    if isinstance(message, RoomTransferred | RoomQuiet):
                        transfer_metrics.publish(message)
                    event = convert.room_event_to(message)
                    self._held.said(event)
                    of_rooms.append(event)
        for event in of_rooms:
            self._mesh.send(event)
        if batch.load:
            self._on_load(batch.load)

    def _on_sequence(self, news: SequenceNews) -> None:
        if isinstance(news, Tokens):
            GENERATED.inc(len(news.token_ids))
        if not isinstance(news, Tokens) or news.finish:
            self._held.ended(news.sequence_id)
        if (owner := self.sessions.owner(news.sequence_id)) is None:
            return  # aborted meanwhile
        session, number = owner
        # that prefill is done, the router learns from decode's first token
        put = session.outbox.put_at_leisure if isinstance(news, Prefilled) else session.outbox.put
        put(self.role.to_event(number, news))
        if not isinstance(news, Tokens) or news.finish:
            self.sessions.end(news.sequence_id)
            ENDED.labels(OUTCOME.get(type(news), "finished")).inc()
            self._check_idle()

    def _on_load(self, load: Load) -> None:
        RETRACTED.inc(load.retracted - self._load.retracted)
        if load.arrivals:
            arrival_metrics.publish(load.arrivals, self._load.arrivals or Arrivals())
        self._load = load
        RUNNING.set(load.running)
        WAITING.set(load.waiting)
        for state in load.ledger.__struct_fields__:
            KV_PAGES.labels(state).set(getattr(load.ledger, state))
        self._load_teller.want()
        if self._credit_teller and load.credit:
            CREDIT_PAGES.set(load.credit.pages)
            CREDIT_SEQUENCES.set(load.credit.sequences)
            self._credit_teller.update(load.credit, load.last_start)

    def _on_audit(self, audit: Audit) -> None:
        """Its figures go with the next heartbeat, or at once if something is wrong that was not before."""
        before, self._audit = self._audit, audit
        audit_metrics.publish(audit, before)
        if (audit.leaked_pages, audit.disputed_pages) != (before.leaked_pages, before.disputed_pages):
            self._load_teller.want()

    def _check_idle(self) -> None:
        if not len(self.sessions):
            self._idle.set()

    # ------------------------------------------------------------------------------------ bootstrap

    def _on_registered(self) -> None:
        self._rank.send(Registered(self._mesh.epoch))

    def _on_control(self, event: bootstrap_pb.ControlEvent) -> None:
        if message := convert.control_from(event):
            self._held.told(event)
            self._rank.send(message)
        elif event.HasField("drain"):
            self._leave(event.drain)
        elif event.HasField("refused"):
            refused = event.refused
            logger.info("event refused", room=refused.ticket.room_id, what=refused.event, why=refused.message)

    def _leave(self, drain: bootstrap_pb.Drain) -> None:
        """An operator wants this worker to finish what it has and go: what SIGTERM does, with a timeout of its own."""
        if drain.HasField("timeout"):
            self._drain_timeout_s = drain.timeout.ToNanoseconds() / 1e9
        logger.info("asked to drain", timeout_s=self._drain_timeout_s, sequences=len(self.sessions))
        self._stop.set()

    def _describe(self, ready: RankReady) -> pb.Worker:
        engine, address = self.config.engine, self.config.address(self._server.port)
        ready_at = Timestamp()
        ready_at.GetCurrentTime()
        return pb.Worker(
            worker_id=self.config.worker_id or f"{self.role.name}-{address}",
            role=self.role.proto,
            address=address,
            model=pb.ModelInfo(
                served_model_name=engine.served_model_name or PurePath(engine.model_path).name,
                model_path=ready.model_path,
                fingerprint=ready.fingerprint,
                context_length=ready.context_length,
                vocab_size=ready.vocab_size,
                ready_at=ready_at,
            ),
            kv_layout=convert.layout_to(ready),
            endpoints=[pb.RankEndpoint(rank=ready.rank, backend=ready.backend, descriptor=ready.descriptor)],
            max_running_requests=engine.max_running_requests,
            pool_pages=ready.num_pages,
        )
