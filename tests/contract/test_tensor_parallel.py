"""Two ranks that share a model say what one says: every family, with real processes over gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedConfig, Qwen3Config

from common.dist.group import ALONE, Alone, join_group, leave_group
from common.dist.parallel import NOT_PARALLEL, Parallel, Sharing, share_kv_heads, share_padded
from common.errors.base import MeshError, Reason
from common.models.config import read_config
from tests.tensor_ranks import Job, load, logits
from tests.unit.test_models import (
    GROUPS,
    SMALL,
    deepseek_v2,
    deepseek_v3,
    expected,
    llama,
    make_model,
    mixtral,
    prompt_of,
    qwen3_moe,
)

pytestmark = [pytest.mark.contract, pytest.mark.flaky(reruns=0)]

RANKS, PROMPT, TOKENS = 2, 45, 12
MODELS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": llama,
    "llama, odd vocabulary, biases": lambda: llama(vocab_size=323, attention_bias=True, mlp_bias=True),
    "llama, one key/value head, tied": lambda: llama(num_key_value_heads=1, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**SMALL, head_dim=32),
    "qwen3-moe": qwen3_moe,
    "mixtral": mixtral,
    "deepseek-v2": lambda: deepseek_v2(q_lora_rank=None, topk_method="group_limited_greedy", **GROUPS),
    "deepseek-v3": deepseek_v3,
}
OWN_EXPERTS = ("mixtral", "deepseek-v3")


def start_ranks(folder: Path, jobs: list[Job]) -> list[tuple[int, str]]:
    """Exit status and errors of each rank."""
    (folder / "jobs.json").write_bytes(msgspec.json.encode(jobs))
    command = [sys.executable, "-m", "tests.tensor_ranks", str(folder)]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen([*command, str(rank), str(RANKS)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(RANKS)
    ]
    try:
        errors = [rank.communicate(timeout=200)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    return [(rank.returncode, error) for rank, error in zip(ranks, errors, strict=True)]


def run_ranks(folder: Path, jobs: list[Job]) -> list[dict[str, torch.Tensor]]:
    """What each rank computed."""
    for status, error in start_ranks(folder, jobs):
        assert status == 0, error
    return [load_file(folder / f"rank-{rank}.safetensors") for rank in range(RANKS)]


def test_two_ranks_say_what_one_says(tmp_path: Path) -> None:
    jobs, wanted = [], {}
    for number, (name, make_config) in enumerate(MODELS.items()):
        folder = tmp_path / str(number)
        model = make_model(make_config(), folder)
        token_ids, logits_TV = expected(model, prompt_of(PROMPT), TOKENS + 1)
        jobs.append(Job(name, str(folder), prompt_of(PROMPT), token_ids[:-1]))
        wanted[name] = logits_TV
        if name in OWN_EXPERTS:
            owning = f"{name}, whole experts"
            jobs.append(Job(owning, str(folder), prompt_of(PROMPT), token_ids[:-1], own_experts=True))
            wanted[owning] = logits_TV
    quantized = msgspec.structs.replace(jobs[-2], name="deepseek-v3 in fp8", settings={"quantization": "fp8"})
    wanted[quantized.name] = logits(load(quantized, NOT_PARALLEL), quantized)
    jobs.append(quantized)

    results = run_ranks(tmp_path, jobs)

    for job in jobs:
        for result in results:
            torch.testing.assert_close(result[job.name], wanted[job.name], atol=1e-4, rtol=0)
        assert results[0][job.name].equal(results[1][job.name])  # or ranks would sample different tokens
    heads = {name: int(results[0][f"{name} kv heads"]) for name in MODELS}
    assert heads["llama"] == 1  # of two
    assert heads["llama, one key/value head, tied"] == 1
    assert heads["deepseek-v3"] == 1
    for result in results:
        assert result["sum"].tolist() == [[3, 3]] * 3
        assert result["gathered"].tolist() == [[1, 1, 2, 2]] * 3
        assert (result["empty sum"].shape, result["empty gathered"].shape) == ((0, 4), (0, 8))


PROMPTS, LATER = (31, 7), (3, 14)


def test_ranks_with_tokens_of_their_own(tmp_path: Path) -> None:
    """Data-parallel attention and expert parallelism: each rank's logits are those that it had got alone, while the
    other is longer at its prompt, and then idle."""
    jobs, wanted = [], {}
    for name in OWN_EXPERTS:
        folder = tmp_path / name
        model = make_model(MODELS[name](), folder)
        answers = [expected(model, prompt_of(length), later + 1) for length, later in zip(PROMPTS, LATER, strict=True)]
        for mode in ("normal", "low-latency"):
            job = Job(f"{name}, {mode}", str(folder), [], [], dispatch=mode)
            job.num_experts = read_config(folder).routed_experts
            job.prompts = [prompt_of(length) for length in PROMPTS]
            job.following = [ids[:-1] for ids, _ in answers]
            jobs.append(job)
            wanted[job.name] = [logits_TV for _, logits_TV in answers]
    for rank, result in enumerate(run_ranks(tmp_path, jobs)):
        for name, logits_of in wanted.items():
            torch.testing.assert_close(result[name], logits_of[rank], atol=1e-4, rtol=0)


def test_a_rank_that_dies_ends_the_others(tmp_path: Path) -> None:
    """At once, in the exchange that waits for it, and not when an hour has passed."""
    make_model(llama(), tmp_path / "model", varied=False)
    job = Job("", str(tmp_path / "model"), prompt_of(PROMPT), [1] * TOKENS, dies=1)
    (survivor, error), (dead, _) = start_ranks(tmp_path, [job])
    assert dead == 9
    assert survivor == 1
    assert "RuntimeError" in error


def test_a_rank_that_never_comes(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"(?i)time|wait"):
        join_group("gloo", f"file://{tmp_path / 'meeting'}", 0, 2, timeout_s=0.5)
    leave_group()


def test_what_so_many_ranks_cannot_share_is_refused(tmp_path: Path) -> None:
    make_model(deepseek_v3(), tmp_path, varied=False)
    job = Job("", str(tmp_path), prompt_of(3), [])
    for parallel, message in [
        (Parallel(attention=Sharing(Alone(0, 3))), "3 ranks cannot share 4 attention heads"),
        (Parallel(dense=Sharing(Alone(0, 5))), "5 ranks cannot share 112 feed-forward elements"),
        (Parallel(experts=Sharing(Alone(0, 3)), own_experts=True), "3 ranks cannot share 8 experts"),
    ]:
        with pytest.raises(MeshError, match=message) as caught:
            load(job, parallel)
        assert caught.value.reason == Reason.BAD_CONFIG


def test_shares() -> None:
    def kv_heads(total: int, ranks: int) -> list[tuple[int, int]]:
        parts = [share_kv_heads(total, Alone(rank, ranks)) for rank in range(ranks)]
        return [(part.start, part.stop) for part in parts]

    assert kv_heads(4, 2) == [(0, 2), (2, 4)]
    assert kv_heads(2, 4) == [(0, 1), (0, 1), (1, 2), (1, 2)]
    with pytest.raises(MeshError, match="3 ranks cannot share 2"):
        kv_heads(2, 3)
    padded = [share_padded(5, Alone(rank, 4)) for rank in range(4)]
    assert [(part.start, part.stop) for part in padded] == [(0, 2), (2, 4), (4, 5), (5, 5)]
    assert share_padded(5, ALONE) == slice(0, 5)
