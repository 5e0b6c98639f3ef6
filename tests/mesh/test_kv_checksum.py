"""`--kv-checksum` from the command line to the metrics page."""

from __future__ import annotations

import pytest

from tests.mesh.harness import Client, Mesh, running, scrape, wait_until

pytestmark = [pytest.mark.mesh, pytest.mark.slow, pytest.mark.flaky(reruns=0)]

PROMPTS = [f"What is {a} + {a + 1}?" for a in range(100, 108)]


def figures(mesh: Mesh) -> dict[str, float]:
    """What decode says of what arrived."""
    (decode,) = mesh.of("decode")
    lines = (line.split() for line in scrape(decode["metrics"]).splitlines() if not line.startswith("#"))
    page = {parts[0]: float(parts[1]) for parts in lines}
    names = ("kv_checksum_pages_total", "kv_checksum_mismatches_total", "stale_notices_total")
    return {name: page[f"pdmesh_{name}"] for name in names}


async def test_every_page_is_verified_on_arrival() -> None:
    with running("--kv-checksum", "full") as mesh:
        async with Client(mesh.grpc) as client:
            results = await client.generate_all(PROMPTS, temperature=0.0, max_new_tokens=8)
        assert all(result.token_ids for result in results)
        wait_until(mesh.at_rest, 30, "every page is back in its pool")
        wait_until(lambda: figures(mesh)["kv_checksum_pages_total"] >= len(PROMPTS), 30, "the figures are there")
        assert figures(mesh)["kv_checksum_mismatches_total"] == 0
        assert figures(mesh)["stale_notices_total"] == 0
