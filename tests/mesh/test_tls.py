"""A mesh over mutual TLS: it answers who shows a certificate of its authority, and nobody else, on every port."""

from __future__ import annotations

import asyncio
import json
import re
import ssl
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from common.cli.default_model import default_model_path
from common.config.tls import Credentials
from common.mesh.router_session import RouterSession
from common.rpc.channel import connect
from pdmesh.etcd.v1 import etcd_pb2
from pdmesh.v1 import router_service_pb2_grpc as router_grpc
from pdmesh.v1.bootstrap_service_pb2 import ListWorkersRequest
from pdmesh.v1.bootstrap_service_pb2_grpc import BootstrapServiceStub
from services.bootstrap.config import BootstrapConfig
from services.bootstrap.main import Bootstrap
from services.bootstrap.store.etcd_server import EtcdServer
from tests.certificates import Authority, Files
from tests.etcd_login import PASSWORD, need_password
from tests.mesh.harness import Mesh, request_of, running

pytestmark = [pytest.mark.mesh, pytest.mark.slow]

ROLES = ("bootstrap", "router", "prefill", "decode", "unified")


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def client(authority: Authority) -> Files:
    return authority.issue("client", "client.example")


@pytest.fixture(scope="module")
def mesh(authority: Authority) -> Iterator[Mesh]:
    """All kinds of services and the private etcd, each over mutual TLS; HTTPS with the same certificate."""
    service = authority.issue("service")
    https = ("--http-tls-cert", service.cert, "--http-tls-key", service.key)
    workers = ("--prefill", "1", "--decode", "1", "--unified", "1")
    with running("--store", "etcd", *service.flags, *https, *workers) as mesh:
        yield mesh


@pytest.fixture(scope="module")
def ports(mesh: Mesh) -> dict[str, str]:
    """The address of every gRPC server of the mesh, by role."""
    found = re.search(r"private etcd started\s.*endpoint=(\S+)", mesh.log.read_text())
    assert found
    return {"etcd": found[1], **{role: mesh.of(role)[0]["grpc"] for role in ROLES}}


async def ask(address: str, tls: Credentials | None) -> str:
    """What the health service at `address` says, or the status of a call that could not be made."""
    async with connect(address, tls) as channel:
        stub = health_pb2_grpc.HealthStub(channel)  # type: ignore[no-untyped-call]
        try:
            answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=10)
        except grpc.aio.AioRpcError as error:
            return error.code().name
        return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)


async def test_grpc_answers_a_client_with_a_certificate(mesh: Mesh, client: Files) -> None:
    async with connect(mesh.grpc, client.credentials()) as channel:
        router: router_grpc.RouterServiceAsyncStub = router_grpc.RouterServiceStub(channel)
        call = router.Generate(request_of("123 + 456 =", temperature=0.0), timeout=120)
        assert "".join([response.text async for response in call]).strip() == "579"


def test_https_answers(mesh: Mesh, authority: Authority) -> None:
    body = {"model": "adder", "prompt": "123 + 456 =", "temperature": 0}
    url = mesh.http.replace("http://", "https://")
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    assert f"HTTP       {url}\n" in mesh.log.read_text()
    trusting = ssl.create_default_context(cafile=authority.ca)
    with urllib.request.urlopen(request, timeout=120, context=trusting) as response:
        assert json.loads(response.read())["choices"][0]["text"].strip() == "579"


def test_the_command_line_answers_with_a_certificate_alone(mesh: Mesh, client: Files) -> None:
    command = [sys.executable, "-m", "common.cli.main", "generate", "1 + 2 =", "--temperature", "0"]
    command += ["--router", mesh.grpc]
    asked = subprocess.run([*command, *client.flags], capture_output=True, text=True, timeout=120)
    assert (asked.returncode, asked.stdout.strip()) == (0, "3"), asked.stderr
    refused = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert refused.returncode == 1
    assert f"no router answers at {mesh.grpc} in plain text" in refused.stderr


def test_the_commands_for_operators_answer_with_a_certificate_alone(mesh: Mesh, client: Files) -> None:
    address = mesh.of("bootstrap")[0]["grpc"]
    command = [sys.executable, "-m", "common.cli.main", "workers", "--json", "--bootstrap", address]
    asked = subprocess.run([*command, *client.flags], capture_output=True, text=True, timeout=120)
    assert asked.returncode == 0, asked.stderr
    assert len(json.loads(asked.stdout)) == 3
    assert subprocess.run(command, capture_output=True, timeout=120).returncode == 1


async def test_every_port_answers_a_peer_of_its_authority(ports: dict[str, str], client: Files) -> None:
    answers = {role: await ask(address, client.credentials()) for role, address in ports.items()}
    assert answers == dict.fromkeys(ports, "SERVING")


@pytest.mark.parametrize("who", ["plain text", "no certificate", "another authority's", "expired"])
async def test_every_port_refuses_anybody_else(
    who: str, ports: dict[str, str], authority: Authority, client: Files, tmp_path: Path
) -> None:
    ours = replace(client.credentials(), certificate=None, key=None)
    stranger = {
        "plain text": None,
        "no certificate": ours,
        "another authority's": replace(Authority(tmp_path, "other").issue("peer").credentials(), ca=ours.ca),
        "expired": authority.expired().credentials(),
    }[who]
    answers = {role: await ask(address, stranger) for role, address in ports.items()}
    assert answers == dict.fromkeys(ports, "UNAVAILABLE")


async def test_what_bootstrap_keeps_is_in_etcd(ports: dict[str, str], client: Files) -> None:
    async with connect(ports["bootstrap"], client.credentials()) as channel:
        workers = (await BootstrapServiceStub(channel).ListWorkers(ListWorkersRequest(), timeout=10)).workers
    async with connect(ports["etcd"], client.credentials()) as channel:
        read = channel.unary_unary(
            "/etcdserverpb.KV/Range",
            request_serializer=etcd_pb2.RangeRequest.SerializeToString,
            response_deserializer=etcd_pb2.RangeResponse.FromString,
        )
        found = await read(etcd_pb2.RangeRequest(key=b"/pdmesh/", range_end=b"/pdmesh0"), timeout=10)
    keys = b" ".join(entry.key for entry in found.kvs)
    assert len(workers) == 3
    assert all(worker.worker_id.encode() in keys for worker in workers)


async def test_a_mesh_on_an_etcd_with_certificates_and_a_password(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The password stands in no log and on no command line, which every user of the machine can read.

    The mesh's certificate bears a name instead of addresses here; etcd's is checked by address all the same.
    """
    server = EtcdServer(tls=authority.issue("etcd").config)
    await server.start()
    try:
        await asyncio.to_thread(need_password, server, authority)
        monkeypatch.setenv("PDMESH_STORE", f"etcds://root:{PASSWORD}@{server.endpoint}")
        service = authority.issue("named", "mesh.example")
        with running("--unified", "1", *service.flags, "--tls-server-name", "mesh.example") as mesh:
            async with connect(mesh.grpc, service.credentials("mesh.example")) as channel:
                router: router_grpc.RouterServiceAsyncStub = router_grpc.RouterServiceStub(channel)
                call = router.Generate(request_of("1 + 2 =", temperature=0.0), timeout=120)
                assert "".join([response.text async for response in call]).strip() == "3"
            pids = [mesh.supervisor.pid, *(process["pid"] for process in mesh.processes)]
            shown = b"".join([mesh.log.read_bytes(), *map(command_line, pids)])
            assert b"etcd reached" in shown
            assert PASSWORD.encode() not in shown
    finally:
        await server.stop()


async def test_sessions_by_ipv6(authority: Authority) -> None:
    tls = authority.issue("service").credentials()
    bootstrap = Bootstrap(BootstrapConfig(host="::1", port=0), tls=tls)
    session = RouterSession(bootstrap.address, tls=tls)
    try:
        await bootstrap.start()
        await bootstrap.serve()
        session.start()
        await asyncio.wait_for(session.ready.wait(), 30)
        assert bootstrap.address.startswith("[::1]:")
    finally:
        await session.close()
        await bootstrap.stop()


def command_line(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


@pytest.mark.parametrize("role", ["bootstrap", "prefill", "decode", "unified", "router", "up"])
def test_a_service_that_cannot_use_its_certificate_says_so_and_ends(role: str, authority: Authority) -> None:
    files = authority.expired()
    model = () if role in ("bootstrap", "router") else ("--model-path", str(default_model_path()))
    command = [sys.executable, "-m", "common.cli.main", role, "--port", "0", *model, *files.flags]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2
    words = [line for line in ended.stderr.splitlines() if line.startswith("pdmesh:")]
    assert words == [f"pdmesh: BAD_CONFIG: --tls-cert: {files.cert}: certificate has expired"]
    assert len(words) == len(ended.stderr.splitlines())


def test_no_key_in_the_log(mesh: Mesh) -> None:
    log = mesh.log.read_text()
    assert "PRIVATE KEY" not in log
    assert "BEGIN CERTIFICATE" not in log
