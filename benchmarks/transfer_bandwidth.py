"""How fast bytes go from one process into another's pool: every backend beside its floor, in the same run.

64 MiB in one piece, and 4,096 pages of 16 KiB from a random order into another. The floor of `local` is a plain
memcpy of the same shape inside one process; of `nixl` and `mooncake` their bare engine, called directly with the same
addresses (`transfer_ends.py`). Ours and the floor take turns; the best of all rounds counts. Bytes are verified.
"""

from __future__ import annotations

import argparse
import statistics
import sys

import numpy as np
import transfer_ends
from transfer_ends import BARE, Ours, Target, seconds_of

from common.transfer.base import Pieces
from common.transfer.runs import coalesce

POOL_BYTES, PAGE_BYTES = 64 << 20, 16 << 10
PAGES = POOL_BYTES // PAGE_BYTES
BAR = {"local": 0.80, "nixl": 0.95, "mooncake": 0.95}
GIB = 1 << 30


def measure(backend: str, rounds: int, threads: int) -> dict[str, object]:
    """One backend, here and in a target process."""
    target = Target(backend, POOL_BYTES)
    try:
        ours = Ours(backend, POOL_BYTES, threads)
        ours.pool[:] = np.random.default_rng(7).integers(0, 256, POOL_BYTES, dtype=np.uint8)
        ours.connect(target.descriptor)
        bare = BARE[backend](ours, target.reach)
        source, dest = (np.random.default_rng(seed).permutation(PAGES).tolist() for seed in (0, 1))
        shapes: dict[str, Pieces] = {
            "one": coalesce(range(PAGES), range(PAGES), PAGE_BYTES),
            "pages": coalesce(source, dest, PAGE_BYTES),
        }
        row: dict[str, object] = {"backend": backend}
        wanted = int(ours.pool.view(np.uint64).sum())
        for name, pieces in shapes.items():
            times: dict[str, list[float]] = {"ours": [], "floor": []}
            ours.write(pieces)
            if target.ask("sum") != wanted:
                raise SystemExit(f"{backend}: other bytes have arrived")
            target.ask("bare", True)
            bare.write(pieces)
            for _ in range(rounds):
                target.ask("bare", False)
                times["ours"] += [seconds_of(lambda pieces=pieces: ours.write(pieces)) for _ in range(3)]
                target.ask("bare", True)
                times["floor"] += [seconds_of(lambda pieces=pieces: bare.write(pieces)) for _ in range(3)]
            target.ask("bare", False)
            row[name] = {
                side: (POOL_BYTES / min(taken) / GIB, POOL_BYTES / statistics.median(taken) / GIB)
                for side, taken in times.items()
            }
        bare.close()
        ours.endpoint.close()
        return row
    finally:
        target.close()


def table(rows: list[dict[str, dict[str, tuple[float, float]]]]) -> str:
    lines = [
        "| | one piece, GiB/s (floor) | ratio | median | 4,096 pages, GiB/s (floor) | ratio | median | bar |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [str(row["backend"])]
        for shape in ("one", "pages"):
            (best, median), (floor, floor_median) = row[shape]["ours"], row[shape]["floor"]
            cells += [f"{best:.2f} ({floor:.2f})", f"**{best / floor:.2f}**", f"{median / floor_median:.2f}"]
        lines.append("| " + " | ".join([*cells, f"{BAR[cells[0]]:.2f}"]) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="turns of each side")
    return transfer_ends.main(parser, lambda name, options: measure(name, options.rounds, options.threads), table)


if __name__ == "__main__":
    sys.exit(main())
