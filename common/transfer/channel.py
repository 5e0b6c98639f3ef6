"""The control channel between endpoints: notifications, and who is alive.

Every endpoint listens on one stream socket and serves all its connections from one thread. A connection is
used in one direction: who dialled sends, who accepted receives, and answers a PING. All sockets of the process that
ends are closed by its kernel, so an end of file means that the peer is gone, whatever its engine says. The kernel
closes them after the last thread of the process has left its memory: at the end of file none can write to a mapping.
A connection that ends otherwise (its host does not answer, or has forgotten it) proves nothing.

A frame is a header (magic, version, kind, length, incarnation of the addressee) and at most 64 KiB of payload.
The incarnation is a random UUID that a peer learns from a descriptor; nothing is accepted from a connection
whose first frame does not name ours. A later frame for another incarnation is dropped and counted. AF_UNIX
sockets also accept their own user only.
"""

from __future__ import annotations

import contextlib
import ipaddress
import math
import os
import selectors
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Protocol

from common.transfer.base import TransferError

Address = str | tuple[str, int]
"""An abstract AF_UNIX name, or host and TCP port."""

MAX_PAYLOAD_BYTES = 64 << 10
MAX_UNSENT_BYTES = 16 << 20
HANDSHAKE_TIMEOUT_S = 5.0
# A peer that is out of reach, but for all we know alive, is taken for gone after this time: by then every engine
# has given up a connection that carries nothing (Mooncake after 10 s, UCX and RDMA queue pairs within seconds).
UNREACHABLE_S = 120.0
_RECEIVE_BYTES = 64 << 10
_MAGIC = b"PDMT"
_VERSION = 1
_HEADER = struct.Struct(">4sBBxxI16s")
_HELLO = struct.Struct(">16sQ")  # incarnation and life of who dials
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid


class Kind(IntEnum):
    """What a frame says."""

    HELLO = 1
    WELCOME = 2
    NOTIFY = 3
    WRITE_BEGINS = 4
    WRITE_ENDS = 5
    PING = 6
    PONG = 7


class Link:
    """One connection. `fds` are descriptors that came with the peer's welcome; the link owns them.

    `life` is the peer's, if it dialled. `ended_by_peer` is set when its kernel closed the connection in order.
    """

    def __init__(self, connection: socket.socket, peer: bytes | None) -> None:
        self.socket = connection
        self.peer = peer
        self.life = 0
        self.ended_by_peer = False
        self.fds: list[int] = []
        self.born = time.monotonic()
        self.inbound = bytearray()
        self.outbound = bytearray()
        self.open = True
        self.lock = threading.Lock()

    def flush(self) -> None:
        """Send what the socket takes. The caller holds the lock."""
        while self.outbound:
            try:
                sent = self.socket.send(self.outbound, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            except BlockingIOError:
                return
            except OSError:  # the reading side learns of it too, and tells
                self.outbound.clear()
                return
            del self.outbound[:sent]

    def close(self) -> None:
        with self.lock:
            self.open = False
            self.socket.close()
            while self.fds:
                os.close(self.fds.pop())


class Events(Protocol):
    """Whom a channel tells. Everything is called in the channel's thread and must not block."""

    def on_frame(self, link: Link, kind: Kind, payload: bytes) -> None:
        """A frame came."""

    def on_gone(self, link: Link) -> None:
        """The connection ended, by its peer or by `hang_up`."""

    def on_tick(self) -> float | None:
        """Do what is due; returns the seconds until the next."""


class Channel:
    """An endpoint's connections. `incarnation` is its own UUID, `shared_fds` what a welcome hands out."""

    def __init__(self, incarnation: bytes, address: Address, events: Events, shared_fds: Sequence[int] = ()) -> None:
        self.dropped_frames = 0
        self.refused_hellos = 0
        self.life = 0
        self._incarnation = incarnation
        self._events = events
        self._shared_fds = list(shared_fds)
        self._listener = _listen(address)
        self._poke_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poke_lock = threading.Lock()
        self._tasks: deque[Callable[[], None]] = deque()
        self._links: set[Link] = set()
        self._fence_lock = threading.Lock()
        self._inbound: set[Link] = set()
        self._fenced: dict[bytes, int] = {}  # incarnation -> its last life that is refused
        self._gone_at: dict[bytes, float] = {}  # incarnation -> when its connections that ended were surely no more
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        self._selector.register(self._poke_fd, selectors.EVENT_READ, None)
        self._closing = False
        self._close_lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="transfer-channel", daemon=True)
        self._thread.start()

    @property
    def address(self) -> Address:
        """Where peers dial."""
        name = self._listener.getsockname()
        if isinstance(name, bytes):
            return name.decode()
        return (str(name[0]), int(name[1]))

    def dial(self, address: Address, peer: bytes, life: int | None = None) -> Link:
        """Connect to the incarnation `peer`, in the life `life` (default: this moment's).

        Blocks for at most some seconds. Raises `TransferError`.
        """
        try:
            connection = _connect(address)
        except OSError as error:
            raise TransferError(f"the peer cannot be reached: {error}") from None
        link = Link(connection, peer)
        try:
            _check_user(connection)
            connection.sendall(
                _frame(Kind.HELLO, peer, _HELLO.pack(self._incarnation, self.life if life is None else life))
            )
            _receive_welcome(link, self._incarnation)
        except (OSError, TransferError) as error:
            link.close()
            raise TransferError(f"the peer did not welcome us: {error}") from None
        connection.setblocking(False)
        self._call(lambda: self._watch(link))
        return link

    def send(self, link: Link, kind: Kind, payload: bytes = b"") -> None:
        """Send a frame; never blocks. Raises `TransferError` if the link is gone or the peer does not read."""
        if len(payload) > MAX_PAYLOAD_BYTES:
            raise TransferError(f"a payload of {len(payload)} bytes is longer than {MAX_PAYLOAD_BYTES}")
        with link.lock:
            if not link.open or link.peer is None:
                raise TransferError("the peer is gone")
            if len(link.outbound) > MAX_UNSENT_BYTES:
                raise TransferError("the peer has stopped reading its notifications")
            link.outbound += _frame(kind, link.peer, payload)
            link.flush()
            unsent = bool(link.outbound)
        if unsent:
            self._call(lambda: self._watch_for(link))

    def fence(self, peer: bytes, life: int) -> float | None:
        """Welcome `peer` no more in its life `life` or before.

        Returns since when none of those connections is there, in seconds of the monotonic clock, perhaps in the
        future; None while one is open.
        """
        with self._fence_lock:
            self._fenced[peer] = max(life, self._fenced.get(peer, 0))
            if any(link.peer == peer and link.life <= life for link in self._inbound):
                return None
            return self._gone_at.get(peer, -math.inf)

    def hang_up(self, link: Link) -> None:
        """Close a link, from any thread."""
        self._call(lambda: self._drop(link))

    def poke(self) -> None:
        """Make the thread call `on_tick` now."""
        self._call(lambda: None)

    def close(self) -> None:
        """Close all links and end the thread. Idempotent."""
        with self._close_lock:
            if self._closing:
                return
            self._closing = True
            self.poke()
            self._thread.join()
            while self._tasks:
                self._tasks.popleft()()
            for link in self._links:
                link.close()
            self._selector.close()
            self._listener.close()
            with self._poke_lock:
                os.close(self._poke_fd)
                self._poke_fd = -1

    # ---------------------------------------------------------------------------------- in the thread

    def _call(self, task: Callable[[], None]) -> None:
        with self._poke_lock:
            if self._poke_fd < 0:  # closed, and with it every link
                return
            self._tasks.append(task)
            os.eventfd_write(self._poke_fd, 1)

    def _run(self) -> None:
        while not self._closing:
            for key, mask in self._selector.select(self._events.on_tick()):
                if key.fileobj is self._listener:
                    self._accept()
                elif key.fileobj == self._poke_fd:
                    os.eventfd_read(self._poke_fd)
                else:
                    self._serve(key.data, mask)
            while self._tasks:
                self._tasks.popleft()()

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:  # it went away before we looked
            return
        connection.setblocking(False)
        self._watch(Link(connection, None))
        for link in [link for link in self._links if link.peer is None]:
            if time.monotonic() - link.born > HANDSHAKE_TIMEOUT_S:
                self._drop(link)  # it never said who it is

    def _watch(self, link: Link) -> None:
        self._links.add(link)
        self._selector.register(link.socket, selectors.EVENT_READ, link)

    def _watch_for(self, link: Link) -> None:
        if link in self._links:
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if link.outbound else 0)
            self._selector.modify(link.socket, events, link)

    def _serve(self, link: Link, mask: int) -> None:
        if mask & selectors.EVENT_WRITE:
            with link.lock:
                link.flush()
            self._watch_for(link)
        if not mask & selectors.EVENT_READ:
            return
        try:
            data = link.socket.recv(_RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            link.ended_by_peer = link.socket.family == socket.AF_UNIX and isinstance(error, ConnectionError)
            data = b""
        else:
            link.ended_by_peer = not data
        link.inbound += data
        if not data or not self._take_frames(link):
            self._drop(link)

    def _take_frames(self, link: Link) -> bool:
        """Handle the whole frames that came; False if they are not frames, or say nothing we may trust."""
        while len(link.inbound) >= _HEADER.size:
            try:
                kind, length, addressee = _parse_header(link.inbound)
            except TransferError:
                self.dropped_frames += 1
                return False
            end = _HEADER.size + length
            if len(link.inbound) < end:
                break
            payload = bytes(link.inbound[_HEADER.size : end])
            del link.inbound[:end]
            if addressee != self._incarnation:
                self.dropped_frames += 1
                if link.peer is None:
                    return False
            elif link.peer is None:
                if not self._welcome(link, kind, payload):
                    self.dropped_frames += 1
                    return False
            elif kind == Kind.PING:
                self._answer(link)
            else:
                self._events.on_frame(link, kind, payload)
        return True

    def _answer(self, link: Link) -> None:
        """Tell who asks that this process runs; if it is gone, its end of file comes next."""
        with contextlib.suppress(TransferError):
            self.send(link, Kind.PONG)

    def _welcome(self, link: Link, kind: Kind, payload: bytes) -> bool:
        if kind != Kind.HELLO or len(payload) != _HELLO.size:
            return False
        peer, link.life = _HELLO.unpack(payload)
        with self._fence_lock:
            if link.life <= self._fenced.get(peer, -1):
                self.refused_hellos += 1
                return False
            link.peer = peer
            self._inbound.add(link)  # before it is given anything to write to
        answer = _frame(Kind.WELCOME, peer, self._incarnation)
        try:
            _check_user(link.socket)
            _keep_alive(link.socket)
            if self._shared_fds:
                socket.send_fds(link.socket, [answer], self._shared_fds)
            else:
                link.socket.send(answer)
        except (OSError, TransferError):
            with self._fence_lock:
                self._inbound.discard(link)
            return False
        return True

    def _drop(self, link: Link) -> None:
        if link not in self._links:
            return
        self._links.remove(link)
        self._selector.unregister(link.socket)
        link.close()
        with self._fence_lock:
            if link in self._inbound:
                assert link.peer is not None
                self._inbound.remove(link)
                gone_at = time.monotonic() + (0.0 if link.ended_by_peer else UNREACHABLE_S)
                self._gone_at[link.peer] = max(gone_at, self._gone_at.get(link.peer, gone_at))
        self._events.on_gone(link)


def is_loopback(host: str) -> bool:
    """Whether only this host reaches `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _frame(kind: Kind, addressee: bytes, payload: bytes) -> bytes:
    return _HEADER.pack(_MAGIC, _VERSION, kind, len(payload), addressee) + payload


def _parse_header(data: bytes | bytearray) -> tuple[Kind, int, bytes]:
    """Kind, payload length, addressee. Raises `TransferError`."""
    magic, version, kind, length, addressee = _HEADER.unpack_from(data)
    if magic != _MAGIC or version != _VERSION or kind not in tuple(Kind) or length > MAX_PAYLOAD_BYTES:
        raise TransferError(f"it does not speak version {_VERSION} of the control channel")
    return Kind(kind), length, addressee


def _receive_welcome(link: Link, incarnation: bytes) -> None:
    wanted = _HEADER.size + len(incarnation)
    data = b""
    while len(data) < wanted:
        part, fds, _, _ = socket.recv_fds(link.socket, wanted - len(data), 1, socket.MSG_CMSG_CLOEXEC)
        link.fds += fds
        if not part:
            raise TransferError("it closed the connection; its process was replaced by another")
        data += part
    kind, _, addressee = _parse_header(data)
    if kind != Kind.WELCOME or addressee != incarnation or data[_HEADER.size :] != link.peer:
        raise TransferError("another incarnation answered")


def _listen(address: Address) -> socket.socket:
    """Raises `TransferError`."""
    internet = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    listener = socket.socket(socket.AF_UNIX if isinstance(address, str) else internet, socket.SOCK_STREAM)
    if not isinstance(address, str):  # the port of a process that has ended may be taken at once
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen()
    except OSError as error:
        listener.close()
        raise TransferError(f"the transfer endpoint cannot listen on {address!r}: {error}") from None
    listener.setblocking(False)
    return listener


def _connect(address: Address) -> socket.socket:
    if not isinstance(address, str):
        connection = socket.create_connection(address, HANDSHAKE_TIMEOUT_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _keep_alive(connection)
        return connection
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(HANDSHAKE_TIMEOUT_S)
    try:
        connection.connect(address)
    except OSError:
        connection.close()
        raise
    return connection


def _keep_alive(connection: socket.socket) -> None:
    """A host that vanishes closes nothing: let the kernel ask, and give up after some seconds."""
    if connection.family == socket.AF_UNIX:
        return
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 5)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 2)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 10_000)  # the same where data wait, in ms


def _check_user(connection: socket.socket) -> None:
    """Abstract AF_UNIX names have no permissions of their own: refuse other users."""
    if connection.family == socket.AF_UNIX:
        raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        _, user, _ = _CREDENTIALS.unpack(raw)
        if user != os.geteuid():
            raise TransferError(f"it belongs to user {user}")
