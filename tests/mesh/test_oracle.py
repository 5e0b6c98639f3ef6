"""The mesh says what transformers says, token for token, over every way a page can travel."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.checkpoints import Answer, Oracle, make_checkpoint
from tests.mesh.harness import Client, Mesh, running, wait_until

pytestmark = [pytest.mark.mesh, pytest.mark.slow, pytest.mark.flaky(reruns=0)]

SEED = 20
PROMPTS, LONGEST, NEW_TOKENS = 24, 700, 64
MODES = {
    "unified": ("--unified", "1", "--prefill", "0", "--decode", "0"),
    "local": ("--disaggregation-transfer-backend", "local"),
    "mooncake": ("--disaggregation-transfer-backend", "mooncake"),
    "nixl": ("--disaggregation-transfer-backend", "nixl"),
}
CASES = [(kind, mode) for kind in ("llama", "llama-tied-rope", "qwen3", "qwen3-tied") for mode in MODES]
# Latents and experts: fewer and shorter prompts; which engine moves a page knows nothing of what is in it.
FEWER, SHORTER = 8, 280
FEWER_CASES = [
    ("deepseek-v3", "unified"),
    ("deepseek-v3", "local"),
    ("deepseek-v3", "nixl"),
    ("deepseek-v2", "unified"),
    ("deepseek-v2", "mooncake"),
    ("qwen3-moe", "unified"),
    ("mixtral", "local"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@cache
def known(folder: Path, kind: str) -> tuple[Path, list[Answer]]:
    """A checkpoint and the oracle's answers, made once."""
    path = make_checkpoint(folder / kind, kind, SEED)
    count, longest = (PROMPTS, LONGEST) if (kind, "local") in CASES else (FEWER, SHORTER)
    return path, Oracle(path).answers(count, longest, NEW_TOKENS, SEED)


@pytest.fixture(params=CASES + FEWER_CASES, ids="/".join)
def served(request: pytest.FixtureRequest, folder: Path) -> Iterator[tuple[Mesh, list[Answer]]]:
    kind, mode = request.param
    path, answers = known(folder, kind)
    chunks = ("--chunked-prefill-size", "128", "--max-total-tokens", "32768")
    with running("--model-path", str(path), "--dtype", "float32", *chunks, *MODES[mode]) as mesh:
        yield mesh, answers


async def test_greedy_equals_the_oracle(served: tuple[Mesh, list[Answer]]) -> None:
    mesh, answers = served
    async with Client(mesh.grpc) as client:
        prompts = [answer.prompt_ids for answer in answers]
        results = await client.generate_all(
            prompts, temperature=0.0, max_new_tokens=NEW_TOKENS, ignore_eos=True, logprobs=0
        )
    for answer, result in zip(answers, results, strict=True):
        assert result.token_ids == answer.token_ids, f"prompt of {len(answer.prompt_ids)} tokens, seed {SEED}"
        assert result.logprobs == pytest.approx(answer.logprobs, abs=1e-4)
        assert result.usage is not None
        assert result.usage.prompt_tokens == len(answer.prompt_ids)
        assert result.usage.completion_tokens == NEW_TOKENS
    wait_until(mesh.at_rest, 5, "every page is back in its pool")
