"""Fits the presets of the emulated engine to measured times.

    python -m common.engine.emulated_fit perf_model.csv > common/engine/emulated_presets.json

The table is that of splitwise-sim (Mutinifni/splitwise-sim, `data/perf_model.csv`, MIT licence; Patel et al.,
"Splitwise: Efficient generative LLM inference using phase splitting", ISCA 2024): `prompt_time` and `token_time` in
milliseconds by model, hardware, tensor-parallel size, prompt size, batch size and output tokens. How well the
coefficients fit is told on stderr. The transfer's are no fit: they are the links of the machines in that paper.
"""

from __future__ import annotations

import csv
import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Rows = list[dict[str, str]]

LATENCY_S = 50e-6
BYTES_PER_S = {"a100": 25e9, "h100": 50e9}  # InfiniBand of 200 and 400 Gbit/s
DIGITS = 4


def fit(features: Floats, seconds: Floats) -> tuple[Floats, float]:
    """Coefficients of the least squares of the relative errors, none below 0, and the median relative error.

    A coefficient that comes out negative is held at 0 and the others are fitted again: with three of them that is
    the exact answer but in contrived cases.
    """
    weighted = features / seconds[:, None]
    used = list(range(features.shape[1]))
    while True:
        found = np.linalg.lstsq(weighted[:, used], np.ones(len(seconds)), rcond=None)[0]
        if (found >= 0).all():
            break
        used.pop(int(found.argmin()))
    coefficients = np.zeros(features.shape[1])
    coefficients[used] = found
    return coefficients, float(np.median(np.abs(weighted @ coefficients - 1)))


def fit_prefill(rows: Rows) -> tuple[Floats, float]:
    """Of 1, tokens and tokens², from prompts alone: batches of them show little but a change of kernels."""
    by_size: dict[float, list[float]] = defaultdict(list)
    for row in rows:
        if row["batch_size"] == "1":
            by_size[float(row["prompt_size"])].append(float(row["prompt_time"]) / 1e3)
    prompt = np.array(sorted(by_size))  # one row a size: most of the table is of 512 tokens
    features = np.stack([np.ones(len(prompt)), prompt, prompt**2], axis=1)
    return fit(features, np.array([np.mean(by_size[size]) for size in prompt.tolist()]))


def fit_decode(rows: Rows) -> tuple[Floats, float]:
    """Of 1, sequences, and the tokens they hold halfway through the output."""
    prompt, batch, output = (column(rows, name) for name in ("prompt_size", "batch_size", "token_size"))
    features = np.stack([np.ones(len(rows)), batch, batch * (prompt + output / 2)], axis=1)
    return fit(features, column(rows, "token_time") / 1e3)


def column(rows: Rows, name: str) -> Floats:
    return np.array([float(row[name]) for row in rows])


def main(table: str) -> None:
    """Print the presets as JSON."""
    groups: dict[str, Rows] = defaultdict(list)
    with Path(table).open(newline="") as file:
        for row in csv.DictReader(file):
            groups[f"{row['model']}-{row['hardware']}-tp{row['tensor_parallel']}"].append(row)
    presets = {}
    for name, rows in sorted(groups.items()):
        prefill, prefill_error = fit_prefill(rows)
        decode, decode_error = fit_decode(rows)
        print(f"{name}: median error prefill {prefill_error:.1%}, decode {decode_error:.1%}", file=sys.stderr)
        presets[name] = {
            "prefill": named(("base_s", "per_token_s", "per_token_squared_s"), prefill),
            "decode": named(("base_s", "per_sequence_s", "per_kv_token_s"), decode),
            "transfer": {
                "latency_s": LATENCY_S,
                "bytes_per_s": next(speed for gpu, speed in BYTES_PER_S.items() if gpu in name),
            },
        }
    print(json.dumps(presets, indent=2))


def named(names: tuple[str, ...], values: Floats) -> dict[str, float]:
    return {name: float(f"{value:.{DIGITS}g}") for name, value in zip(names, values, strict=True)}


if __name__ == "__main__":
    main(sys.argv[1])
