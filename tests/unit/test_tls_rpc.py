"""Servers and channels over TLS: who is let in, who is trusted, and by which name."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from common.config.tls import Credentials
from common.rpc import server as servers
from common.rpc.address import is_loopback, join
from common.rpc.channel import connect
from common.rpc.server import Server, make_server
from tests.certificates import Authority

pytestmark = pytest.mark.unit


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@asynccontextmanager
async def serving(tls: Credentials | None, host: str = "127.0.0.1") -> AsyncIterator[Server]:
    server = make_server(host, 0, [], tls=tls)
    await server.start()
    await server.set_serving(True)
    try:
        yield server
    finally:
        await server.stop()


async def check(address: str, tls: Credentials | None) -> str:
    """What the health service answers, or the status of the call that could not be made."""
    async with connect(address, tls) as channel:
        stub = health_pb2_grpc.HealthStub(channel)  # type: ignore[no-untyped-call]
        try:
            answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=10)
        except grpc.aio.AioRpcError as error:
            return error.code().name
        return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
async def test_both_sides_show_a_certificate_that_bears_the_address(authority: Authority, host: str) -> None:
    async with serving(authority.issue("server").credentials(), host) as server:
        assert server.address == join(host, server.port)
        assert await check(server.address, authority.issue("client", "client.example").credentials()) == "SERVING"


async def test_who_is_not_let_in(authority: Authority, tmp_path: Path) -> None:
    mine = authority.issue("server").credentials()
    stranger = Authority(tmp_path, "other").issue("client").credentials()
    strangers = {
        "plain text": None,
        "no certificate": replace(mine, certificate=None, key=None),
        "another authority's": replace(stranger, ca=mine.ca),
        "expired": authority.expired().credentials(),
    }
    async with serving(mine) as server:
        assert {who: await check(server.address, tls) for who, tls in strangers.items()} == dict.fromkeys(
            strangers, "UNAVAILABLE"
        )
        assert await check(server.address, mine) == "SERVING"


async def test_whom_a_client_does_not_trust(authority: Authority, tmp_path: Path) -> None:
    client = authority.issue("client").credentials()
    servers_of = {
        "another authority's": replace(Authority(tmp_path, "other").issue("server").credentials(), ca=client.ca),
        "expired": authority.expired().credentials(),
        "another address": authority.issue("server", "127.0.0.2", "localhost").credentials(),
        "plain text": None,
    }
    for who, tls in servers_of.items():
        async with serving(tls) as server:
            assert await check(server.address, client) == "UNAVAILABLE", who


async def test_another_name_may_stand_in_for_the_address(authority: Authority) -> None:
    """One certificate for all of a mesh, whatever the addresses of its machines."""
    mesh = authority.issue("mesh", "mesh.example")
    async with serving(mesh.credentials()) as server:
        assert await check(server.address, mesh.credentials()) == "UNAVAILABLE"
        assert await check(server.address, mesh.credentials("mesh.example")) == "SERVING"
        assert await check(server.address, mesh.credentials("other.example")) == "UNAVAILABLE"


async def test_without_authorities_a_server_asks_nobody_for_a_certificate(authority: Authority) -> None:
    mine = authority.issue("server").credentials()
    async with serving(replace(mine, ca=None)) as server:
        assert await check(server.address, Credentials(ca=mine.ca)) == "SERVING"
        assert await check(server.address, None) == "UNAVAILABLE"


async def test_plain_text_beyond_loopback_is_warned_of_once(
    authority: Authority, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def logged(tls: Credentials | None) -> str:
        async with serving(tls):
            pass
        captured = capsys.readouterr()
        return captured.out + captured.err

    assert "without TLS" not in await logged(None)
    monkeypatch.setattr(servers, "is_loopback", lambda host: False)  # tests listen nowhere else
    assert (await logged(None)).count("without TLS") == 1
    assert "without TLS" not in await logged(authority.issue("server").credentials())


def test_addresses() -> None:
    assert [join(host, 1) for host in ("a", "127.0.0.1", "::1")] == ["a:1", "127.0.0.1:1", "[::1]:1"]
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "example.com", "")))
