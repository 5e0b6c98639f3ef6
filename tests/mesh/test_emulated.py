"""The emulated engine in a whole mesh: the whole protocol, and nothing computed."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.engine.emulated_times import DecodeTimes, PrefillTimes, Times, TransferTimes
from tests.mesh.harness import Client, Mesh, Result, running, wait_until

pytestmark = pytest.mark.mesh

PROMPT = list(range(40))
NEW_TOKENS = 24
ZERO = ("--engine", "emulated", "--emulated-preset", "zero")


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with running(*ZERO, "--prefill", "2", "--decode", "2") as up:
        yield up


async def ask(mesh: Mesh, count: int, **sampling: object) -> list[Result]:
    async with Client(mesh.grpc) as client:
        given = {"max_new_tokens": NEW_TOKENS, "temperature": 1.0, "seed": 3, **sampling}
        return await client.generate_all([PROMPT] * count, **given)


async def test_it_serves_through_the_hand_over_and_every_worker_gives_the_same_tokens(mesh: Mesh) -> None:
    results = await ask(mesh, 64)
    assert {result.finish for result in results} == {"length"}
    assert len({tuple(result.token_ids) for result in results}) == 1
    assert len(results[0].token_ids) == NEW_TOKENS
    wait_until(mesh.at_rest, 10, "all pages are free")
    with running(*ZERO, "--unified", "1") as other:
        assert (await ask(other, 1))[0].token_ids == results[0].token_ids


async def test_requests_that_are_given_up_leave_nothing_behind(mesh: Mesh) -> None:
    async with Client(mesh.grpc) as client:
        for _ in range(20):
            stream = client.stream(PROMPT, max_new_tokens=400)
            async for _ in stream:
                break
            stream.cancel()  # type: ignore[attr-defined]
    wait_until(mesh.at_rest, 10, "all pages are free")


def test_no_rank_has_torch_in_it(mesh: Mesh) -> None:
    for worker in mesh.workers:
        family = [worker["pid"], *children(worker["pid"])]
        assert len(family) > 1
        for pid in family:
            assert "libtorch" not in Path(f"/proc/{pid}/maps").read_text()


def children(pid: int) -> list[int]:
    found = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return found + [grandchild for child in found for grandchild in children(child)]


async def test_it_takes_the_time_that_its_profile_says(tmp_path: Path) -> None:
    """Lower bounds alone: how much longer it takes is the machine's affair."""
    profile = tmp_path / "times.toml"
    profile.write_text("[prefill]\nbase_s = 0.1\n[decode]\nbase_s = 0.02\n[transfer]\nlatency_s = 0.15\n")
    expected = Times(PrefillTimes(0.1), DecodeTimes(0.02), TransferTimes(0.15))
    with running("--engine", "emulated", "--emulated-profile", str(profile)) as mesh:
        loop = asyncio.get_running_loop()
        start = loop.time()
        first_at = None
        async with Client(mesh.grpc) as client:
            async for response in client.stream(PROMPT, max_new_tokens=NEW_TOKENS):
                if response.token_ids and first_at is None:
                    first_at = loop.time()
        assert first_at is not None
        assert first_at - start >= expected.prefill.base_s + expected.transfer.latency_s
        assert loop.time() - first_at >= (NEW_TOKENS - 2) * expected.decode.base_s
        wait_until(mesh.at_rest, 10, "all pages are free")


async def test_an_abort_is_heard_during_a_long_step(tmp_path: Path) -> None:
    profile = tmp_path / "times.json"
    profile.write_text('{"prefill": {"base_s": 600.0}}')
    with running("--engine", "emulated", "--emulated-profile", str(profile)) as mesh:
        async with Client(mesh.grpc) as client:
            asked = asyncio.create_task(client.generate(PROMPT, max_new_tokens=4))
            await asyncio.to_thread(wait_until, lambda: any_reserved(mesh), 10, "the room is reserved")
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)
        await asyncio.to_thread(wait_until, mesh.at_rest, 10, "all pages are free")


def any_reserved(mesh: Mesh) -> bool:
    return any(pages["reserved"] for pages in mesh.pages())
