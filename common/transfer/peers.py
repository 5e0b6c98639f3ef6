"""Whom an endpoint writes to: sessions, and the probing of peers that are out of reach.

A session is one connection of the control channel to one incarnation of a peer, in the life of the moment in which it
was asked for; it never comes back, so that what was granted to an old life is not reached through a new one. When it
is lost, the endpoint lets go of all that belongs to it, and its peer is probed: dialled again after a time that
doubles from `PROBE_FIRST_S` to `PROBE_MOST_S`, with some chance in it, so that many who lost one peer do not dial
in step. Once it answers it has its next session. A peer that did not for `PROBE_FOR_S` is forgotten: its process has
ended, and its successor has a name of its own; who connects to it nevertheless dials anew.

Dialling blocks (a name to resolve, a handshake of seconds with who does not answer), so each has a short-lived thread.
"""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from common.transfer.base import PeerId, TransferError
from common.transfer.channel import Channel, Link
from common.transfer.sender import Transfer

PROBE_FIRST_S = 0.2
PROBE_MOST_S = 15.0
PROBE_FOR_S = 180.0
# So many writes in a row that an engine refused cost the session, whatever the control channel says.
STRIKES = 3

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


class Way(Protocol):
    """What takes the transfers to one peer: a `sender.Outlet`, unless the backend has its own."""

    def put(self, transfer: Transfer) -> None:
        """Queue a transfer. Does not block."""

    def stop(self) -> None:
        """Let go of the peer, soon; whoever calls has ended the transfers. Idempotent, does not block."""

    def is_writing(self, transfer: Transfer) -> bool:
        """Whether an ended transfer may still write."""


@dataclass(eq=False)
class Session:
    """A connection to a peer, from the wish for it to its end. The endpoint's lock guards it.

    Until the peer has answered there is no `link`; transfers are `held`, and so are `notes` to it. `lost` says why
    it is no more.
    """

    peer_id: PeerId
    target: Target
    life: int
    waiting: list[int]  # transfers that have not ended, by queue
    link: Link | None = None
    way: Way | None = None
    held: deque[Transfer] = field(default_factory=deque)
    notes: list[bytes] = field(default_factory=list)
    up: bool = False  # nothing is held any more
    lost: str = ""
    strikes: int = 0
    heard_at: float = 0.0
    pinged_at: float = 0.0
    closed: threading.Event = field(default_factory=threading.Event)  # nothing of it is left


@dataclass(eq=False)
class Target:
    """A peer's incarnation. It is down, and probed, while `why` says so."""

    descriptor: Descriptor
    session: Session | None = None
    why: str = ""
    interval_s: float = 0.0
    probe_at: float = 0.0
    down_since: float = 0.0

    def recovered(self) -> None:
        """It is well: the next time that it is lost it is probed soon."""
        self.interval_s = 0.0


class Host(Protocol):
    """The endpoint, as its peers see it."""

    def make_way(self, descriptor: Descriptor, link: Link, session: Session) -> Way:
        """What takes the transfers to a peer that has answered."""

    def on_up(self, session: Session) -> None:
        """The session has its link and its way: let go what was held."""

    def on_lost(self, session: Session) -> None:
        """End its transfers. No locks are held. The way is stopped next, and calls `Peers.closed` in the end."""


class Peers:
    """Sessions by their `PeerId`, targets by their incarnation. `lock` is the endpoint's."""

    def __init__(self, channel: Channel, lock: threading.Lock, host: Host, queues: int) -> None:
        self._channel = channel
        self._lock = lock
        self._host = host
        self._queues = queues
        self._ids = itertools.count(1)
        self._sessions: dict[PeerId, Session] = {}
        self._targets: dict[bytes, Target] = {}
        self._dialling: set[threading.Thread] = set()
        self._closed = False

    def connect(self, descriptor: Descriptor, life: int) -> PeerId:
        """The peer's session, or a new one. Raises `TransferError` while the peer is down."""
        now = time.monotonic()
        with self._lock:
            if self._closed:
                raise TransferError("the endpoint is closed")
            target = self._targets.get(descriptor.incarnation)
            if target is None:
                target = self._targets[descriptor.incarnation] = Target(descriptor)
            if target.why:
                wait = max(target.probe_at - now, 0.0)
                raise TransferError(f"{target.why}; it is tried again in {wait:.1f} s")
            session = target.session or self._begin(target, life)
            return session.peer_id

    def get(self, peer: PeerId) -> Session:
        """A session that is not lost, with the lock held. Raises `TransferError`."""
        session = self._sessions.get(peer)
        if session is None:
            raise TransferError(f"there is no peer {peer}, or no more: it is gone, or was disconnected")
        if session.lost:
            raise TransferError(session.lost)
        return session

    def find(self, peer: PeerId) -> Session | None:
        """A session that has not closed yet, lost or not."""
        return self._sessions.get(peer)

    def of_link(self, link: Link) -> Session | None:
        """Whose connection it is, if it is one that we dialled."""
        return next((session for session in list(self._sessions.values()) if session.link is link), None)

    def all(self) -> list[Session]:
        """All that have not closed yet."""
        return list(self._sessions.values())

    def lose(self, session: Session, why: str, *, probe: bool = True) -> None:
        """End a session. Idempotent."""
        now = time.monotonic()
        with self._lock:
            if session.lost:
                return
            session.lost = why
            target = session.target
            if target.session is session:
                target.session = None
                if probe and not self._closed:
                    _down(target, why, now)
                else:
                    self._targets.pop(target.descriptor.incarnation, None)
            dialling = session.link is None
        self._host.on_lost(session)
        if not dialling:  # else its thread finds out
            assert session.way is not None
            session.way.stop()
        self._channel.poke()  # there is a new time to probe

    def forgive(self) -> None:
        """A new life begins: who refused the old one may be dialled at once."""
        with self._lock:
            for target in [target for target in self._targets.values() if target.why and target.session is None]:
                del self._targets[target.descriptor.incarnation]

    def closed(self, session: Session) -> None:
        """The endpoint's: nothing is written any more for a lost session. Hangs up."""
        if session.link is not None:
            self._channel.hang_up(session.link)
        with self._lock:
            self._sessions.pop(session.peer_id, None)
        session.closed.set()

    def on_tick(self, life: int) -> float | None:
        """Probe whom it is time for; returns the seconds until the next."""
        now = time.monotonic()
        waits = []
        with self._lock:
            if self._closed:
                return None
            for target in [target for target in self._targets.values() if target.why]:
                if target.session is not None:
                    continue
                if now - target.down_since > PROBE_FOR_S:
                    del self._targets[target.descriptor.incarnation]
                elif target.probe_at <= now:
                    self._begin(target, life)
                else:
                    waits.append(target.probe_at - now)
        return min(waits, default=None)

    def close(self) -> None:
        """Lose all, and wait until nothing is left of any."""
        with self._lock:
            self._closed = True
            sessions = self.all()
        for session in sessions:
            self.lose(session, "the endpoint was closed", probe=False)
        for session in sessions:
            session.closed.wait()
        for thread in list(self._dialling):
            thread.join()

    # ------------------------------------------------------------------------------------------ dial

    def _begin(self, target: Target, life: int) -> Session:
        """With the lock held."""
        session = target.session = Session(PeerId(next(self._ids)), target, life, [0] * self._queues)
        self._sessions[session.peer_id] = session
        thread = threading.Thread(target=self._dial, args=(session,), name="transfer-dial", daemon=True)
        self._dialling.add(thread)
        thread.start()
        return session

    def _dial(self, session: Session) -> None:
        descriptor = session.target.descriptor
        try:
            link = self._channel.dial(descriptor.control, descriptor.incarnation, session.life)
        except TransferError as error:
            self.lose(session, str(error))
            self.closed(session)
        else:
            self._answered(session, link)
        with self._lock:
            self._dialling.discard(threading.current_thread())

    def _answered(self, session: Session, link: Link) -> None:
        way = self._host.make_way(session.target.descriptor, link, session)
        with self._lock:
            if not session.lost:
                session.link, session.way = link, way
                session.heard_at = time.monotonic()
                session.target.why = ""
        if session.lost:
            self._channel.hang_up(link)
            self.closed(session)
            return
        self._host.on_up(session)
        if not link.open:
            self.lose(session, "the peer is gone")


def _down(target: Target, why: str, now: float) -> None:
    if not target.why:
        target.down_since = now
    target.why = why
    target.interval_s = min(max(2 * target.interval_s, PROBE_FIRST_S), PROBE_MOST_S)
    target.probe_at = now + target.interval_s * random.uniform(0.75, 1.25)
