"""Prefix caches from end to end: what was computed or sent before is not computed or sent again, and no token changes.

Two hundred prompts share prefixes. A second pass over them, a third after everything was pushed out of the caches, and
a fourth beside aborted requests must all say what the oracle says; tokens and bytes are counted.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import pytest

from tests.checkpoints import Answer, Oracle, make_checkpoint
from tests.mesh.harness import Client, Mesh, Result, running, scrape, wait_until

pytestmark = [pytest.mark.mesh, pytest.mark.slow, pytest.mark.flaky(reruns=0)]

SEED = 47
PAGE = 16
PAGE_BYTES = 4 * 2 * 2 * PAGE * 16 * 4
POOL = 24576  # tokens: all prompts fit
GROUPS, PROMPTS, STEM, LEAF, NEW_TOKENS = 8, 200, 160, 40, 4
CACHING = "--disaggregation-decode-enable-radix-cache"
SETTINGS = (
    "--dtype",
    "float32",
    "--chunked-prefill-size",
    "256",
    "--page-size",
    str(PAGE),
    "--max-total-tokens",
    str(POOL),
)
MODES = {
    "local": ("--disaggregation-transfer-backend", "local", CACHING),
    "nixl": ("--disaggregation-transfer-backend", "nixl", "--kv-checksum", "full", CACHING),
    "unified": ("--unified", "1", "--prefill", "0", "--decode", "0"),
}


def with_prefixes(oracle: Oracle) -> list[Answer]:
    """Prompts of `GROUPS` stems of several pages, each with an end of its own; near-ties are drawn again."""
    rng = random.Random(SEED)
    draw = lambda count: [rng.randrange(2, oracle.vocab_size) for _ in range(count)]  # noqa: E731
    stems = [draw(rng.randint(STEM // 2, STEM)) for _ in range(GROUPS)]
    found: list[Answer] = []
    while len(found) < PROMPTS:
        candidate = oracle.answer(stems[len(found) % GROUPS] + draw(rng.randint(1, LEAF)), NEW_TOKENS)
        if candidate.closest > 2e-4:
            found.append(candidate)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("prefixes")


@cache
def known(folder: Path) -> tuple[Path, list[Answer]]:
    path = make_checkpoint(folder / "llama", "llama", SEED)
    return path, with_prefixes(Oracle(path))


@pytest.fixture(params=MODES)
def served(request: pytest.FixtureRequest, folder: Path) -> Iterator[tuple[Mesh, list[Answer]]]:
    path, answers = known(folder)
    with running("--model-path", str(path), *SETTINGS, *MODES[request.param]) as mesh:
        yield mesh, answers


async def ask(client: Client, answers: Sequence[Answer]) -> list[Result]:
    """All of them at once; what they say is the oracle's."""
    prompts = [answer.prompt_ids for answer in answers]
    results = await client.generate_all(prompts, temperature=0.0, max_new_tokens=NEW_TOKENS, ignore_eos=True)
    for answer, result in zip(answers, results, strict=True):
        assert result.token_ids == answer.token_ids, f"prompt of {len(answer.prompt_ids)} tokens, seed {SEED}"
    return results


def cached(results: Sequence[Result]) -> list[int]:
    return [result.usage.cached_tokens for result in results if result.usage]


def received(mesh: Mesh) -> float:
    """Bytes that arrived at decode so far."""
    lines = [line for process in mesh.of("decode") for line in scrape(process["metrics"]).splitlines()]
    return sum(float(line.split()[-1]) for line in lines if line.startswith("pdmesh_transfer_received_bytes_total{"))


async def abandon(client: Client, answers: Sequence[Answer]) -> None:
    """Ask, and leave after the first tokens, or before."""
    rng = random.Random(SEED)

    async def leave(answer: Answer, patience: int) -> None:
        stream = client.stream(answer.prompt_ids, temperature=0.0, max_new_tokens=200, ignore_eos=True)
        if patience:
            async for _ in stream:
                if not (patience := patience - 1):
                    break
        stream.cancel()  # type: ignore[attr-defined]

    await asyncio.gather(*(leave(answer, rng.randrange(3)) for answer in answers))


async def test_what_is_known_is_neither_computed_nor_sent_again(served: tuple[Mesh, list[Answer]]) -> None:
    mesh, answers = served
    prompts = [answer.prompt_ids for answer in answers]
    async with Client(mesh.grpc) as client:
        first = await ask(client, answers)
        prefixes = {tuple(ids[: PAGE * n]) for ids in prompts for n in range(1, len(ids) // PAGE + 1)}
        shared = sum(len(ids) // PAGE for ids in prompts) - len(prefixes)
        assert sum(cached(first)) == shared * PAGE, (
            "a page that prompts share is computed once, though all came at once"
        )
        wait_until(mesh.at_rest, 10, "every page is free or cached")

        before = received(mesh)
        second = await ask(client, answers)
        assert cached(second) == [(len(ids) - 1) // PAGE * PAGE for ids in prompts], "all but the last page, or token"
        wait_until(mesh.at_rest, 10, "every page is free or cached")
        if mesh.of("decode"):
            new = sum(len(ids) % PAGE > 0 for ids in prompts)  # pages that are not full, and so never cached
            assert received(mesh) - before == new * PAGE_BYTES

        rng = random.Random(SEED)
        fillers = [[rng.randrange(2, 500) for _ in range(600)] for _ in range(POOL // 600 + 2)]
        await client.generate_all(fillers, temperature=0.0, max_new_tokens=1)
        third = await ask(client, answers)
        assert sum(cached(third)) < sum(cached(second)), "the prompts were pushed out of the cache"

        await asyncio.gather(abandon(client, answers[::3]), ask(client, answers), abandon(client, answers[1::3]))
        fifth = await ask(client, answers)
        assert cached(fifth) == cached(second)
    wait_until(mesh.at_rest, 10, "every page is free or cached")
    log = mesh.log.read_text()
    assert "the ledger is wrong" not in log
