"""A small HTTP load generator: so many connections, each with one request in flight, for so many seconds.

It speaks HTTP/1.1 over asyncio's protocols, without a client library: one answer costs it some 50 µs, so that it can
share a machine with what it measures.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import uvloop


@dataclass
class Load:
    """What a run brought; times in seconds."""

    seconds: float
    latencies: list[float] = field(default_factory=list)
    first_bytes: list[float] = field(default_factory=list)

    @property
    def per_second(self) -> float:
        return len(self.latencies) / self.seconds

    @property
    def p50_ms(self) -> float:
        return statistics.median(self.latencies) * 1e3

    @property
    def p99_ms(self) -> float:
        return sorted(self.latencies)[int(len(self.latencies) * 0.99)] * 1e3


class Connection(asyncio.Protocol):
    """One request after the other, until told to stop. An answer that is not 200 ends the run."""

    def __init__(self, request: bytes, load: Load, counts_from: float, until: float) -> None:
        self.request, self.load, self.counts_from, self.until = request, load, counts_from, until
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.received = bytearray()
        self.sent_at = self.first_at = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.ask()

    def ask(self) -> None:
        self.received.clear()
        self.first_at = 0.0
        self.sent_at = time.perf_counter()
        self.transport.write(self.request)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        self.first_at = self.first_at or now
        self.received += data
        if not complete(self.received):
            return
        if not self.received.startswith(b"HTTP/1.1 200"):
            self.fail(ValueError(bytes(self.received[:500]).decode(errors="replace")))
        elif now >= self.until:
            self.finish()
        else:
            if self.sent_at >= self.counts_from:
                self.load.latencies.append(now - self.sent_at)
                self.load.first_bytes.append(self.first_at - self.sent_at)
            self.ask()

    def connection_lost(self, error: Exception | None) -> None:
        self.fail(error or ConnectionError("the server closed the connection"))

    def fail(self, error: Exception) -> None:
        if not self.done.done():
            self.done.set_exception(error)
        self.transport.close()

    def finish(self) -> None:
        self.done.set_result(None)
        self.transport.close()


def complete(received: bytearray) -> bool:
    """Whether a whole answer is here: a stream's last chunk, or as many bytes as the head says."""
    if received.endswith(b"0\r\n\r\n"):
        return True
    head_end = received.find(b"\r\n\r\n")
    if head_end < 0:
        return False
    head = bytes(received[:head_end]).lower()
    if (at := head.find(b"content-length:")) < 0:
        return False
    length = int(head[at + 15 :].split(b"\r\n", 1)[0])
    return len(received) >= head_end + 4 + length


def chat_request(url: str, model: str, tokens: int, stream: bool) -> bytes:
    """One chat completion of exactly `tokens` tokens, as bytes."""
    where = urlsplit(url)
    message = {"role": "user", "content": "What is 123 + 456?"}
    body = {"model": model, "messages": [message], "max_tokens": tokens, "stream": stream, "ignore_eos": True}
    encoded = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(encoded)}\r\n\r\n".encode() + encoded


async def drive(url: str, request: bytes, connections: int, seconds: float, warm_up_s: float = 0.5) -> Load:
    """Load `url` with `request`. Raises `ValueError` for an answer that is not 200."""
    where = urlsplit(url)
    load = Load(seconds)
    counts_from = time.perf_counter() + warm_up_s
    loop = asyncio.get_running_loop()

    def connect() -> Connection:
        return Connection(request, load, counts_from, counts_from + seconds)

    pairs = [await loop.create_connection(connect, where.hostname, where.port) for _ in range(connections)]
    await asyncio.gather(*(connection.done for _, connection in pairs))
    return load


def run(url: str, request: bytes, connections: int, seconds: float) -> Load:
    """`drive` in an event loop of its own."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(drive(url, request, connections, seconds))
