"""A hand-over of 8,192 tokens of a Llama-8B-shaped cache (1 GiB) from prefill's pool into decode's, by every backend.

Four chunks of 2,048 tokens are submitted one after the other, as chunked prefill does, and a notice follows the last:
the time is from the first submission until decode has the notice. Pages come from the workers' own allocators: fresh
ones give long runs; `scattered` are those of a pool of which every other page is in use. The bare engine moves the same
descriptors into the same pools without a notice, by turns with ours. CPU is that of both processes, above the bare
engine's: what we add.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import transfer_ends
from transfer_ends import BARE, Ours, Target

from common.kvcache.allocator import PageAllocator
from common.kvcache.layout import KvLayout
from common.transfer.base import Pieces
from common.transfer.runs import coalesce

LAYOUT = KvLayout("bfloat16", num_layers=32, num_kv_heads=8, head_dim=128, page_size=16)
TOKENS, CHUNKS = 8192, 4
GIB = 1 << 30


def chunks_of(source: list[int], target: list[int]) -> list[Pieces]:
    """A prompt's pages as they leave, chunk by chunk."""
    size = len(source) // CHUNKS
    cuts = range(0, len(source), size)
    return [coalesce(source[cut : cut + size], target[cut : cut + size], LAYOUT.page_bytes) for cut in cuts]


def pages(kind: str, pool_pages: int, count: int) -> list[int]:
    """Page numbers that an allocator gives."""
    allocator = PageAllocator(pool_pages)
    if kind == "scattered":
        allocator.free(allocator.allocate(pool_pages)[::2])
    return list(allocator.allocate(count))


def measure(backend: str, rounds: int, tokens: int, threads: int) -> dict[str, object]:
    """One backend, here and in a target process."""
    count = LAYOUT.pages_for(tokens)
    pool_pages = 2 * count
    target = Target(backend, pool_pages * LAYOUT.page_bytes)
    try:
        ours = Ours(backend, pool_pages * LAYOUT.page_bytes, threads)
        ours.pool[:] = 1
        ours.connect(target.descriptor)
        bare = BARE[backend](ours, target.reach)

        def hand_over(chunks: list[Pieces]) -> float:
            target.tell("notice")
            began = time.monotonic()
            ours.write(*chunks)
            ours.endpoint.notify(ours.peer, b"done")
            return float(target.answer()) - began

        def floor(chunks: list[Pieces]) -> float:
            began = time.monotonic()
            bare.write(*chunks)
            return time.monotonic() - began

        def cpu_of(call: Callable[[list[Pieces]], float], chunks: list[Pieces]) -> tuple[float, float]:
            """Seconds, and CPU seconds of both processes."""
            before = time.process_time() + target.ask("cpu")
            seconds = call(chunks)
            return seconds, time.process_time() + target.ask("cpu") - before

        row: dict[str, object] = {"backend": backend, "bytes": count * LAYOUT.page_bytes}
        for kind in ("fresh", "scattered"):
            chunks = chunks_of(pages(kind, pool_pages, count), pages(kind, pool_pages, count))
            hand_over(chunks)
            target.ask("bare", True)
            floor(chunks)
            taken: dict[str, list[tuple[float, float]]] = {"ours": [], "floor": []}
            for _ in range(rounds):
                target.ask("bare", False)
                taken["ours"].append(cpu_of(hand_over, chunks))
                target.ask("bare", True)
                taken["floor"].append(cpu_of(floor, chunks))
            target.ask("bare", False)
            row[kind] = {
                "descriptors": sum(len(chunk) for chunk in chunks),
                **{side: (min(s for s, _ in all_), min(c for _, c in all_)) for side, all_ in taken.items()},
                "cpu_median": statistics.median(c for _, c in taken["ours"])
                / statistics.median(c for _, c in taken["floor"]),
            }
        bare.close()
        ours.endpoint.close()
        return row
    finally:
        target.close()


def table(rows: list[dict[str, object]]) -> str:
    lines = [
        "| | pages | pieces | ours | GiB/s | bare engine | ratio | CPU ours | CPU bare | our share: best, median |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        for kind in ("fresh", "scattered"):
            found: dict[str, object] = row[kind]  # type: ignore[assignment]
            (seconds, cpu), (floor, floor_cpu) = found["ours"], found["floor"]  # type: ignore[misc]
            shares = 1 - floor_cpu / cpu, 1 - 1 / float(found["cpu_median"])  # type: ignore[arg-type]
            lines.append(
                f"| {row['backend']} | {kind} | {found['descriptors']} | {seconds * 1e3:.0f} ms "
                f"| {int(row['bytes']) / seconds / GIB:.2f} | {floor * 1e3:.0f} ms | {floor / seconds:.2f} "  # type: ignore[call-overload]
                f"| {cpu * 1e3:.0f} ms | {floor_cpu * 1e3:.0f} ms | **{shares[0]:.1%}**, {shares[1]:.1%} |"
            )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8, help="turns of each side")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    return transfer_ends.main(
        parser, lambda name, options: measure(name, options.rounds, options.tokens, options.threads), table
    )


if __name__ == "__main__":
    sys.exit(main())
