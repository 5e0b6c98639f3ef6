"""Many requests at one instant, over plain sockets: what it costs to ask and to listen must not be what is measured.

All connections stand and all requests are made before; then they are sent one after the other, some 10 µs each, and a
selector notes when the end of each answer is here. No event loop, no client library.
"""

from __future__ import annotations

import json
import selectors
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from load import complete

TIMEOUT_S = 60.0


@dataclass
class Answered:
    """An answer: when it was complete, counted from the sending of its own request, and what it says."""

    seconds: float
    status: int
    body: dict[str, object]


def burst(url: str, requests: Sequence[bytes]) -> list[Answered]:
    """Send all of `requests` at once, each over a connection of its own. Raises `TimeoutError`."""
    where = urlsplit(url)
    connections = [socket.create_connection((where.hostname, where.port)) for _ in requests]
    answers: dict[int, Answered] = {}
    received = [bytearray() for _ in requests]
    with selectors.DefaultSelector() as selector:
        for number, connection in enumerate(connections):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            selector.register(connection, selectors.EVENT_READ, number)
        sent = []
        for connection, request in zip(connections, requests, strict=True):
            sent.append(time.perf_counter())
            connection.sendall(request)
        until = time.perf_counter() + TIMEOUT_S
        while len(answers) < len(requests):
            ready = selector.select(until - time.perf_counter())
            now = time.perf_counter()
            if not ready:
                raise TimeoutError(f"{len(requests) - len(answers)} requests were not answered in {TIMEOUT_S:g} s")
            for key, _ in ready:
                number = key.data
                received[number] += connections[number].recv(65536)
                if complete(received[number]):
                    selector.unregister(connections[number])
                    answers[number] = parse(now - sent[number], bytes(received[number]))
    for connection in connections:
        connection.close()
    return [answers[number] for number in range(len(requests))]


def parse(seconds: float, answer: bytes) -> Answered:
    head, _, body = answer.partition(b"\r\n\r\n")
    return Answered(seconds, int(head.split(b" ", 2)[1]), json.loads(body))
