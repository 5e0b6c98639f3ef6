"""Workers that are reached by another address than the one they listen on."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from common.cli.launch import wait_for_model
from common.rpc.channel import connect
from common.transfer.endpoint import Descriptor
from pdmesh.v1 import bootstrap_service_pb2 as pb
from pdmesh.v1 import bootstrap_service_pb2_grpc as pb_grpc
from pdmesh.v1 import types_pb2 as types
from tests.mesh.harness import Client, wait_until
from tests.mesh.processes import Services, services

pytestmark = pytest.mark.mesh


async def workers_at(bootstrap: str) -> list[types.Worker]:
    channel = connect(bootstrap)
    try:
        stub: pb_grpc.BootstrapServiceAsyncStub = pb_grpc.BootstrapServiceStub(channel)
        return list((await stub.ListWorkers(pb.ListWorkersRequest(), timeout=10)).workers)
    finally:
        await channel.close()


async def ask(router: str) -> list[int]:
    async with Client(router) as client:
        return (await client.generate([5, 6, 7], max_new_tokens=4, ignore_eos=True)).token_ids


def test_calls_and_transfers_take_the_advertised_address(tmp_path: Path) -> None:
    """Routers call workers, and prefill dials decode's transfer endpoint, by the name that was advertised."""
    with services(tmp_path, Services) as mesh:
        mesh.bootstrap("--metrics-port", "0")
        for role in ("prefill", "decode"):
            mesh.worker(role, role, "--metrics-port", "0", "--advertise-address", "localhost")
        router = mesh.router()
        bootstrap = mesh["bootstrap"].grpc
        wait_until(lambda: len(asyncio.run(workers_at(bootstrap))) == 2, 60, "both have registered")
        for worker in asyncio.run(workers_at(bootstrap)):
            port = mesh[worker.worker_id].grpc.rpartition(":")[2]
            assert worker.address == f"localhost:{port}"
            host, _ = Descriptor.decode(worker.endpoints[0].descriptor).control
            assert host == "localhost"
        asyncio.run(wait_for_model(router.grpc))
        assert len(asyncio.run(ask(router.grpc))) == 4
