"""etcd over TLS: its own address scheme, its own certificates, and a password besides."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from common.config.tls import EtcdTlsConfig, TlsConfig
from common.errors.base import MeshError, Reason
from services.bootstrap.store.base import Write
from services.bootstrap.store.etcd import EtcdStore
from services.bootstrap.store.etcd_client import EtcdClient
from services.bootstrap.store.etcd_server import EtcdServer
from services.bootstrap.store.registry import make_store
from tests.certificates import Authority
from tests.etcd_login import PASSWORD, need_password

pytestmark = pytest.mark.contract


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
async def etcd(authority: Authority) -> AsyncIterator[EtcdServer]:
    """One that asks its clients for a certificate and, as user root, for a password."""
    server = EtcdServer(tls=authority.issue("etcd").config)
    await server.start()
    try:
        await asyncio.to_thread(need_password, server, authority)
        yield server
    finally:
        await server.stop()


async def write_and_read(spec: str, mesh: TlsConfig, etcd_tls: EtcdTlsConfig) -> bytes | None:
    store = make_store(spec, mesh, etcd_tls)
    assert isinstance(store, EtcdStore)
    impatient(store.client)
    try:
        await store.start()
        await store.commit([Write("/key", b"value")])
        entry = await store.get("/key")
        return entry.value if entry else None
    finally:
        await store.close()


def impatient(client: EtcdClient) -> None:
    client._timeout_s = 2.0


async def test_with_certificates_of_its_own_or_the_mesh_s_and_a_password(
    etcd: EtcdServer, authority: Authority
) -> None:
    files = authority.issue("client", "client.example")
    own = EtcdTlsConfig(files.cert, files.key, files.ca)
    for scheme in ("etcds", "https"):
        spec = f"{scheme}://root:{PASSWORD}@{etcd.endpoint}"
        assert await write_and_read(spec, TlsConfig(), own) == b"value"
        assert await write_and_read(spec, files.config, EtcdTlsConfig()) == b"value"


async def test_without_certificate_password_or_tls(etcd: EtcdServer, authority: Authority) -> None:
    files = authority.issue("client", "client.example")
    other = authority.issue("other")
    login = f"root:{PASSWORD}@"
    for spec, mesh in (
        (f"etcds://{login}{etcd.endpoint}", TlsConfig(tls_ca=files.ca)),
        (f"etcds://{login}{etcd.endpoint}", TlsConfig(tls_cert=other.cert, tls_key=other.key)),  # it trusts nobody
        (f"etcd://{login}{etcd.endpoint}", files.config),
        (f"etcds://root:wrong@{etcd.endpoint}", files.config),
        (f"etcds://{etcd.endpoint}", files.config),
    ):
        with pytest.raises(MeshError) as caught:
            await write_and_read(spec, mesh, EtcdTlsConfig())
        assert caught.value.reason is Reason.STORE_FAILED, spec
        assert PASSWORD not in caught.value.message
