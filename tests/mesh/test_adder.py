"""The model in the box, through the mesh that `make up` starts."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import httpx
import pytest

from tests.mesh.harness import ROOT, Mesh, running, wait_until

pytestmark = [pytest.mark.mesh, pytest.mark.slow, pytest.mark.flaky(reruns=0)]

HELD_OUT: list[list[int]] = json.loads((ROOT / "examples/models/adder/heldout.json").read_text())
CONCURRENCY = 32


async def ask(client: httpx.AsyncClient, gate: asyncio.Semaphore, a: int, b: int) -> str:
    body = {
        "model": "adder",
        "messages": [{"role": "user", "content": f"What is {a} + {b}?"}],
        "temperature": 0,
        "max_tokens": 16,
    }
    async with gate:
        response = await client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


async def answers(mesh: Mesh) -> list[str]:
    """All held-out sums at concurrency 32; none may be lost, and every page must be back at the end."""
    gate = asyncio.Semaphore(CONCURRENCY)
    async with httpx.AsyncClient(base_url=mesh.http, timeout=120) as client:
        got = await asyncio.gather(*(ask(client, gate, a, b) for a, b in HELD_OUT))
    wait_until(mesh.at_rest, 5, "every page is back in its pool")
    return list(got)


async def test_500_held_out_sums_through_pd_and_unified() -> None:
    assert len(HELD_OUT) == 500
    with running() as mesh:
        through_pd = await answers(mesh)
    with running("--unified", "1", "--prefill", "0", "--decode", "0") as mesh:
        through_unified = await answers(mesh)
    right = [str(a + b) for a, b in HELD_OUT]
    score = sum(got == want for got, want in zip(through_pd, right, strict=True))
    unified_score = sum(got == want for got, want in zip(through_unified, right, strict=True))
    assert score >= 495, f"{score} of 500"
    assert score == unified_score


@pytest.mark.parametrize("arguments", [("--store", "etcd"), ("--prefill", "2", "--decode", "2")], ids=["etcd", "2+2"])
async def test_other_shapes_of_the_mesh_answer(arguments: tuple[str, ...]) -> None:
    with running(*arguments) as mesh:
        async with httpx.AsyncClient(base_url=mesh.http, timeout=60) as client:
            gate = asyncio.Semaphore(CONCURRENCY)
            assert await ask(client, gate, 123, 456) == "579"
            got = await asyncio.gather(*(ask(client, gate, a, b) for a, b in HELD_OUT[:64]))
    assert sum(answer == str(a + b) for answer, (a, b) in zip(got, HELD_OUT[:64], strict=True)) >= 62


def test_the_status_file_names_every_process(tmp_path: Path) -> None:
    with running() as mesh:
        assert [process["role"] for process in mesh.processes] == ["bootstrap", "prefill", "decode", "router"]
        assert len({process["pid"] for process in mesh.processes}) == 4
        assert all(process["grpc"] for process in mesh.processes)
