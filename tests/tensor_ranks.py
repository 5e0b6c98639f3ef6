"""A rank of a tensor-parallel model, as a program: `python -m tests.tensor_ranks FOLDER RANK SIZE`.

It reads `jobs.json` in the folder, computes each with the other ranks, and writes its logits to `rank-R.safetensors`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import save_file

from common.dist.dispatch.modes import LowLatencyDispatch, NormalDispatch
from common.dist.dispatch.torch import TorchBuffer
from common.dist.group import Group, join_group, leave_group
from common.dist.layout import Layout, make_parallel
from common.dist.parallel import Parallel
from common.engine.config import EngineConfig
from common.engine.runner import Chunk, ModelRunner
from common.kvcache.pool import KvPool

PAGES, PAGE, CHUNK = 24, 8, 19


class Job(msgspec.Struct):
    """A checkpoint, a prompt, and tokens that follow it one at a time.

    With `dispatch` each rank has a prompt of its own, `prompts[rank]`, and tokens that follow it.
    """

    name: str
    model_path: str
    prompt_ids: list[int]
    token_ids: list[int]
    own_experts: bool = False
    settings: dict[str, Any] = {}
    dies: int | None = None  # the rank that ends without a word instead
    dispatch: str = ""
    num_experts: int = 0
    prompts: list[list[int]] = []
    following: list[list[int]] = []


def load(job: Job, parallel: Parallel) -> ModelRunner:
    config = EngineConfig(model_path=job.model_path, page_size=PAGE, device="cpu", cpu_threads=1, **job.settings)
    runner = ModelRunner.load(config, parallel)
    runner.attach_pool(KvPool(runner.layout, PAGES))
    return runner


def logits(runner: ModelRunner, job: Job) -> torch.Tensor:
    """After the prompt, computed in chunks, and after each token."""
    pages, prompt = list(range(PAGES))[::-1], job.prompt_ids
    rows = []
    for start in range(0, len(prompt), CHUNK):
        chunk = prompt[start : start + CHUNK]
        rows.append(runner.run([Chunk(start, chunk, pages, start + len(chunk) == len(prompt))]))
    for index, token in enumerate(job.token_ids):
        rows.append(runner.run([Chunk(len(prompt) + index, [token], pages, True)]))
    return torch.cat(rows)


def data_parallel(group: Group, job: Job) -> torch.Tensor:
    """Logits of this rank's own prompt and tokens; it keeps the others company when it has none left.

    Low-latency buffers are smaller than a chunk, so that prefill takes several rounds.
    """
    buffer = TorchBuffer(group, job.num_experts, max_tokens=CHUNK // 2)
    dispatch = NormalDispatch(buffer) if job.dispatch == "normal" else LowLatencyDispatch(buffer)
    if isinstance(dispatch, LowLatencyDispatch):
        dispatch.begin_step(CHUNK)
    layout = Layout(group.size, group.size, group.size, moe_dense_tp_size=1, dp_lm_head=True)
    runner = load(job, make_parallel(layout, group, dispatch))
    steps = max(-(-len(prompt) // CHUNK) + len(ids) for prompt, ids in zip(job.prompts, job.following, strict=True))
    prompt, ids = job.prompts[group.rank], job.following[group.rank]
    known, pages, computed, rows = prompt + ids, list(range(PAGES))[::-1], 0, []
    for _ in range(steps):
        take = min(CHUNK, len(prompt) - computed) if computed < len(prompt) else 1
        chunk = known[computed : computed + take]
        mine = [Chunk(computed, chunk, pages, computed + take >= len(prompt))] if chunk else []
        rows.append(runner.run(mine))
        computed += len(chunk)
    return torch.cat(rows)


def exchanges(group: Group) -> dict[str, torch.Tensor]:
    """What a group makes of each rank's number, and of nothing."""
    mine = torch.full((3, 2), group.rank + 1.0)
    return {
        "sum": group.all_reduce(mine.clone()),
        "gathered": group.all_gather(mine),
        "empty sum": group.all_reduce(torch.empty(0, 4)),
        "empty gathered": group.all_gather(torch.empty(0, 4)),
    }


def main(folder: Path, rank: int, size: int) -> None:
    group = join_group("gloo", f"file://{folder / 'meeting'}", rank, size, timeout_s=60)
    results = exchanges(group)
    for job in msgspec.convert(json.loads((folder / "jobs.json").read_text()), list[Job]):
        if job.dispatch:
            results[job.name] = data_parallel(group, job)
            continue
        if job.dies == group.rank:
            os._exit(9)
        layout = Layout(group.size, ep_size=group.size if job.own_experts else 1)
        runner = load(job, make_parallel(layout, group))
        results[job.name] = logits(runner, job)
        results[f"{job.name} kv heads"] = torch.tensor(runner.layout.num_kv_heads)
    leave_group()
    save_file(results, folder / f"rank-{rank}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
