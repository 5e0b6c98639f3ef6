"""A router and a bootstrap, both real, with workers that say what a test tells them to."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import httpx
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from common.config.bootstrap import BootstrapAddressConfig
from common.mesh.worker_session import WorkerSession
from common.rpc.announce import READY_FD, Listening, parse
from common.rpc.server import Server, Service, make_server
from common.text.tokenizer import BYTE_OF
from pdmesh.v1 import bootstrap_service_pb2 as bootstrap_pb
from pdmesh.v1 import decode_service_pb2 as decode_pb
from pdmesh.v1 import decode_service_pb2_grpc as decode_grpc
from pdmesh.v1 import prefill_service_pb2 as prefill_pb
from pdmesh.v1 import prefill_service_pb2_grpc as prefill_grpc
from pdmesh.v1 import types_pb2 as pb
from services.bootstrap.config import BootstrapConfig
from services.bootstrap.main import Bootstrap
from services.router.config import RouterConfig, RouterProcessConfig
from services.router.main import serve

CONTEXT, VOCABULARY = 512, 300
BOS, EOS = 256, 257
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"  # noqa: E501

News = decode_pb.SequenceTokens | decode_pb.SequenceRetracted | prefill_pb.SequenceFailed
Script = Callable[[decode_pb.DecodeStart], AsyncIterator[News]]


def save_tokenizer(folder: Path) -> Path:
    """A tokenizer whose ids 0 to 255 are the bytes themselves, with a chat template."""
    stand_ins = {value[0]: char for char, value in BYTE_OF.items()}
    backend = Backend(models.BPE(vocab={stand_ins[byte]: byte for byte in range(256)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True, "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def tokens(ids: Sequence[int], offset: int, finish: str = "", logprobs: int | None = None) -> decode_pb.SequenceTokens:
    """One event; log-probabilities are made up of the ids."""
    entries = []
    if logprobs is not None:
        for token_id in ids:
            top = [pb.TokenLogprob(token_id=(token_id + k) % 256, logprob=-0.5 - k) for k in range(logprobs)]
            entries.append(pb.TokenLogprobs(chosen=pb.TokenLogprob(token_id=token_id, logprob=-0.5), top=top))
    reason = f"FINISH_REASON_{finish.upper() or 'UNSPECIFIED'}"
    return decode_pb.SequenceTokens(
        token_ids=ids, token_offset=offset, finish_reason=pb.FinishReason.Value(reason), logprobs=entries
    )


def saying(text: str, *, at_once: int = 1) -> Script:
    """Say `text`, `at_once` tokens an event, then end-of-sequence; stops at max_new_tokens."""

    async def script(start: decode_pb.DecodeStart) -> AsyncIterator[News]:
        sampling = start.sampling
        ids = [*text.encode(), EOS][: sampling.max_new_tokens]
        logprobs = sampling.logprobs if sampling.HasField("logprobs") else None
        for offset in range(0, len(ids), at_once):
            piece = ids[offset : offset + at_once]
            last = offset + len(piece) == len(ids)
            finish = ("stop" if piece[-1] == EOS else "length") if last else ""
            yield tokens(piece, offset, finish, logprobs)
            await asyncio.sleep(0)

    return script


def stalling(text: str = "abc") -> Script:
    """Say `text` and then nothing, for ever."""

    async def script(start: decode_pb.DecodeStart) -> AsyncIterator[News]:
        yield tokens(list(text.encode()), 0)
        await asyncio.Event().wait()

    return script


def failing(reason: str, after: str = "") -> Script:
    async def script(start: decode_pb.DecodeStart) -> AsyncIterator[News]:
        if after:
            yield tokens(list(after.encode()), 0)
        yield prefill_pb.SequenceFailed(reason=reason, message="as the test has it", retryable=True)

    return script


@dataclass
class Handover:
    """What a scripted pair shares in place of a transfer engine: rooms whose bytes have arrived."""

    arrived: dict[str, asyncio.Event] = field(default_factory=dict)

    def of(self, room_id: str) -> asyncio.Event:
        return self.arrived.setdefault(room_id, asyncio.Event())


class ScriptedWorker:
    """A registered worker. `starts` and `aborts` tell what routers asked of it."""

    def __init__(self, role: str, bootstrap: str, folder: Path, handover: Handover, **model: Any) -> None:
        self.role = role
        self.script: Script = saying("Hello!")
        self.prefill_failure = ""
        self.starts: list[Any] = []
        self.aborts: list[int] = []
        self.running: dict[int, asyncio.Task[None]] = {}
        self._handover = handover
        self._reserved: dict[str, asyncio.Event] = {}
        self._bootstrap = bootstrap
        self._model = {"served_model_name": "bytes", "model_path": str(folder), "fingerprint": "f", **model}
        self.server: Server
        self.session: WorkerSession

    async def start(self, worker_id: str) -> None:
        if self.role == "prefill":
            add: Any = prefill_grpc.add_PrefillServiceServicer_to_server
            name = "pdmesh.v1.PrefillService"
        else:
            add, name = decode_grpc.add_DecodeServiceServicer_to_server, "pdmesh.v1.DecodeService"
        self.server = make_server("127.0.0.1", 0, [Service(name, add, self)])
        await self.server.start()
        record = pb.Worker(
            worker_id=worker_id,
            role=pb.WorkerRole.Value(f"WORKER_ROLE_{self.role.upper()}"),
            address=self.server.address,
            model=pb.ModelInfo(**{"context_length": CONTEXT, "vocab_size": VOCABULARY} | self._model),
            kv_layout=pb.KvLayout(kind="mha", dtype="float32", page_size=16),
            endpoints=[pb.RankEndpoint(rank=0, backend="local", descriptor=b"x")],
            max_running_requests=8,
        )
        self.session = WorkerSession(self._bootstrap, lambda: record, lambda: pb.WorkerLoad(), self._on_control)
        self.session.start()
        await self.session.registered.wait()

    async def stop(self) -> None:
        """Leave in order."""
        await self.session.close()
        await self.die()

    async def die(self) -> None:
        """The gRPC server goes; the session with bootstrap stays until `stop`."""
        await self.server.stop()

    # ------------------------------------------------------------------------------------ its service

    async def Session(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        outbox: asyncio.Queue[Any] = asyncio.Queue()

        async def read() -> None:
            async for request in requests:
                for command in request.commands:
                    if command.HasField("start"):
                        self.starts.append(command.start)
                        run = self._prefill if self.role == "prefill" else self._decode
                        task = asyncio.create_task(run(command.start, outbox))
                        self.running[command.start.sequence_id] = task
                    else:
                        self.aborts.append(command.abort.sequence_id)
                        if task := self.running.pop(command.abort.sequence_id, None):
                            task.cancel()

        reader = asyncio.create_task(read())
        try:
            while True:
                yield await outbox.get()
        finally:
            reader.cancel()
            for task in (*self.running.values(), reader):
                task.cancel()
            await asyncio.gather(*self.running.values(), reader, return_exceptions=True)
            self.running.clear()

    async def _decode(self, start: decode_pb.DecodeStart, outbox: asyncio.Queue[Any]) -> None:
        if start.HasField("ticket"):
            extents = [pb.Extent(first_page=0, page_count=1)]
            ranks = [pb.RankReservation(endpoint=pb.RankEndpoint(backend="local"), extents=extents)]
            reserved = bootstrap_pb.RoomReserved(ticket=start.ticket, reservation=pb.Reservation(ranks=ranks))
            self.session.send(bootstrap_pb.WorkerEvent(reserved=reserved))
            await self._handover.of(start.ticket.room_id).wait()
            arrived = bootstrap_pb.RoomTransferred(ticket=start.ticket, bytes=1)
            self.session.send(bootstrap_pb.WorkerEvent(transferred=arrived))
        async for news in self.script(start):
            event = decode_pb.DecodeEvent(sequence_id=start.sequence_id)
            if isinstance(news, decode_pb.SequenceTokens):
                event.tokens.CopyFrom(news)
            elif isinstance(news, decode_pb.SequenceRetracted):
                event.retracted.SetInParent()
            else:
                event.failed.CopyFrom(news)
            outbox.put_nowait(decode_pb.DecodeServiceSessionResponse(events=[event]))
        self.running.pop(start.sequence_id, None)

    async def _prefill(self, start: prefill_pb.PrefillStart, outbox: asyncio.Queue[Any]) -> None:
        event = prefill_pb.PrefillEvent(sequence_id=start.sequence_id)
        if self.prefill_failure:
            failed = bootstrap_pb.RoomFailed(ticket=start.ticket, reason=self.prefill_failure, message="scripted")
            self.session.send(bootstrap_pb.WorkerEvent(failed=failed))
            event.failed.reason, event.failed.message = self.prefill_failure, "scripted"
        else:
            await self._reserved.setdefault(start.ticket.room_id, asyncio.Event()).wait()
            transferring = bootstrap_pb.RoomTransferring(ticket=start.ticket)
            self.session.send(bootstrap_pb.WorkerEvent(transferring=transferring))
            self._handover.of(start.ticket.room_id).set()
            event.finished.cached_tokens = 3
        outbox.put_nowait(prefill_pb.PrefillServiceSessionResponse(events=[event]))
        self.running.pop(start.sequence_id, None)

    def _on_control(self, event: bootstrap_pb.ControlEvent) -> None:
        if event.HasField("reserved"):
            self._reserved.setdefault(event.reserved.ticket.room_id, asyncio.Event()).set()
        elif event.HasField("ended"):
            quiet = bootstrap_pb.RoomQuiet(ticket=event.ended.ticket)
            if self.role == "prefill":
                self.session.send(bootstrap_pb.WorkerEvent(quiet=quiet))


@dataclass
class Scripted:
    """A mesh under test."""

    bootstrap: Bootstrap
    router: Listening
    workers: dict[str, ScriptedWorker]
    stop: asyncio.Event
    serving: asyncio.Task[None]
    folder: Path
    handover: Handover = field(default_factory=Handover)

    @property
    def http(self) -> str:
        return f"http://{self.router.http}"

    @property
    def grpc(self) -> str:
        return str(self.router.grpc)

    async def add(self, role: str, worker_id: str = "", **model: Any) -> ScriptedWorker:
        worker = ScriptedWorker(role, self.bootstrap.address, self.folder, self.handover, **model)
        await worker.start(worker_id or role)
        self.workers[worker_id or role] = worker
        return worker

    async def ready(self, ready: bool = True, because: str = "") -> None:
        """Wait until `/ready` says so, with `because` in its reason."""

        async def told() -> bool:
            response = await client.get("/ready")
            assert response.status_code == (200 if response.json()["ready"] else 503)
            return response.json()["ready"] is ready and because in str(response.json()["reason"])

        async with httpx.AsyncClient(base_url=self.http) as client:
            await until(told)


@contextlib.contextmanager
def announcement() -> Iterator[Callable[[], Listening]]:
    """Read what a service in this process announces."""
    reader, writer = os.pipe()
    os.environ[READY_FD] = str(writer)
    with os.fdopen(reader) as file:
        yield lambda: parse(file.readline())


@contextlib.asynccontextmanager
async def scripted(folder: Path, *roles: str, **settings: Any) -> AsyncIterator[Scripted]:
    """A bootstrap, a router with `settings`, and one worker for each of `roles`; waits until it is ready."""
    save_tokenizer(folder)
    bootstrap = Bootstrap(BootstrapConfig(port=0))
    await bootstrap.start()
    await bootstrap.serve()
    config = RouterProcessConfig(
        router=RouterConfig(**{"port": 0, "grpc_port": 0, "drain_timeout": 0.5} | settings),
        bootstrap=BootstrapAddressConfig(bootstrap=bootstrap.address),
    )
    stop = asyncio.Event()
    with announcement() as announced:
        serving = asyncio.create_task(serve(config, stop))
        router = await asyncio.to_thread(announced)
    mesh = Scripted(bootstrap, router, {}, stop, serving, folder)
    try:
        for role in roles:
            await mesh.add(role)
        if roles:
            await mesh.ready()
        yield mesh
    finally:
        stop.set()
        await serving
        for worker in mesh.workers.values():
            await worker.stop()
        await bootstrap.stop()


async def until(condition: Callable[[], bool | Awaitable[bool]]) -> None:
    """Wait for something that other tasks of this loop bring about."""
    async with asyncio.timeout(20):
        while True:
            holds = condition()
            if holds if isinstance(holds, bool) else await holds:
                return
            await asyncio.sleep(0.005)


def reason_of(error: grpc.aio.AioRpcError) -> str:
    from common.rpc.status import error_from

    return str(error_from(error).reason)
