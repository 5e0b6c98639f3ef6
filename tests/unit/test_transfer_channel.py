"""The control channel: who is let in, what is dropped, and how an end shows."""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import time
from collections.abc import Callable, Iterator

import pytest

from common.transfer.base import TransferError
from common.transfer.channel import (
    _HELLO,
    MAX_PAYLOAD_BYTES,
    UNREACHABLE_S,
    Channel,
    Kind,
    Link,
    _frame,
    is_loopback,
)

pytestmark = pytest.mark.unit

WAIT_S = 30.0


class Recorder:
    """Keeps what a channel tells."""

    def __init__(self) -> None:
        self.frames: queue.Queue[tuple[Kind, bytes]] = queue.Queue()
        self.gone: queue.Queue[Link] = queue.Queue()

    def on_frame(self, link: Link, kind: Kind, payload: bytes) -> None:
        self.frames.put((kind, payload))

    def on_gone(self, link: Link) -> None:
        self.gone.put(link)

    def on_tick(self) -> float | None:
        return None


class End:
    """A channel with what it told."""

    def __init__(self) -> None:
        self.told = Recorder()
        self.incarnation = os.urandom(16)
        self.channel = Channel(self.incarnation, f"\0pdmesh-test-{self.incarnation.hex()}", self.told)

    def dial(self, other: End) -> Link:
        return self.channel.dial(other.channel.address, other.incarnation)

    def raw(self) -> socket.socket:
        """A connection that speaks for itself."""
        connection = socket.socket(socket.AF_UNIX)
        address = self.channel.address
        assert isinstance(address, str)
        connection.settimeout(WAIT_S)
        connection.connect(address)
        return connection


@pytest.fixture
def make() -> Iterator[Callable[[], End]]:
    ends: list[End] = []

    def start() -> End:
        ends.append(End())
        return ends[-1]

    yield start
    for end in ends:
        end.channel.close()


def test_frames_arrive_whole_and_in_order(make: Callable[[], End]) -> None:
    sender, receiver = make(), make()
    link = sender.dial(receiver)
    payloads = [os.urandom(size) for size in (0, 1, MAX_PAYLOAD_BYTES, 100, MAX_PAYLOAD_BYTES) * 30]
    for payload in payloads:  # more than a socket takes at once
        sender.channel.send(link, Kind.NOTIFY, payload)
    got = [receiver.told.frames.get(timeout=WAIT_S) for _ in payloads]
    assert got == [(Kind.NOTIFY, payload) for payload in payloads]


def test_another_incarnation_is_refused(make: Callable[[], End]) -> None:
    sender, receiver = make(), make()
    with pytest.raises(TransferError, match="replaced by another"):
        sender.channel.dial(receiver.channel.address, os.urandom(16))
    assert receiver.channel.dropped_frames == 1


def test_a_later_frame_for_another_incarnation_is_dropped(make: Callable[[], End]) -> None:
    receiver = make()
    me = os.urandom(16)
    with receiver.raw() as connection:
        connection.sendall(_frame(Kind.HELLO, receiver.incarnation, _HELLO.pack(me, 0)))
        assert connection.recv(1024) == _frame(Kind.WELCOME, me, receiver.incarnation)
        connection.sendall(_frame(Kind.NOTIFY, os.urandom(16), b"stray"))
        connection.sendall(_frame(Kind.NOTIFY, receiver.incarnation, b"mine"))
        assert receiver.told.frames.get(timeout=WAIT_S) == (Kind.NOTIFY, b"mine")
    assert receiver.channel.dropped_frames == 1


@pytest.mark.parametrize(
    "hello", [b"GET / HTTP/1.1\r\nHost: here\r\nAccept: */*\r\n\r\n", b"\0" * 64], ids=["http", "zeros"]
)
def test_strangers_are_hung_up_on(make: Callable[[], End], hello: bytes) -> None:
    receiver = make()
    with receiver.raw() as connection:
        connection.sendall(hello)
        with contextlib.suppress(ConnectionResetError):  # it closed with bytes of ours unread
            assert connection.recv(1) == b""
    assert receiver.told.frames.empty()


def test_a_frame_before_hello_is_refused(make: Callable[[], End]) -> None:
    receiver = make()
    with receiver.raw() as connection:
        connection.sendall(_frame(Kind.NOTIFY, receiver.incarnation, b"hi"))
        assert connection.recv(1) == b""
    assert receiver.told.frames.empty()


def test_an_end_shows_on_both_sides(make: Callable[[], End]) -> None:
    sender, receiver = make(), make()
    link = sender.dial(receiver)
    receiver.channel.close()
    assert sender.told.gone.get(timeout=WAIT_S) is link
    with pytest.raises(TransferError, match="gone"):
        sender.channel.send(link, Kind.NOTIFY, b"")
    third = make()
    sender.channel.hang_up(sender.dial(third))
    third.told.gone.get(timeout=WAIT_S)


def test_close_twice_and_send_after_it(make: Callable[[], End]) -> None:
    sender, receiver = make(), make()
    link = sender.dial(receiver)
    sender.channel.close()
    sender.channel.close()
    sender.channel.hang_up(link)
    with pytest.raises(TransferError, match="gone"):
        sender.channel.send(link, Kind.NOTIFY, b"")


def test_a_taken_address_is_an_error(make: Callable[[], End]) -> None:
    first = make()
    with pytest.raises(TransferError, match="cannot listen"):
        Channel(os.urandom(16), first.channel.address, Recorder())


def test_loopback_hosts() -> None:
    assert all(is_loopback(host) for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost"))
    assert not any(is_loopback(host) for host in ("0.0.0.0", "10.0.0.1", "::", "node-1"))


def test_a_fence_refuses_a_life_and_tells_when_its_connections_have_ended(make: Callable[[], End]) -> None:
    sender, receiver = make(), make()
    fence = receiver.channel.fence
    assert fence(sender.incarnation, 3) == float("-inf"), "it was never here"
    sender.channel.life = 3
    with pytest.raises(TransferError, match="welcome"):
        sender.dial(receiver)
    assert receiver.told.gone.get(timeout=WAIT_S).peer is None
    assert receiver.channel.refused_hellos == 1
    sender.channel.life = 4
    link = sender.dial(receiver)
    assert fence(sender.incarnation, 3) == float("-inf"), "a later life is another matter"
    assert fence(sender.incarnation, 4) is None
    sender.channel.hang_up(link)
    receiver.told.gone.get(timeout=WAIT_S)
    ended_at = fence(sender.incarnation, 4)
    assert ended_at is not None
    assert ended_at <= time.monotonic()


def test_a_connection_that_we_end_proves_nothing_of_its_writer(make: Callable[[], End]) -> None:
    receiver = make()
    me = os.urandom(16)
    with receiver.raw() as connection:
        connection.sendall(_frame(Kind.HELLO, receiver.incarnation, _HELLO.pack(me, 1)))
        connection.recv(1024)
        connection.sendall(b"no frame" * 100)
        receiver.told.gone.get(timeout=WAIT_S)
        ended_at = receiver.channel.fence(me, 1)
        assert ended_at is not None
        assert ended_at > time.monotonic() + UNREACHABLE_S / 2
