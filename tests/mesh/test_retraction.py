"""Decode runs out of pages on purpose: sequences are retracted, go on elsewhere, and say what they would have said."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoints import Answer, Oracle, make_checkpoint
from tests.mesh.harness import Client, Mesh, running, scrape, wait_until

pytestmark = [pytest.mark.mesh, pytest.mark.slow, pytest.mark.flaky(reruns=0)]

SEED = 31
DISTINCT, SEQUENCES, LONGEST, NEW_TOKENS = 8, 32, 60, 128
# No growth is counted, and all of a pool that holds five sequences at their end may be promised.
TOO_SMALL = (
    *("--max-total-tokens", "960", "--page-size", "16", "--context-length", "256"),
    *("--num-reserved-decode-tokens", "0", "--decode-prealloc-high-water", "1.0"),
)
LAYOUTS = {
    "pair": ("--prefill", "1", "--decode", "1"),
    "two-decode": ("--prefill", "1", "--decode", "2"),
    "unified": ("--unified", "1", "--prefill", "0", "--decode", "0"),
}


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Answer]]:
    folder = make_checkpoint(tmp_path_factory.mktemp("model") / "llama", "llama", SEED)
    return folder, Oracle(folder).answers(DISTINCT, LONGEST, NEW_TOKENS, SEED)


@pytest.fixture(params=LAYOUTS)
def small(request: pytest.FixtureRequest, known: tuple[Path, list[Answer]]) -> Iterator[tuple[Mesh, list[Answer]]]:
    folder, answers = known
    with running("--model-path", str(folder), "--dtype", "float32", *TOO_SMALL, *LAYOUTS[request.param]) as mesh:
        yield mesh, answers


def counted(mesh: Mesh, role: str, name: str) -> float:
    """A counter's sum over the processes of a role."""
    pages = [scrape(process["metrics"]) for process in mesh.of(role)]
    lines = [line for page in pages for line in page.splitlines() if line.startswith(name + " ")]
    return sum(float(line.split()[1]) for line in lines)


async def test_greedy_sequences_finish_with_the_oracles_tokens(small: tuple[Mesh, list[Answer]]) -> None:
    mesh, answers = small
    wanted = answers * (SEQUENCES // DISTINCT)
    async with Client(mesh.grpc) as client:
        results = await client.generate_all(
            [answer.prompt_ids for answer in wanted],
            temperature=0.0,
            max_new_tokens=NEW_TOKENS,
            ignore_eos=True,
            logprobs=0,
        )
    for answer, result in zip(wanted, results, strict=True):
        assert result.token_ids == answer.token_ids, f"prompt of {len(answer.prompt_ids)} tokens, seed {SEED}"
        assert result.logprobs == pytest.approx(answer.logprobs, abs=1e-4)
        assert result.finish == "length"
        assert result.usage is not None
        assert result.usage.prompt_tokens == len(answer.prompt_ids)
        assert result.usage.completion_tokens == NEW_TOKENS
    role = "decode" if mesh.of("decode") else "unified"
    retracted = counted(mesh, role, "pdmesh_retracted_sequences_total")
    assert retracted > 0
    if role == "decode":
        assert counted(mesh, "router", "pdmesh_retractions_total") == retracted
    print(f"{retracted:.0f} retractions for {SEQUENCES} sequences of {NEW_TOKENS} tokens")
    wait_until(mesh.at_rest, 5, "every page is back in its pool")


async def test_sampled_penalized_and_stopped_output_is_as_if_undisturbed(small: tuple[Mesh, list[Answer]]) -> None:
    """Positions of random numbers, penalties, limits, stop strings and text go on over an attempt's end."""
    mesh, answers = small
    if not mesh.of("decode"):
        pytest.skip("a unified worker resumes within")
    sampling = {
        "temperature": 0.9,
        "top_p": 0.95,
        "frequency_penalty": 0.4,
        "repetition_penalty": 1.1,
        "min_new_tokens": 100,
        "max_new_tokens": NEW_TOKENS,
        "stop": ["never said"],
    }
    async with Client(mesh.grpc) as client:
        prompts = list(enumerate(answer.prompt_ids for answer in answers))
        alone = [await client.generate(prompt, seed=number, **sampling) for number, prompt in prompts]
        before = counted(mesh, "decode", "pdmesh_retracted_sequences_total")
        numbered = prompts * (SEQUENCES // DISTINCT)
        crowded = await asyncio.gather(
            *(client.generate(prompt, seed=number, **sampling) for number, prompt in numbered)
        )
    assert counted(mesh, "decode", "pdmesh_retracted_sequences_total") > before
    for result, expected in zip(crowded, alone * (SEQUENCES // DISTINCT), strict=True):
        assert result.token_ids == expected.token_ids
        assert (result.text, result.finish) == (expected.text, expected.finish)
    wait_until(mesh.at_rest, 5, "every page is back in its pool")


async def test_many_emulated_sequences_say_what_they_say_with_room() -> None:
    """The emulated engine's tokens depend on prompt and position alone: two hundred sequences in a few seconds."""
    model = ("--model-path", "examples/models/adder", "--engine", "emulated", "--emulated-preset", "zero")
    prompts = [f"{number} + {number} =" for number in range(200)]
    said = []
    for pool in ((), ("--max-total-tokens", "1600", *TOO_SMALL[2:])):
        with running(*model, *pool) as mesh:
            async with Client(mesh.grpc) as client:
                results = await client.generate_all(prompts, temperature=0.0, max_new_tokens=150, ignore_eos=True)
            said.append([result.token_ids for result in results])
            retracted = counted(mesh, "decode", "pdmesh_retracted_sequences_total")
            assert bool(retracted) == bool(pool)
            wait_until(mesh.at_rest, 5, "every page is back in its pool")
    assert said[0] == said[1]
    assert {len(token_ids) for token_ids in said[0]} == {150}
