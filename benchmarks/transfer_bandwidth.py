"""How fast bytes go from one process into another's pool: every backend beside its floor, in the same run.

64 MiB in one piece, and 4,096 pages of 16 KiB from a random order into another. The floor of `local` is a plain
memcpy of the same shape inside one process; of `nixl` and `mooncake` their bare engine, called directly with the same
addresses (`transfer_ends.py`). Ours and the floor take turns; the best of all rounds counts. Bytes are verified.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
from transfer_ends import BARE, Ours, Target, quiet_engines, seconds_of, usable

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
    parser.add_argument("--threads", type=int, default=1, help="workers of our sender pool")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    quiet_engines()
    if options.only:  # engines share libraries and threads badly: each has a process of its own
        print("@" + json.dumps(measure(options.only, options.rounds, options.threads)), flush=True)
        os._exit(0)
    print(f"load {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores, best of {options.rounds} rounds", flush=True)
    rows = []
    for name, reason in usable().items():
        if reason:
            print(f"{name}: not measured: {reason}")
            continue
        command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--only", name]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=300, check=True)
        rows += [json.loads(line[1:]) for line in done.stdout.splitlines() if line.startswith("@")]
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
