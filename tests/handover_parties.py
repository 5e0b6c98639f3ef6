"""Workers for tests of hand-overs under faults: a real hand-over, engine and transfer backend, and a real process.

A party is a worker as bootstrap and the router see it. `Here` lives in this process and takes its turns when it is
told to; `Child` is a rank process, which can be killed. Between hand-over and backend stands `Unreliable`, which does
what a network may do.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import subprocess
import sys
import tempfile
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import structlog
import zmq

from common.engine.messages import Ledger, Load
from common.kvcache.ledger import Audit
from common.mesh.ticket import Ticket
from common.transfer import notice
from common.transfer.base import (
    Completion,
    Handle,
    HandleState,
    PeerId,
    TransferBackend,
    TransferConfig,
    TransferError,
)
from common.transfer.checksum import Hasher
from common.transfer.peers import Descriptor
from common.transfer.registry import create
from common.worker.build import ready_message
from common.worker.loop import Emit, Handover, RankTurns
from common.worker.messages import FromRank, RankReady, Stop, ToRank
from common.worker.process import Rank, serve_rank
from common.worker.start import RankStart, configure
from common.worker.waker import Waker
from services.decode.handover import DecodeHandover
from services.prefill.handover import PrefillHandover
from tests.paged_toy import paged_engine

TRANSFER_TIMEOUT_S = 30.0
PATIENCE_S = 60.0


class Rates(msgspec.Struct, frozen=True):
    """How often what goes wrong, of all calls."""

    refuse: float = 0.0  # a write is refused
    fail: float = 0.0  # a write is said to have failed, and lands later
    slow: float = 0.0  # the end of a write is told late
    mute: float = 0.0  # the notice cannot be sent
    drop: float = 0.0  # the notice is lost
    hold: float = 0.0  # the notice comes late
    repeat: float = 0.0  # the notice comes again, much later
    corrupt: float = 0.0  # a byte of the pool flips when a notice comes


class Setting(msgspec.Struct, frozen=True):
    """What a party is made of. `control` is where its transfer endpoint listens; None picks an address."""

    role: str
    backend: str
    seed: int
    num_pages: int = 64
    slot_bytes: int = 256
    context_length: int = 1024
    chunk: int = 64
    checksum: str = "off"
    rates: Rates = Rates()
    control: str | tuple[str, int] | None = None


class Unreliable:
    """A transfer backend over one that works; for one thread. `calm` ends all faults and lets go what is held back."""

    def __init__(self, real: TransferBackend, rates: Rates, seed: int) -> None:
        self._real = real
        self._rates = rates
        self._draw = random.Random(seed)
        self._made_up = 0  # handles of writes that are said to have failed; they are below 0
        self._failed: list[Completion] = []
        self._late: dict[Handle, Callable[[], Handle]] = {}  # by a made-up handle: how its write is submitted
        self._landing: dict[Handle, Handle] = {}  # by a made-up handle: the real one
        self._slow: list[tuple[int, Completion]] = []
        self._held: list[tuple[int, bytes]] = []
        self._polls = 0
        self.corrupt: Callable[[bytes], bool] = lambda payload: False
        self.calm = False
        self.did: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def _happens(self, what: str) -> bool:
        if self.calm or self._draw.random() >= getattr(self._rates, what):
            return False
        self.did[what] += 1
        return True

    def submit(self, peer: PeerId, runs: Any, timeout_s: float, key: int = 0) -> Handle:
        if self._happens("refuse"):
            raise TransferError("refused by the test")
        if not self._happens("fail"):
            return self._real.submit(peer, runs, timeout_s, key)
        self._made_up -= 1
        handle = Handle(self._made_up)
        self._failed.append(Completion(handle, HandleState.FAILED, "failed by the test"))
        self._late[handle] = lambda: self._real.submit(peer, runs, timeout_s, key)
        return handle

    def quiet(self, handle: Handle) -> bool:
        """A write that is said to have failed lands some time after, and is quiet when it has."""
        if handle >= 0:
            return self._real.quiet(handle)
        if handle in self._late and (self.calm or self._draw.random() < 0.1):
            with contextlib.suppress(TransferError):  # the peer is gone: nothing will land
                self._landing[handle] = self._late[handle]()
            del self._late[handle]
        return handle not in self._late and handle not in self._landing

    def poll(self) -> list[Completion]:
        self._polls += 1
        ended = self._real.poll()
        landed = set(self._landing.values()) & {completion.handle for completion in ended}
        ended = [completion for completion in ended if completion.handle not in landed] + self._failed
        self._failed = []
        self._landing = {made_up: real for made_up, real in self._landing.items() if not self._real.quiet(real)}
        told = []
        for completion in ended:
            if self._happens("slow"):
                self._slow.append((self._polls + self._draw.randrange(1, 30), completion))
            else:
                told.append(completion)
        told += [completion for due, completion in self._slow if due <= self._polls or self.calm]
        self._slow = [entry for entry in self._slow if entry[0] > self._polls and not self.calm]
        return told

    def notify(self, peer: PeerId, payload: bytes) -> None:
        if self._happens("mute"):
            raise TransferError("muted by the test")
        self._real.notify(peer, payload)

    def received(self) -> list[bytes]:
        told = []
        for payload in self._real.received():
            if self._draw.random() < self._rates.corrupt and self.corrupt(payload):
                self.did["corrupt"] += 1
            if self._happens("drop"):
                continue
            if self._happens("repeat"):
                self._held.append((self._polls + self._draw.randrange(1, 300), payload))
            if self._happens("hold"):
                self._held.append((self._polls + self._draw.randrange(1, 60), payload))
            else:
                told.append(payload)
        told += [payload for due, payload in self._held if due <= self._polls or self.calm]
        self._held = [entry for entry in self._held if entry[0] > self._polls and not self.calm]
        return told


# ------------------------------------------------------------------------------------------ a rank of it


def build(start: RankStart, waker: Waker) -> Rank:
    """What a child runs; the config is a `Setting`. It is silent: thousands of its rooms fail."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    rank, _ = make(start.config_as(Setting), waker)
    return rank


def make(setting: Setting, waker: Waker) -> tuple[Rank, Unreliable]:
    """A rank with a toy that checks its pages."""
    real: Any = create(setting.backend, TransferConfig(), waker.wake)
    if setting.control is not None:
        address = tuple(setting.control) if isinstance(setting.control, list | tuple) else setting.control
        real._control_address = lambda: address
    engine = paged_engine(
        real,
        setting.num_pages,
        slot_bytes=setting.slot_bytes,
        context_length=setting.context_length,
        chunk=setting.chunk,
    )
    backend = Unreliable(real, setting.rates, setting.seed)
    hasher = Hasher(engine.runner.read_page, waker.wake)

    def handover(emit: Emit) -> Handover:
        if setting.role == "prefill":
            return PrefillHandover(engine, backend, emit, TRANSFER_TIMEOUT_S, hasher=hasher, checksum=setting.checksum)
        decode = DecodeHandover(engine, backend, emit, hasher)
        backend.corrupt = lambda payload: flip_a_byte(decode, engine.runner, payload, backend._draw)
        return decode

    return Rank(engine, ready_message(0, engine, setting.backend, real.export()), handover), backend


def flip_a_byte(decode: DecodeHandover, runner: Any, payload: bytes, draw: random.Random) -> bool:
    """In a page of the room that the notice is about; False if it is not waited for."""
    room = decode._rooms.get(notice.decode(payload).ticket)
    if room is None or room.ended or not room.pages:
        return False
    page = runner.read_page(draw.choice(room.pages))
    page[draw.randrange(len(page))] ^= 1 << draw.randrange(8)
    return True


# ------------------------------------------------------------------------------------------ parties


@dataclass(eq=False)
class Party:
    """A worker: what is on its way to its rank and from it, and what bootstrap needs to know of it.

    `life` is its epoch in the control plane. `holds` are the rooms that it was given and is not done with.
    """

    setting: Setting
    descriptor: bytes = b""
    life: int = 0
    lost: bool = True  # it has no life, or not any more
    attached: bool = True
    alive: bool = True
    control: deque[Any] = field(default_factory=deque)
    router: deque[Any] = field(default_factory=deque)
    news: deque[Any] = field(default_factory=deque)
    said: dict[Ticket, list[Any]] = field(default_factory=dict)
    holds: set[Ticket] = field(default_factory=set)
    load: Load = field(default_factory=lambda: Load(0, 0, 0, Ledger(0)))
    audits: int = 0
    did: Counter[str] = field(default_factory=Counter)  # what went wrong there, once it has ended

    @property
    def role(self) -> str:
        return self.setting.role

    @property
    def address(self) -> Any:
        """Where its transfer endpoint listens."""
        return Descriptor.decode(self.descriptor).control

    @property
    def at_rest(self) -> bool:
        pages = self.load.ledger
        return pages.free + pages.cached == self.setting.num_pages and not (self.load.running or self.load.waiting)

    def take_note(self, batch: FromRank | None) -> list[Any]:
        """The messages of a batch; loads and audits are noted here."""
        if batch is None:
            return []
        self.load = batch.load or self.load
        for audit in (message for message in batch.messages if isinstance(message, Audit)):
            assert (audit.leaked_pages, audit.disputed_pages) == (0, 0), f"{self.role}: {audit}"
            self.audits += 1
        return [message for message in batch.messages if not isinstance(message, Audit)]


class Turns(RankTurns):
    """A rank's turns, one step each, so that much may happen between two steps."""

    def __init__(self, rank: Rank) -> None:
        super().__init__(rank.engine)
        self._handover = self.handover = rank.handover(self.emit)

    def apply(self, message: Any) -> None:
        self._apply(message)

    def turn(self) -> FromRank | None:
        self._handover.poll()
        if self._engine.has_work:
            self._tell(self._engine.step(), {})
        return self._take()

    def audit(self) -> Audit:
        return self._auditor.run([*self._engine.claims(), *self._handover.claims()])


class Here(Party):
    """A party in this process. Its end is in order, but without a word to anybody."""

    def __init__(self, setting: Setting, waker: Waker) -> None:
        super().__init__(setting)
        rank, self.backend = make(setting, waker)
        self.turns = Turns(rank)
        self.descriptor = rank.ready.descriptor

    def give(self, message: Any) -> None:
        self.turns.apply(message)

    @property
    def at_rest(self) -> bool:
        return super().at_rest and not self.turns.handover.pending

    def turn(self) -> list[Any]:
        return self.take_note(self.turns.turn())

    def calm(self) -> None:
        self.backend.calm = True

    def kill(self) -> None:
        self.alive = False
        self.did = self.backend.did
        self.backend.calm = True
        self.turns.handover.close()

    close = kill


class Child(Party):
    """A party that is a process of its own, to be killed by SIGKILL."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.PAIR)
        configure(self.socket, linger_ms=0)
        with tempfile.TemporaryDirectory(prefix="pdmesh-test-", dir="/tmp") as folder:
            address = f"ipc://{folder}/rank"
            self.socket.bind(address)
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.handover_parties"],
                stdin=subprocess.PIPE,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                cwd=Path(__file__).parents[1],
            )
            assert self.process.stdin
            start = RankStart(address, os.getpid(), 0, msgspec.msgpack.encode(setting))
            self.process.stdin.write(msgspec.msgpack.encode(start))
            self.process.stdin.close()
            assert self.socket.poll(PATIENCE_S * 1000), "the child did not start"
            ready = self._receive()[0]
        assert isinstance(ready, RankReady), ready
        self.descriptor = ready.descriptor

    def give(self, message: Any) -> None:
        self.socket.send(msgspec.msgpack.encode(ToRank([message])), zmq.NOBLOCK)

    def turn(self) -> list[Any]:
        said = []
        while self.socket.poll(0):
            said += self._receive()
        assert self.process.poll() is None, f"the {self.role} process ended with {self.process.returncode}: {said}"
        return said

    def _receive(self) -> list[Any]:
        return self.take_note(msgspec.msgpack.decode(self.socket.recv(), type=FromRank))

    def calm(self) -> None:
        """Its faults go on; they harm nothing that is at rest."""

    def kill(self) -> None:
        """SIGKILL, in force when this returns."""
        self.alive = False
        self.process.kill()
        self.process.wait()
        self.socket.close()
        self._context.term()

    def close(self) -> None:
        """An end in order."""
        self.alive = False
        self.give(Stop())
        assert self.process.wait(PATIENCE_S) == 0
        self.socket.close()
        self._context.term()


if __name__ == "__main__":
    serve_rank(build)
