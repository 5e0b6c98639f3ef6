"""What all backends share: handles and their deadlines, peers, notifications, the order of closing.

A backend adds its engine by overriding the hooks at the end of `Endpoint`. Locks: `_lock` guards the tables and
is never held while something blocks or calls out.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from common.transfer.base import (
    Capabilities,
    Completion,
    Handle,
    HandleState,
    PeerId,
    Run,
    TransferConfig,
    TransferError,
    Wake,
)
from common.transfer.channel import Address, Channel, Kind, Link
from common.transfer.dispatcher import Dispatcher, PeerQueue, Transfer, Writer
from common.transfer.memory import address_of, map_memory
from common.transfer.runs import checked

_MAGIC = b"pdmesh-transfer-1:"


class Descriptor(msgspec.Struct, frozen=True, array_like=True):
    """What `export` gives away. `engine` is the backend's own."""

    backend: str
    incarnation: bytes
    control: str | tuple[str, int]
    pool_bytes: int
    engine: bytes

    def encode(self) -> bytes:
        return _MAGIC + msgspec.msgpack.encode(self)

    @staticmethod
    def decode(data: bytes) -> Descriptor:
        """Raises `TransferError` for anything but a descriptor of this version."""
        if not data.startswith(_MAGIC):
            raise TransferError("this is not a transfer descriptor of a version that this build reads")
        try:
            return msgspec.msgpack.decode(data[len(_MAGIC) :], type=Descriptor)
        except msgspec.DecodeError as error:
            raise TransferError(f"the transfer descriptor is damaged: {error}") from None


@dataclass(frozen=True)
class Pool:
    """This process's memory that takes part in transfers: the host's, or that of CUDA device `gpu`."""

    address: int
    nbytes: int
    gpu: int | None = None


@dataclass(eq=False)
class _Peer:
    descriptor: Descriptor
    link: Link
    dispatcher: PeerQueue
    gone: str = ""


class Endpoint(ABC):
    """A `TransferBackend` without an engine. Every method may be called from any thread."""

    name: str
    capabilities: Capabilities
    # How long bytes of a process that has ended may still be on their way into the pool, in seconds.
    settle_s: float = 0.0

    def __init__(self, config: TransferConfig, wake: Wake) -> None:
        self.config = config
        self.incarnation = uuid.uuid4().bytes
        self._wake = wake
        self._lock = threading.Lock()
        self._connecting = threading.Lock()
        self._pool: Pool | None = None
        self._channel: Channel | None = None
        self._peers: dict[PeerId, _Peer] = {}
        self._peer_ids = itertools.count(1)
        self._handles = itertools.count(1)
        self._transfers: dict[Handle, tuple[_Peer, Transfer]] = {}  # those that have not ended
        self._deadlines: list[tuple[float, Handle]] = []  # a heap; may name transfers that have ended
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
        pool, channel = self._begun()
        address = self._announced(channel.address)
        return Descriptor(self.name, self.incarnation, address, pool.nbytes, self._engine_info()).encode()

    def _begin(self, pool: Pool) -> None:
        if self._closed or self._pool is not None:
            raise TransferError("the endpoint is closed" if self._closed else "the endpoint has its pool already")
        self._start_engine(pool)
        self._channel = Channel(self.incarnation, self._control_address(), self, self._shared_fds())
        self._pool = pool

    def _begun(self) -> tuple[Pool, Channel]:
        if self._closed:
            raise TransferError("the endpoint is closed")
        if self._pool is None or self._channel is None:
            raise TransferError("the endpoint has no pool yet")
        return self._pool, self._channel

    # ------------------------------------------------------------------------------------------ peers

    def connect(self, descriptor: bytes) -> PeerId:
        pool, channel = self._begun()
        wanted = Descriptor.decode(descriptor)
        if wanted.backend != self.name:
            raise TransferError(f"the peer's transfer backend is {wanted.backend}, this one is {self.name}")
        with self._connecting:
            for peer_id, peer in list(self._peers.items()):
                if peer.descriptor.incarnation == wanted.incarnation:
                    if peer.gone:
                        raise TransferError(f"{peer.gone}; disconnect it before connecting again")
                    return peer_id
            link = channel.dial(wanted.control, wanted.incarnation)
            peer_id = PeerId(next(self._peer_ids))
            dispatcher = self._make_dispatcher(f"transfer-peer-{peer_id}", pool, wanted, link)
            peer = _Peer(wanted, link, dispatcher)
            with self._lock:
                if not link.open:
                    peer.gone = "the peer is gone"
                self._peers[peer_id] = peer
            return peer_id

    def disconnect(self, peer: PeerId) -> None:
        known = self._peers.get(peer)
        if known is None or self._channel is None:
            return
        self._lose(known, "the peer was disconnected")
        known.dispatcher.stop()
        known.dispatcher.join()
        self._channel.hang_up(known.link)
        with self._lock:
            self._peers.pop(peer, None)

    def live(self, epoch: int) -> None:
        _, channel = self._begun()
        channel.life = epoch

    def fence(self, descriptor: bytes, epoch: int) -> bool:
        _, channel = self._begun()
        writer = Descriptor.decode(descriptor)
        if writer.backend != self.name:
            raise TransferError(f"the writer's transfer backend is {writer.backend}, this one is {self.name}")
        gone_at = channel.fence(writer.incarnation, epoch)
        return gone_at is not None and time.monotonic() >= gone_at + self.settle_s

    def _lose(self, peer: _Peer, why: str) -> None:
        with self._lock:
            peer.gone = peer.gone or why
            lost = [transfer for owner, transfer in self._transfers.values() if owner is peer]
        for transfer in lost:
            self._finish(transfer, HandleState.FAILED, why)

    def _peer(self, peer_id: PeerId) -> _Peer:
        peer = self._peers.get(peer_id)
        if peer is None:
            raise TransferError(f"there is no peer {peer_id}, or no more")
        return peer

    # -------------------------------------------------------------------------------------- transfers

    def submit(self, peer: PeerId, runs: Sequence[Run], timeout_s: float) -> Handle:
        pool, channel = self._begun()
        known = self._peer(peer)
        pieces = checked(runs, pool.nbytes, known.descriptor.pool_bytes)
        transfer = Transfer(Handle(next(self._handles)), pieces, timeout_s)
        with self._lock:
            self._transfers[transfer.handle] = (known, transfer)
            heapq.heappush(self._deadlines, (transfer.deadline, transfer.handle))
            first = self._deadlines[0][1] == transfer.handle
            gone = known.gone
        if gone:
            self._finish(transfer, HandleState.FAILED, gone)
            return transfer.handle
        if first:
            channel.poke()
        known.dispatcher.put(transfer)
        return transfer.handle

    def poll(self) -> list[Completion]:
        with self._lock:
            completions, self._completions = self._completions, []
        return completions

    def _finish(self, transfer: Transfer, state: HandleState, error: str) -> None:
        with self._lock:
            if transfer.ended:
                return
            transfer.ended = True
            del self._transfers[transfer.handle]
            self._completions.append(transfer.completion(state, error))
        self._wake()

    # ---------------------------------------------------------------------------------- notifications

    def notify(self, peer: PeerId, payload: bytes) -> None:
        _, channel = self._begun()
        channel.send(self._peer(peer).link, Kind.NOTIFY, payload)

    def received(self) -> list[bytes]:
        with self._lock:
            payloads, self._received = self._received, []
        return payloads

    def on_frame(self, link: Link, kind: Kind, payload: bytes) -> None:
        """The channel's: a frame came."""
        if kind in (Kind.WRITE_BEGINS, Kind.WRITE_ENDS):
            self._on_remote_write(link, kind == Kind.WRITE_BEGINS)
        elif kind == Kind.NOTIFY:
            with self._lock:
                self._received.append(payload)
            self._wake()

    def on_gone(self, link: Link) -> None:
        """The channel's: a connection ended, so what runs over it cannot succeed."""
        self._on_remote_write(link, False)
        with self._lock:
            lost = [peer for peer in self._peers.values() if peer.link is link]
        for peer in lost:
            self._lose(peer, "the peer is gone")
        self._wake()

    def on_tick(self) -> float | None:
        """The channel's: end what is over its time; returns the seconds until the next deadline."""
        expired: list[Transfer] = []
        now = time.monotonic()
        with self._lock:
            while self._deadlines:
                deadline, handle = self._deadlines[0]
                if handle in self._transfers:
                    if deadline > now:
                        break
                    expired.append(self._transfers[handle][1])
                heapq.heappop(self._deadlines)
            wait = self._deadlines[0][0] - now if self._deadlines else None
        for transfer in expired:
            self._finish(transfer, HandleState.FAILED, f"it did not end within {transfer.timeout_s:g} s")
        return wait

    # ------------------------------------------------------------------------------------------ close

    def close(self) -> None:
        with self._connecting:
            with self._lock:
                if self._closed:
                    return
                self._closed = True
                peers = dict(self._peers)
            for peer in peers.values():  # first tell all, then wait for each
                self._lose(peer, "the endpoint was closed")
                peer.dispatcher.stop()
            for peer_id in peers:
                self.disconnect(peer_id)
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

    def _make_dispatcher(self, name: str, pool: Pool, peer: Descriptor, link: Link) -> PeerQueue:
        """What takes the transfers to one peer."""
        return Dispatcher(name, lambda: self._open_writer(pool, peer, link), self._finish)

    @abstractmethod
    def _start_engine(self, pool: Pool) -> None:
        """Make `pool` a target. Raises `TransferError`."""

    @abstractmethod
    def _engine_info(self) -> bytes:
        """What `_open_writer` needs at the other side."""

    @abstractmethod
    def _open_writer(self, pool: Pool, peer: Descriptor, link: Link) -> Writer:
        """Reach a peer's pool; in the thread that will use the writer. Raises `TransferError`."""

    @abstractmethod
    def _stop_engine(self) -> None:
        """Free the engine; also after a start that failed."""
