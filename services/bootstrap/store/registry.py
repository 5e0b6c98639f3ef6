"""Which store `--store` names."""

from __future__ import annotations

from common.config.flags import bad
from common.config.tls import NO_ETCD_TLS, NO_TLS, EtcdTlsConfig, TlsConfig, load, load_etcd
from services.bootstrap.store.base import Store

TLS_SCHEMES = ("etcds", "https")


def make_store(
    spec: str, mesh_tls: TlsConfig = NO_TLS, etcd_tls: EtcdTlsConfig = NO_ETCD_TLS, *, lease_ttl_s: int = 3
) -> Store:
    """`memory`, `etcd` (a private one on loopback) or `etcd://[user:password@]host:port[,host:port…]`.

    `etcds://` (or `https://`) is the same over TLS, with `etcd_tls` and what `mesh_tls` adds to it. A private etcd
    speaks TLS where the mesh's is mutual. Nothing is reached yet. Raises `MeshError` (BAD_CONFIG) for anything else.
    """
    if etcd_tls != NO_ETCD_TLS and not spec.startswith(TLS_SCHEMES):
        raise bad("--etcd-tls-*: of no use without a --store that begins with etcds://")
    if spec == "memory":
        from services.bootstrap.store.memory import MemoryStore

        return MemoryStore()
    scheme, has_address, _ = spec.partition("://")
    if spec == "etcd" or (has_address and scheme in ("etcd", *TLS_SCHEMES)):
        from services.bootstrap.store.etcd import EtcdStore
        from services.bootstrap.store.etcd_client import EtcdClient
        from services.bootstrap.store.etcd_server import EtcdServer

        if spec == "etcd":
            mutual = mesh_tls if mesh_tls.tls_ca else NO_TLS
            return EtcdStore(EtcdClient([], tls=load(mutual)), EtcdServer(tls=mutual), lease_ttl_s=lease_ttl_s)
        user, password, endpoints = parse_etcd(spec)
        tls = load_etcd(etcd_tls, mesh_tls) if scheme in TLS_SCHEMES else None
        return EtcdStore(EtcdClient(endpoints, user=user, password=password, tls=tls), lease_ttl_s=lease_ttl_s)
    shown = spec.rpartition("@")[2]  # what stands before it may be a password
    raise bad(f"--store: {shown!r} is not memory, etcd or etcd[s]://host:port[,host:port...]")


def parse_etcd(spec: str) -> tuple[str, str, list[str]]:
    """User, password (empty: none) and endpoints of an `etcd://` address, whatever its scheme."""
    login, _, hosts = spec.partition("://")[2].rpartition("@")
    user, _, password = login.partition(":")
    endpoints = hosts.rstrip("/").split(",")
    for endpoint in endpoints:
        host, _, port = endpoint.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise bad(f"--store: {endpoint!r} is not host:port")
    return user, password, endpoints
