"""End to end beside vLLM, prefill and decode apart and together, on the same cores and by the same client.

    make bench BENCH=vllm_compare ARGS="--model FOLDER --peer 'vLLM PD=http://127.0.0.1:8100=COMMAND' --peer …"

One system runs at a time. Ours is started here: two workers of one thread each, and a unified one of two. A peer is
a command that stays in the foreground and answers under its URL: for vLLM `benchmarks/vllm.sh pd 8100 FOLDER` and
`benchmarks/vllm.sh unified 8100 FOLDER`, with the `bin` folder of vLLM's environment in front of PATH. Prompts are
token ids, answers greedy and of fixed length, and no prompt comes twice. The best of the rounds counts for each.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from processes import first_model, mesh, peer
from streams import Body, closed_loop, completion, quantile_ms, random_prompt, run

OURS = {
    "pdmesh PD": ["--cpu-threads", "1"],
    "pdmesh PD, NIXL": ["--cpu-threads", "1", "--disaggregation-transfer-backend", "nixl"],
    "pdmesh unified": ["--unified", "1", "--cpu-threads", "2"],
}


@dataclass(frozen=True)
class Row:
    """What one system did with so many clients."""

    clients: int
    ttft_ms: float
    tpot_ms: float
    tokens_per_s: float


def measure(url: str, arguments: argparse.Namespace) -> list[Row]:
    model, rng = first_model(url), random.Random(arguments.seed)

    def make_body() -> Body:
        return completion(model, random_prompt(rng, arguments.input), arguments.output)

    run(closed_loop(url, make_body, 2, 1))  # warms up
    return [best_round(url, make_body, clients, arguments) for clients in arguments.clients]


def best_round(url: str, make_body: Callable[[], Body], clients: int, arguments: argparse.Namespace) -> Row:
    rows = []
    for _ in range(arguments.rounds):
        began = time.perf_counter()
        streams = run(closed_loop(url, make_body, clients, arguments.requests))
        tokens_per_s = sum(stream.tokens for stream in streams) / (time.perf_counter() - began)
        ttft_ms = quantile_ms(stream.ttft_s for stream in streams)
        rows.append(Row(clients, ttft_ms, quantile_ms(stream.tpot_s for stream in streams), tokens_per_s))
    return max(rows, key=lambda row: row.tokens_per_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint folder, with a tokenizer")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=URL=COMMAND")
    parser.add_argument("--only", action="append", default=[], help="systems of ours to run (default: all)")
    parser.add_argument("--input", type=int, default=256, help="tokens of a prompt")
    parser.add_argument("--output", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--requests", type=int, default=4, help="requests of one client in a round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    arguments, flags = parser.parse_known_args()
    systems: dict[str, contextlib.AbstractContextManager[str]] = {}
    common = ["--model-path", arguments.model, "--dtype", arguments.dtype, *flags]
    for name, own in OURS.items():
        if not arguments.only or name in arguments.only:
            systems[name] = mesh(*common, *own)
    for text in arguments.peer:
        name, url, command = text.split("=", 2)
        systems[name] = peer(command, url)
    print(f"load {os.getloadavg()[0]:.2f}, seed {arguments.seed}, {arguments.input} tokens in, {arguments.output} out")
    results = {}
    for name, system in systems.items():
        with system as url:
            results[name] = measure(url, arguments)
        print(f"  {name}: " + "; ".join(describe(row) for row in results[name]), flush=True)
    show(results)


def describe(row: Row) -> str:
    return f"{row.clients} clients {row.tokens_per_s:.1f} tokens/s, TTFT {row.ttft_ms:.0f} ms"


def show(results: dict[str, list[Row]]) -> None:
    """A table of all systems; the ratios are the first's, ours, to each."""
    ours = next(iter(results.values()))
    print("\n| | clients | TTFT p50 | TPOT p50 | output tokens/s | of ours: tokens/s | TTFT |")
    print("|---|---|---|---|---|---|---|")
    for name, rows in results.items():
        for row, mine in zip(rows, ours, strict=True):
            ratios = f"{mine.tokens_per_s / row.tokens_per_s:.2f} x | {mine.ttft_ms / row.ttft_ms:.2f} x"
            measured = f"{row.ttft_ms:.0f} ms | {row.tpot_ms:.1f} ms | {row.tokens_per_s:.1f}"
            print(f"| {name} | {row.clients} | {measured} | {ratios} |")


if __name__ == "__main__":
    main()
