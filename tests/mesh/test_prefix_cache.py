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
from tests.mesh.harness import Client, Mesh, Result, pages_of, running, wait_until

pytestmark = [pytest.mark.mesh, pytest.mark.slow, pytest.mark.flaky(reruns=0)]

SEED = 47
PAGE = 16
GROUPS, PROMPTS, STEM, LEAF, NEW_TOKENS = 8, 200, 160, 40, 4
CACHING = "--disaggregation-decode-enable-radix-cache"
SETTINGS = ("--dtype", "float32", "--chunked-prefill-size", "256", "--page-size", str(PAGE))
ROOMY, TIGHT = ("--max-total-tokens", "65536"), ("--max-total-tokens", "4096")
MODES = {
    "local": ("--disaggregation-transfer-backend", "local", CACHING),
    "nixl": ("--disaggregation-transfer-backend", "nixl", CACHING),
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
    with running("--model-path", str(path), *SETTINGS, *ROOMY, *MODES[request.param]) as mesh:
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


def whole_pages(tokens: int) -> int:
    return tokens // PAGE


def in_pages(mesh: Mesh) -> int:
    """Pages that decode keeps."""
    return sum(pages_of(process)["cached"] for process in mesh.of("decode"))
