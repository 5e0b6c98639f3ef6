"""A client of OpenAI's streamed completions that notes when every token came; the same for whatever is measured.

It reads HTTP/1.1 by itself: an event costs it some 20 µs, so that it can share a machine with what it measures.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

import uvloop

Body = dict[str, Any]


@dataclass
class Stream:
    """One answer; times in seconds of `time.perf_counter`."""

    sent: float
    events: list[float] = field(default_factory=list)  # when each event with text came
    tokens: int = 0  # as the server counts them

    @property
    def ttft_s(self) -> float:
        return self.events[0] - self.sent

    @property
    def tpot_s(self) -> float:
        """Seconds a token, after the first."""
        return (self.events[-1] - self.events[0]) / (self.tokens - 1)

    @property
    def gaps_s(self) -> list[float]:
        """Seconds between events: ITL, where an event is a token."""
        return [later - earlier for earlier, later in pairwise(self.events)]


def completion(model: str, prompt: list[int], tokens: int) -> Body:
    """The body of a greedy completion of exactly `tokens` tokens."""
    options = {"max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    return {"model": model, "prompt": prompt, **options, "stream_options": {"include_usage": True}}


def random_prompt(rng: random.Random, tokens: int, vocabulary: int = 32000) -> list[int]:
    return [rng.randrange(3, vocabulary) for _ in range(tokens)]


async def ask(url: str, body: Body) -> Stream:
    """One request on a connection of its own. Raises `ValueError` for an answer that is not a whole stream."""
    where = urlsplit(url)
    encoded = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Type: application/json\r\n"
    stream = Stream(time.perf_counter())
    reader, writer = await asyncio.open_connection(where.hostname, where.port)
    try:
        writer.write(f"{head}Content-Length: {len(encoded)}\r\n\r\n".encode() + encoded)
        async for line in lines(reader):
            note(stream, line)
    finally:
        writer.close()
    if stream.tokens != body["max_tokens"]:
        raise ValueError(f"the answer has {stream.tokens} tokens, not {body['max_tokens']}")
    return stream


def note(stream: Stream, line: bytes) -> None:
    if not line.startswith(b"data: {"):
        return
    now, event = time.perf_counter(), json.loads(line[6:])
    if "error" in event:
        raise ValueError(str(event["error"]))
    if any(choice["text"] for choice in event["choices"]):
        stream.events.append(now)
    if usage := event.get("usage"):
        stream.tokens = usage["completion_tokens"]


async def lines(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The lines of an answer's body, which comes in chunks."""
    head = await reader.readuntil(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200") or b"chunked" not in head.lower():
        raise ValueError((head + await reader.read(500)).decode(errors="replace"))
    rest = b""
    while size := int((await reader.readline()).split(b";")[0], 16):
        *whole, rest = (rest + (await reader.readexactly(size + 2))[:-2]).split(b"\n")
        for line in whole:
            yield line


async def closed_loop(url: str, make_body: Callable[[], Body], clients: int, requests: int) -> list[Stream]:
    """So many clients, each with `requests` requests one after the other."""

    async def client() -> list[Stream]:
        return [await ask(url, make_body()) for _ in range(requests)]

    return [stream for streams in await asyncio.gather(*(client() for _ in range(clients))) for stream in streams]


def run(main: Any) -> Any:
    """Run a coroutine in an event loop of its own."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)


def quantile_ms(seconds: Iterable[float], share: float = 0.5) -> float:
    ordered = sorted(seconds)
    if share == 0.5:
        return statistics.median(ordered) * 1e3
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] * 1e3
