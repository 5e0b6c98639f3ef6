"""A whole mesh on one GPU: pages go from one worker's device memory into the other's."""

from __future__ import annotations

import asyncio

import pytest

from common.transfer import registry
from tests.mesh.harness import Client, running

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.mark.parametrize("backend", ["nixl", "mooncake"])
def test_it_adds(backend: str) -> None:
    if registry.available()[backend]:
        pytest.skip(f"{backend} does not load here")
    flags = ("--device", "cuda", "--max-total-tokens", "4096", "--disaggregation-transfer-backend", backend)

    async def ask(address: str) -> str:
        async with Client(address) as client:
            return (await client.generate("What is 123 + 456?", temperature=0)).text

    with running(*flags) as mesh:
        assert "579" in asyncio.run(ask(mesh.grpc))
        assert mesh.at_rest()
