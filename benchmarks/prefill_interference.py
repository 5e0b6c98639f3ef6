"""What long prompts do to those who are reading: short chats decode while prompts of 4,000 tokens keep arriving.

    make bench BENCH=prefill_interference

The same requests at the same times, drawn from one seed, go to a prefill and a decode worker with one thread each,
and to unified workers with two threads, one after the other on the same cores. A unified worker's chunk sets how
long a step beside a prompt takes: its default is shown, and others beside it. A chat counts for goodput when at
least 95 % of its tokens came within the SLO after the one before.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import time
from dataclasses import dataclass

from checkpoint import llama
from processes import first_model, mesh
from streams import Body, Stream, ask, completion, quantile_ms, random_prompt, run

PD = "PD"
WITHIN = 0.95  # share of a chat's tokens


@dataclass(frozen=True)
class Request:
    """When it is sent, in seconds after the start, and what."""

    at_s: float
    chat: bool
    body: Body


def make_requests(model: str, arguments: argparse.Namespace) -> list[Request]:
    """Chats come at random (Poisson), long prompts at even intervals."""
    rng = random.Random(arguments.seed)
    requests, at_s = [], 0.0
    while (at_s := at_s + rng.expovariate(arguments.chats_per_s)) < arguments.seconds:
        requests.append(Request(at_s, True, completion(model, random_prompt(rng, 64), arguments.chat_tokens)))
    for number in range(int(arguments.seconds / arguments.long_every)):
        prompt = random_prompt(rng, arguments.long)
        requests.append(Request((number + 0.5) * arguments.long_every, False, completion(model, prompt, 4)))
    return requests


async def play(url: str, requests: list[Request]) -> tuple[list[Stream], list[Stream], float]:
    """Send each request at its time. Returns the chats, the long ones, and how long it took, in seconds."""
    began = time.perf_counter()

    async def one(request: Request) -> Stream:
        await asyncio.sleep(began + request.at_s - time.perf_counter())
        return await ask(url, request.body)

    streams = await asyncio.gather(*map(one, requests))
    took_s = time.perf_counter() - began
    chats = [stream for stream, request in zip(streams, requests, strict=True) if request.chat]
    return chats, [stream for stream, request in zip(streams, requests, strict=True) if not request.chat], took_s


@dataclass(frozen=True)
class Row:
    """What one system did; times in milliseconds, goodput in chats per second."""

    itl_p50: float
    itl_p99: float
    itl_worst: float
    chat_ttft_p50: float
    long_ttft_p50: float
    goodput: float
    good: float


def measure(url: str, arguments: argparse.Namespace) -> Row:
    model = first_model(url)
    warm = [Request(0.0, False, completion(model, random_prompt(random.Random(0), 600), 4)) for _ in range(2)]
    run(play(url, warm))
    chats, longs, took_s = run(play(url, make_requests(model, arguments)))
    gaps = [gap for chat in chats for gap in chat.gaps_s]
    good = [quantile_ms(chat.gaps_s, WITHIN) <= arguments.slo_ms for chat in chats]
    return Row(
        quantile_ms(gaps),
        quantile_ms(gaps, 0.99),
        max(gaps) * 1e3,
        quantile_ms(chat.ttft_s for chat in chats),
        quantile_ms(stream.ttft_s for stream in longs),
        sum(good) / took_s,
        sum(good) / len(good),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint folder (default: one of 125 million parameters, made here)")
    parser.add_argument("--seconds", type=float, default=30.0, help="how long requests keep coming")
    parser.add_argument("--chats-per-s", type=float, default=2.0)
    parser.add_argument("--chat-tokens", type=int, default=96, help="tokens of a chat's answer")
    parser.add_argument("--long", type=int, default=4000, help="tokens of a long prompt")
    parser.add_argument("--long-every", type=float, default=5.0, help="seconds between long prompts")
    parser.add_argument("--chunks", nargs="*", default=["", "2048", "512", "128"], help="chunks of a unified worker")
    parser.add_argument("--slo-ms", type=float, default=50.0)
    parser.add_argument("--seed", type=int, default=1)
    arguments, flags = parser.parse_known_args()
    common = ["--model-path", arguments.model or str(llama()), "--max-total-tokens", "65536", *flags]
    systems = {PD: ["--cpu-threads", "1"]}
    for chunk in arguments.chunks:
        own = ["--chunked-prefill-size", chunk] if chunk else []
        systems[f"unified, chunk {chunk or 'by default'}"] = ["--unified", "1", "--cpu-threads", "2", *own]
    print(
        f"load {os.getloadavg()[0]:.2f}, seed {arguments.seed}, {arguments.seconds:g} s: {arguments.chats_per_s:g} "
        f"chats/s of 64 + {arguments.chat_tokens} tokens, a prompt of {arguments.long} every {arguments.long_every:g} s"
    )
    rows = {}
    for name, own in systems.items():
        with mesh(*common, *own) as url:
            rows[name] = measure(url, arguments)
        print(f"  {name}: ITL p99 {rows[name].itl_p99:.0f} ms", flush=True)
    show(rows, arguments)


def show(rows: dict[str, Row], arguments: argparse.Namespace) -> None:
    slo = f"{WITHIN:.0%} within {arguments.slo_ms:g} ms"
    print(f"\n| | ITL p50 | ITL p99 | to PD's | worst | TTFT p50, chats | TTFT p50, long | goodput ({slo}) |")
    print("|---|---|---|---|---|---|---|---|")
    for name, row in rows.items():
        itl = f"{row.itl_p50:.1f} ms | {row.itl_p99:.1f} ms | {row.itl_p99 / rows[PD].itl_p99:.1f} x"
        itl += f" | {row.itl_worst:.0f} ms"
        ttft = f"{row.chat_ttft_p50:.0f} ms | {row.long_ttft_p50:.0f} ms"
        print(f"| {name} | {itl} | {ttft} | {row.goodput:.2f} chats/s, {row.good:.0%} |")


if __name__ == "__main__":
    main()
