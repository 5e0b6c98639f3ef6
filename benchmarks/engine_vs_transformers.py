#!/usr/bin/env python3
"""Our unified engine against `transformers.generate`: prompt and decode tokens per second, in one process.

Both run the same checkpoint with the same threads and dtype, greedily, without an end of sequence. Rounds
alternate between the two, and each figure is the best of its rounds, so that a neighbour's noise hits neither
more than the other. Decode is measured as a long generation less a short one, over the tokens between them;
that leaves out the prompt and whatever a call costs by itself, on both sides.

    python benchmarks/engine_vs_transformers.py [--model FOLDER] [--threads 2] [--dtypes float32 bfloat16]

Without `--model` a Llama of 125 million parameters with random weights is made once, under the system's
temporary folder.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.engine.config import EngineConfig
from common.engine.engine import Engine
from common.engine.messages import Sampling
from common.engine.request import Sequence
from common.engine.runner import Chunk, ModelRunner
from common.kvcache.pool import allocate_host
from common.worker.rank import build_engine

SHORT, LONG = 4, 68  # tokens of the two generations whose difference is decode
DECODE_PROMPT, PREFILL_PROMPT = 32, 512
LLAMA: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


class Transformers:
    """`generate` with its defaults: SDPA attention and a growing cache."""

    def __init__(self, folder: Path, dtype: str) -> None:
        load = transformers.AutoModelForCausalLM.from_pretrained
        self.model = load(folder, dtype=getattr(torch, dtype)).eval()
        self.model.generation_config.eos_token_id = None
        self.model.generation_config.pad_token_id = 0

    def generate_s(self, prompts: list[list[int]], tokens: int) -> float:
        """Seconds to generate `tokens` tokens after each of `prompts`, which are of one length."""
        ids = torch.tensor(prompts)
        begun = time.perf_counter()
        result = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False
        )
        elapsed = time.perf_counter() - begun
        assert result.shape[1] == ids.shape[1] + tokens
        return elapsed


class TimedRun:
    """Stands for a model runner's `run` and adds up the seconds spent there."""

    def __init__(self, run: Callable[[Seq[Chunk]], torch.Tensor]) -> None:
        self.run = run
        self.seconds = 0.0

    def __call__(self, chunks: Seq[Chunk]) -> torch.Tensor:
        begun = time.perf_counter()
        logits = self.run(chunks)
        self.seconds += time.perf_counter() - begun
        return logits


class Ours:
    """The engine as a unified worker's rank runs it, without the worker around it."""

    def __init__(self, folder: Path, dtype: str) -> None:
        config = EngineConfig(
            model_path=str(folder), dtype=dtype, device="cpu", max_total_tokens=16384, disable_radix_cache=True
        )
        self.engine: Engine = build_engine(config, allocate_host)
        runner = self.engine.runner
        assert isinstance(runner, ModelRunner)
        self.timed = TimedRun(runner.run)
        runner.run = self.timed  # type: ignore[method-assign]
        self.ids = itertools.count()

    def generate_s(self, prompts: list[list[int]], tokens: int) -> float:
        """As `Transformers.generate_s`."""
        sampling = Sampling(temperature=0.0, max_new_tokens=tokens, ignore_eos=True)
        produced = 0
        begun = time.perf_counter()
        for prompt in prompts:
            self.engine.add(Sequence(next(self.ids), prompt, sampling))
        while self.engine.has_work:
            produced += len(self.engine.step().tokens)
        elapsed = time.perf_counter() - begun
        assert produced == len(prompts) * tokens
        return elapsed

    def share_outside_model(self, prompts: list[list[int]]) -> float:
        """Scheduler, sampler and bookkeeping, as a share of a decode step."""
        whole, inside = [], []
        for tokens in (SHORT, LONG):
            self.timed.seconds = 0.0
            whole.append(self.generate_s(prompts, tokens))
            inside.append(self.timed.seconds)
        return 1 - (inside[1] - inside[0]) / (whole[1] - whole[0])


@dataclass
class Row:
    """One line of the table, in tokens per second."""

    dtype: str
    phase: str
    ours: float
    theirs: float
    outside: float | None = None

    def __str__(self) -> str:
        outside = "" if self.outside is None else f"{self.outside:.1%}"
        ratio = f"{self.ours / self.theirs:.2f} x"
        return f"{self.dtype:10} {self.phase:18} {self.ours:10.1f} {self.theirs:14.1f} {ratio:>10} {outside:>15}"


def make_prompts(batch: int, length: int, vocab_size: int) -> list[list[int]]:
    return [random.choices(range(3, vocab_size), k=length) for _ in range(batch)]


def alternate(rounds: int, *measures: Callable[[], float]) -> list[float]:
    """The best of `rounds` of each measure; the first round warms up and does not count."""
    seconds = [[measure() for measure in measures] for _ in range(rounds + 1)]
    return [min(column) for column in zip(*seconds[1:], strict=True)]


def prefill_row(dtype: str, ours: Ours, theirs: Transformers, rounds: int) -> Row:
    prompts = make_prompts(1, PREFILL_PROMPT, ours.engine.runner.vocab_size)
    best = alternate(rounds, lambda: ours.generate_s(prompts, 1), lambda: theirs.generate_s(prompts, 1))
    return Row(dtype, f"prompt of {PREFILL_PROMPT}", *(PREFILL_PROMPT / seconds for seconds in best))


def decode_row(dtype: str, batch: int, ours: Ours, theirs: Transformers, rounds: int) -> Row:
    prompts = make_prompts(batch, DECODE_PROMPT, ours.engine.runner.vocab_size)
    short_ours, short_theirs, long_ours, long_theirs = alternate(
        rounds,
        lambda: ours.generate_s(prompts, SHORT),
        lambda: theirs.generate_s(prompts, SHORT),
        lambda: ours.generate_s(prompts, LONG),
        lambda: theirs.generate_s(prompts, LONG),
    )
    tokens = batch * (LONG - SHORT)
    outside = min(ours.share_outside_model(prompts) for _ in range(rounds))
    return Row(
        dtype,
        f"decode, batch {batch}",
        tokens / (long_ours - short_ours),
        tokens / (long_theirs - short_theirs),
        outside,
    )


def make_checkpoint() -> Path:
    """A Llama of 125 million parameters; made once."""
    folder = Path(tempfile.gettempdir()) / "pdmesh-benchmark-llama-125m"
    if not (folder / "model.safetensors").exists():
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)).save_pretrained(folder)
    return folder


def describe_machine(folder: Path, threads: int) -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    load = ", ".join(f"{value:.2f}" for value in os.getloadavg())
    return (
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {name}, {os.cpu_count()} cores, load {load}, {threads} threads\n"
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}\n"
        f"checkpoint {folder}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="checkpoint folder (default: one made with random weights)")
    parser.add_argument("--threads", type=int, default=2, help="threads of either side's kernels (default: 2)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of which the best counts (default: 5)")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    options = parser.parse_args()

    random.seed(0)
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    transformers.logging.set_verbosity_error()
    folder = options.model or make_checkpoint()
    print(describe_machine(folder, options.threads))
    print(f"\n{'dtype':10} {'phase':18} {'ours tok/s':>10} {'generate tok/s':>14} {'ratio':>10} {'outside model':>15}")
    for dtype in options.dtypes:
        ours, theirs = Ours(folder, dtype), Transformers(folder, dtype)
        print(prefill_row(dtype, ours, theirs, options.rounds), flush=True)
        for batch in options.batches:
            print(decode_row(dtype, batch, ours, theirs, options.rounds), flush=True)


if __name__ == "__main__":
    main()
