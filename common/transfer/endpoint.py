"""What all backends share: handles and their deadlines, notifications, the order of closing.

A backend adds its engine by overriding the hooks at the end of `Endpoint`. Who writes is in `sender.py`, to whom in
`peers.py`. Locks: `_lock` guards the tables and is never held while something blocks or calls out.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from common.transfer.base import (
    Capabilities,
    Completion,
    Handle,
    HandleState,
    PeerId,
    Pieces,
    Run,
    TransferConfig,
    TransferError,
    Wake,
)
from common.transfer.channel import Address, Channel, Kind, Link
from common.transfer.memory import address_of, map_memory
from common.transfer.peers import STRIKES, Descriptor, Peers, Session, Way
from common.transfer.runs import batches, checked
from common.transfer.sender import Outlet, SenderPool, Transfer, Writer

# What may wait in one queue to one peer. More would only take from what coalesces later.
QUEUE_DEPTH = 16
# A peer is asked for a sign of life while transfers to it are under way; without one it is lost.
UNANSWERED_S = 10.0
_PING_S = 2.0
_TICK_S = 0.5


@dataclass(frozen=True)
class Pool:
    """This process's memory that takes part in transfers: the host's, or that of CUDA device `gpu`."""

    address: int
    nbytes: int
    gpu: int | None = None


class Endpoint(ABC):
    """A `TransferBackend` without an engine. Every method may be called from any thread."""

    name: str
    capabilities: Capabilities
    # How long bytes of a process that has ended may still be on their way into the pool, in seconds.
    settle_s: float = 0.0
    # What an engine is given at once: a transfer that is to end must wait for it.
    part_pieces: int = 1024
    part_bytes: int = 16 << 20

    def __init__(self, config: TransferConfig, wake: Wake) -> None:
        self.config = config
        self.incarnation = uuid.uuid4().bytes
        self._wake = wake
        self._lock = threading.Lock()
        self._closing = threading.Lock()
        self._pool: Pool | None = None
        self._channel: Channel | None = None
        self._peers: Peers | None = None
        self._senders = SenderPool(config.threads, config.queues, self._released)
        self._handles = itertools.count(1)
        self._transfers: dict[Handle, tuple[Session, Transfer]] = {}  # those that have not ended
        self._noisy: dict[Handle, tuple[Session, Transfer]] = {}  # those that have, and may still be written
        self._deadlines: list[tuple[float, Handle]] = []  # a heap; may name transfers that are over
        self._completions: list[Completion] = []
        self._received: list[bytes] = []
        self._closed = False

    # ------------------------------------------------------------------------------------------- pool

    def allocate(self, nbytes: int) -> memoryview:
        view = self._map_pool(nbytes)
        self._begin(Pool(address_of(view), nbytes))
        return view

    def register(self, address: int, nbytes: int, gpu: int | None = None) -> None:
        if gpu is not None and not self.capabilities.device_memory:
            raise TransferError(f"the {self.name} transfer backend moves host memory, and this pool is on GPU {gpu}")
        self._begin(Pool(address, nbytes, gpu))

    def export(self) -> bytes:
        pool, channel, _ = self._begun()
        address = self._announced(channel.address)
        return Descriptor(self.name, self.incarnation, address, pool.nbytes, self._engine_info()).encode()

    def _begin(self, pool: Pool) -> None:
        if self._closed or self._pool is not None:
            raise TransferError("the endpoint is closed" if self._closed else "the endpoint has its pool already")
        self._start_engine(pool)
        self._channel = Channel(self.incarnation, self._control_address(), self, self._shared_fds())
        self._peers = Peers(self._channel, self._lock, self, self.config.queues)
        self._pool = pool

    def _begun(self) -> tuple[Pool, Channel, Peers]:
        if self._closed:
            raise TransferError("the endpoint is closed")
        if self._pool is None or self._channel is None or self._peers is None:
            raise TransferError("the endpoint has no pool yet")
        return self._pool, self._channel, self._peers

    # ------------------------------------------------------------------------------------------ peers

    def connect(self, descriptor: bytes) -> PeerId:
        _, channel, peers = self._begun()
        wanted = Descriptor.decode(descriptor)
        if wanted.backend != self.name:
            raise TransferError(f"the peer's transfer backend is {wanted.backend}, this one is {self.name}")
        return peers.connect(wanted, channel.life)

    def disconnect(self, peer: PeerId) -> None:
        session = self._peers.find(peer) if self._peers is not None else None
        if session is not None and self._peers is not None:
            self._peers.lose(session, "the peer was disconnected", probe=False)
            session.closed.wait()

    def live(self, epoch: int) -> None:
        _, channel, peers = self._begun()
        if epoch != channel.life:
            channel.life = epoch
            peers.forgive()

    def fence(self, descriptor: bytes, epoch: int) -> bool:
        _, channel, _ = self._begun()
        writer = Descriptor.decode(descriptor)
        if writer.backend != self.name:
            raise TransferError(f"the writer's transfer backend is {writer.backend}, this one is {self.name}")
        gone_at = channel.fence(writer.incarnation, epoch)
        return gone_at is not None and time.monotonic() >= gone_at + self.settle_s

    def make_way(self, descriptor: Descriptor, link: Link, session: Session) -> Way:
        """The peers': what takes the transfers to one that has answered."""
        pool, _, peers = self._begun()
        return Outlet(self._senders, lambda: self._open_writer(pool, descriptor, link), lambda: peers.closed(session))

    def on_up(self, session: Session) -> None:
        """The peers': a session has its way."""
        _, channel, _ = self._begun()
        assert session.way is not None
        assert session.link is not None
        while True:
            with self._lock:
                held, session.held = session.held, deque()
                notes, session.notes = session.notes, []
                if not held and not notes:
                    session.up = True
                    return
            for transfer in held:
                session.way.put(transfer)
            for note in notes:
                with contextlib.suppress(TransferError):  # it is gone again, which its link tells
                    channel.send(session.link, Kind.NOTIFY, note)

    def on_lost(self, session: Session) -> None:
        """The peers': a session is no more."""
        with self._lock:
            for owner, transfer in self._noisy.values():
                transfer.give_up |= owner is session
            lost = [transfer for owner, transfer in self._transfers.values() if owner is session]
        for transfer in lost:
            self._finish(transfer, HandleState.FAILED, session.lost, give_up=True)
        self._wake()

    # -------------------------------------------------------------------------------------- transfers

    def submit(self, peer: PeerId, runs: Sequence[Run] | Pieces, timeout_s: float, key: int = 0) -> Handle:
        pool, _, peers = self._begun()
        with self._lock:
            session = peers.get(peer)
        pieces = checked(runs, pool.nbytes, session.target.descriptor.pool_bytes)
        parts = deque(batches(pieces, self.part_pieces, self.part_bytes)) or deque([pieces])
        transfer = Transfer(Handle(next(self._handles)), key % self.config.queues, timeout_s, parts)
        with self._lock:
            if session.lost:
                raise TransferError(session.lost)
            if session.waiting[transfer.queue] >= QUEUE_DEPTH:
                raise TransferError(f"{QUEUE_DEPTH} transfers wait in this queue already")
            session.waiting[transfer.queue] += 1
            self._transfers[transfer.handle] = (session, transfer)
            heapq.heappush(self._deadlines, (transfer.deadline, transfer.handle))
            if not session.up:
                session.held.append(transfer)
            up = session.up
        if up:
            assert session.way is not None
            session.way.put(transfer)
        return transfer.handle

    def accepts(self, peer: PeerId, key: int = 0) -> bool:
        _, _, peers = self._begun()
        with self._lock:
            session = peers.find(peer)
            return session is None or bool(session.lost) or session.waiting[key % self.config.queues] < QUEUE_DEPTH

    def cancel(self, handle: Handle) -> None:
        with self._lock:
            found = self._transfers.get(handle)
        if found:
            self._finish(found[1], HandleState.FAILED, "it was cancelled")

    def quiet(self, handle: Handle) -> bool:
        with self._lock:
            return handle not in self._transfers and handle not in self._noisy

    def poll(self) -> list[Completion]:
        with self._lock:
            completions, self._completions = self._completions, []
        return completions

    def _finish(self, transfer: Transfer, state: HandleState, error: str, *, give_up: bool = False) -> None:
        """Tell how a transfer ended, if nobody has."""
        now = time.monotonic()
        with self._lock:
            if transfer.ended:
                return
            session, _ = self._transfers.pop(transfer.handle)
            session.waiting[transfer.queue] -= 1
            transfer.give_up |= give_up
            transfer.ended = True
            if state is HandleState.FAILED:
                self._noisy[transfer.handle] = (session, transfer)
            else:
                session.strikes = 0
                session.target.recovered()
            self._completions.append(
                Completion(
                    transfer.handle,
                    state,
                    error,
                    seconds=now - transfer.submitted,
                    queued_s=(transfer.begun or now) - transfer.submitted,
                    nbytes=transfer.nbytes,
                    descriptors=transfer.descriptors,
                )
            )
        if state is HandleState.FAILED and not (session.way and session.way.is_writing(transfer)):
            self._hush(transfer)
        self._wake()

    def _released(self, transfer: Transfer, error: str) -> None:
        """The senders': no worker is in the transfer, nor will be."""
        with self._lock:
            found = self._transfers.get(transfer.handle) or self._noisy.get(transfer.handle)
        if found is None:
            return
        session = found[0]
        struck = bool(error) and not session.lost
        self._finish(transfer, HandleState.FAILED if error else HandleState.DONE, error)
        self._hush(transfer)
        if struck:
            self._strike(session, error)

    def _hush(self, transfer: Transfer) -> None:
        with self._lock:
            was_noisy = self._noisy.pop(transfer.handle, None)
        if was_noisy:
            self._wake()

    def _strike(self, session: Session, error: str) -> None:
        """An engine refused a write. Once may be the write's fault, again and again is the connection's."""
        with self._lock:
            session.strikes += 1
            out = session.strikes >= STRIKES
        if out and self._peers is not None:
            self._peers.lose(session, f"{STRIKES} writes in a row failed; the last: {error}")

    # ---------------------------------------------------------------------------------- notifications

    def notify(self, peer: PeerId, payload: bytes) -> None:
        _, channel, peers = self._begun()
        with self._lock:
            session = peers.get(peer)
            if not session.up:
                session.notes.append(payload)
                return
        assert session.link is not None
        channel.send(session.link, Kind.NOTIFY, payload)

    def received(self) -> list[bytes]:
        with self._lock:
            payloads, self._received = self._received, []
        return payloads

    def on_frame(self, link: Link, kind: Kind, payload: bytes) -> None:
        """The channel's: a frame came."""
        if kind in (Kind.WRITE_BEGINS, Kind.WRITE_ENDS):
            self._on_remote_write(link, kind == Kind.WRITE_BEGINS)
        elif kind == Kind.PONG and self._peers is not None:
            if session := self._peers.of_link(link):
                session.heard_at = time.monotonic()
        elif kind == Kind.NOTIFY:
            with self._lock:
                self._received.append(payload)
            self._wake()

    def on_gone(self, link: Link) -> None:
        """The channel's: a connection ended, so what runs over it cannot succeed."""
        self._on_remote_write(link, False)
        if self._peers is not None and (session := self._peers.of_link(link)):
            self._peers.lose(session, "the peer is gone")
        self._wake()

    # ------------------------------------------------------------------------------------------ clock

    def on_tick(self) -> float | None:
        """The channel's: do what is due; returns the seconds until it may be called again at the latest."""
        if self._closed or self._channel is None or self._peers is None:
            return None
        now = time.monotonic()
        self._expire(now)
        self._ask_for_signs_of_life(now, self._channel, self._peers)
        self._senders.relieve(now)
        waits = [self._peers.on_tick(self._channel.life)]
        if self._peers.all():  # a submission does not wake the channel: that costs more than a small transfer
            waits.append(_TICK_S)
        return min((wait for wait in waits if wait is not None), default=None)

    def _expire(self, now: float) -> None:
        expired: list[Transfer] = []
        with self._lock:
            while self._deadlines:
                deadline, handle = self._deadlines[0]
                found = self._transfers.get(handle) or self._noisy.get(handle)
                if found and deadline > now:
                    break
                if found:
                    found[1].give_up = True  # also one that was only cancelled
                    expired.append(found[1])
                heapq.heappop(self._deadlines)
        for transfer in expired:
            message = f"it did not end within {transfer.timeout_s:g} s"
            self._finish(transfer, HandleState.FAILED, message, give_up=True)

    def _ask_for_signs_of_life(self, now: float, channel: Channel, peers: Peers) -> None:
        with self._lock:
            waited_for = {session for session, _ in (*self._transfers.values(), *self._noisy.values())}
        for session in waited_for:
            if session.link is None or session.lost:
                continue
            if session.pinged_at <= session.heard_at:
                if now - session.heard_at > _PING_S:
                    session.pinged_at = now
                    try:
                        channel.send(session.link, Kind.PING)
                    except TransferError as error:
                        peers.lose(session, str(error))
            elif now - session.pinged_at > UNANSWERED_S:
                peers.lose(session, f"the peer has not answered for {UNANSWERED_S:g} s")

    # ------------------------------------------------------------------------------------------ close

    def close(self) -> None:
        with self._closing:
            if self._closed:
                return
            if self._peers is not None:
                self._peers.close()
            self._closed = True
            self._senders.close()
            if self._channel is not None:
                self._channel.close()
            self._stop_engine()

    # ------------------------------------------------------------------------------------------ hooks

    def _map_pool(self, nbytes: int) -> memoryview:
        """Memory that this engine can use as a pool."""
        return map_memory(nbytes)

    def _control_address(self) -> Address:
        """Where the control channel listens; port 0 picks one."""
        return (self.config.listen or self.config.host, 0)

    def _announced(self, address: Address) -> Address:
        """Where peers reach the control channel that listens on `address`."""
        return address if isinstance(address, str) else (self.config.host, address[1])

    def _shared_fds(self) -> Sequence[int]:
        """Descriptors that every peer is handed."""
        return ()

    def _on_remote_write(self, link: Link, active: bool) -> None:
        """A peer begins or ends to write here. In the channel's thread; `active=False` may repeat."""
        return

    @abstractmethod
    def _start_engine(self, pool: Pool) -> None:
        """Make `pool` a target. Raises `TransferError`."""

    @abstractmethod
    def _engine_info(self) -> bytes:
        """What `_open_writer` needs at the other side."""

    @abstractmethod
    def _open_writer(self, pool: Pool, peer: Descriptor, link: Link) -> Writer:
        """Reach a peer's pool; in a sender's thread. Raises `TransferError`."""

    @abstractmethod
    def _stop_engine(self) -> None:
        """Free the engine; also after a start that failed."""
