"""Workers whose pages or weights differ are never paired, and whoever asks is told which field it is."""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.request
from pathlib import Path

import grpc
import pytest

from common.cli.default_model import default_model_path
from common.errors.base import MeshError, Reason
from common.mesh.router_session import RouterSession
from common.rpc.status import error_from
from pdmesh.v1 import bootstrap_service_pb2 as pb
from tests.fault.cluster import Cluster, cluster
from tests.mesh.harness import wait_until

pytestmark = [pytest.mark.mesh, pytest.mark.slow]

MODEL = str(default_model_path())
DIFFERENT = {
    "kv_layout.page_size": (("--page-size", "16"), ("--page-size", "32"), "16 and 32"),
    "kv_layout.dtype": (("--dtype", "float32"), ("--dtype", "bfloat16"), "'float32' and 'bfloat16'"),
}


def ready(address: str) -> tuple[int, str]:
    """Status and body of the router's readiness page."""
    try:
        with urllib.request.urlopen(f"http://{address}/ready", timeout=10) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def start(mesh: Cluster, prefill: tuple[str, ...], decode: tuple[str, ...]) -> str:
    """Bootstrap, a router and two workers; returns bootstrap's address."""
    bootstrap = str(mesh.start("bootstrap-0", "--port", "0", "--metrics-port", "0").listening.grpc)
    common = ("--bootstrap", bootstrap, "--port", "0")
    worker = (*common, "--metrics-port", "0", "--model-path", MODEL, "--max-total-tokens", "4096")
    mesh.start("router", *common, "--grpc-port", "0")
    mesh.start("prefill-0", *worker, "--worker-id", "prefill-0", *prefill)
    mesh.start("decode-0", *worker, "--worker-id", "decode-0", *decode)
    return bootstrap


@pytest.mark.parametrize("field", DIFFERENT)
def test_the_field_is_named(field: str, tmp_path: Path) -> None:
    prefill, decode, values = DIFFERENT[field]
    why = f"prefill-0 and decode-0 differ in {field}: {values}"
    with cluster(tmp_path) as mesh:
        bootstrap = start(mesh, prefill, decode)
        http = str(mesh.services["router"].listening.http)
        wait_until(lambda: why in ready(http)[1], 60, "the readiness page says why")
        assert ready(http)[0] == 503

        async def ask() -> None:
            async with mesh.client() as client:
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await client.generate("What is 1 + 2?", max_new_tokens=2)
            error = error_from(refused.value)
            assert error.reason is Reason.NO_WORKER
            assert error.retryable
            assert why in error.message
            session = RouterSession(bootstrap)
            session.start()
            try:
                wanted = pb.OpenRoom(
                    request_id="q", attempt=1, prefill_worker_id="prefill-0", decode_worker_id="decode-0"
                )
                with pytest.raises(MeshError) as mismatch:
                    await session.open_room(wanted, 20.0)
            finally:
                await session.close()
            assert mismatch.value.reason is Reason.LAYOUT_MISMATCH
            assert f"differ in {field}: {values}" in mismatch.value.message

        asyncio.run(ask())
        body = json.dumps({"model": "adder", "prompt": "1", "max_tokens": 1}).encode()
        request = urllib.request.Request(f"http://{http}/v1/completions", body, {"content-type": "application/json"})
        with pytest.raises(urllib.error.HTTPError) as answered, urllib.request.urlopen(request, timeout=30):
            pass
        with answered.value as answer:
            assert answer.code == 503
            assert why in answer.read().decode()

        worker = ("--bootstrap", bootstrap, "--port", "0", "--metrics-port", "0", "--model-path", MODEL)
        mesh.start("decode-1", *worker, "--worker-id", "decode-1", "--max-total-tokens", "4096", *prefill)
        wait_until(lambda: ready(http)[0] == 200, 60, "one that fits is enough")
