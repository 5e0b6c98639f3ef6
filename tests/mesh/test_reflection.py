"""A generic reflection client (buf curl) finds its way in every process of the mesh."""

from __future__ import annotations

import json
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mesh.harness import Mesh, running, scrape

pytestmark = [pytest.mark.mesh, pytest.mark.slow]

BUF = Path(sysconfig.get_path("scripts")) / "buf"
SERVICES = {
    "bootstrap": "pdmesh.v1.BootstrapService",
    "prefill": "pdmesh.v1.PrefillService",
    "decode": "pdmesh.v1.DecodeService",
    "router": "pdmesh.v1.RouterService",
}


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with running() as mesh:
        yield mesh


def buf_curl(*arguments: str) -> str:
    command = [BUF, "curl", "--protocol", "grpc", "--http2-prior-knowledge", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.parametrize("role", SERVICES)
@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_every_process_lists_its_services(mesh: Mesh, role: str, version: str) -> None:
    listed = buf_curl("--list-services", "--reflect-protocol", f"grpc-{version}", f"http://{mesh.of(role)[0]['grpc']}")
    assert {SERVICES[role], "grpc.health.v1.Health", "grpc.channelz.v1.Channelz"} <= set(listed.split())


@pytest.mark.parametrize("role", SERVICES)
def test_every_process_is_healthy(mesh: Mesh, role: str) -> None:
    url = f"http://{mesh.of(role)[0]['grpc']}/grpc.health.v1.Health/Check"
    for name in ("", SERVICES[role]):
        assert json.loads(buf_curl("-d", json.dumps({"service": name}), url)) == {"status": "SERVING"}


def test_generate_by_json(mesh: Mesh) -> None:
    request = {"prompt": "2 + 2 =", "sampling": {"maxNewTokens": 4, "temperature": 0, "ignoreEos": True}}
    url = f"http://{mesh.grpc}/pdmesh.v1.RouterService/Generate"
    answer = json.loads(buf_curl("-d", json.dumps(request), url))
    assert len(answer["tokenIds"]) == 4
    assert answer["finishReason"] == "FINISH_REASON_LENGTH"
    assert answer["usage"]["completionTokens"] == 4


def test_bootstrap_lists_workers_by_json(mesh: Mesh) -> None:
    url = f"http://{mesh.of('bootstrap')[0]['grpc']}/pdmesh.v1.BootstrapService/ListWorkers"
    workers = json.loads(buf_curl("-d", "{}", url))["workers"]
    assert {worker["role"] for worker in workers} == {"WORKER_ROLE_PREFILL", "WORKER_ROLE_DECODE"}


@pytest.mark.parametrize("role", SERVICES)
def test_every_process_shows_metrics(mesh: Mesh, role: str) -> None:
    process = mesh.of(role)[0]
    assert "pdmesh_" in scrape(process["metrics"])
