"""Sampled output depends on seed and position alone: not on the batch, not on who computed the prompt."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.checkpoints import make_checkpoint
from tests.mesh.harness import Client, running

pytestmark = [pytest.mark.mesh, pytest.mark.slow, pytest.mark.flaky(reruns=0)]

PROMPTS = [[30 + i, 31, 32 + 2 * i, *range(40, 60 + i)] for i in range(16)]
SAMPLING = [
    {"temperature": 0.8, "seed": 1},
    {"temperature": 1.0, "top_k": 20, "top_p": 0.9, "seed": 2},
    {"temperature": 1.3, "min_p": 0.05, "repetition_penalty": 1.2, "seed": 3},
    {"temperature": 0.9, "frequency_penalty": 0.5, "presence_penalty": 0.3, "seed": 2**63 + 4},
]


async def outputs(arguments: tuple[str, ...]) -> tuple[list[list[int]], list[list[int]]]:
    """Each prompt alone, and then all sixteen at once."""
    with running(*arguments) as mesh:
        async with Client(mesh.grpc) as client:
            common = {"max_new_tokens": 32, "ignore_eos": True}
            alone = [
                (await client.generate(prompt, **common, **SAMPLING[i % 4])).token_ids
                for i, prompt in enumerate(PROMPTS)
            ]
            streams = [client.generate(prompt, **common, **SAMPLING[i % 4]) for i, prompt in enumerate(PROMPTS)]
            together = [result.token_ids for result in await asyncio.gather(*streams)]
    return alone, together


async def test_seeded_output_is_the_same_everywhere(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "qwen3", "qwen3", seed=5)
    model = ("--model-path", str(folder), "--dtype", "float32", "--max-total-tokens", "8192")
    unified = await outputs((*model, "--unified", "1", "--prefill", "0", "--decode", "0"))
    handed_over = await outputs(model)
    assert unified[0] == unified[1], "a batch of 16 changed the output"
    assert handed_over[0] == handed_over[1], "a batch of 16 changed the output in PD"
    assert unified[0] == handed_over[0], "the hand-over changed the output"
    assert len({tuple(ids) for ids in unified[0]}) == len(PROMPTS)
