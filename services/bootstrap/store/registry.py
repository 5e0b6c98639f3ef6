"""Which store `--store` names."""

from __future__ import annotations

from common.config.flags import bad
from services.bootstrap.store.base import Store


def make_store(spec: str) -> Store:
    """`memory`, `etcd` (a private one on loopback) or `etcd://[user:password@]host:port[,host:port…]`.

    Nothing is reached yet. Raises `MeshError` (BAD_CONFIG) for anything else.
    """
    if spec == "memory":
        from services.bootstrap.store.memory import MemoryStore

        return MemoryStore()
    if spec == "etcd" or spec.startswith("etcd://"):
        from services.bootstrap.store.etcd import EtcdStore
        from services.bootstrap.store.etcd_client import EtcdClient
        from services.bootstrap.store.etcd_server import EtcdServer

        if spec == "etcd":
            return EtcdStore(EtcdClient([]), EtcdServer())
        user, password, endpoints = parse_etcd(spec)
        return EtcdStore(EtcdClient(endpoints, user=user, password=password))
    raise bad(f"--store: {spec!r} is not memory, etcd or etcd://host:port[,host:port...]")


def parse_etcd(spec: str) -> tuple[str, str, list[str]]:
    """User, password (empty: none) and endpoints of an `etcd://` address."""
    login, _, hosts = spec.removeprefix("etcd://").rpartition("@")
    user, _, password = login.partition(":")
    endpoints = hosts.rstrip("/").split(",")
    for endpoint in endpoints:
        host, _, port = endpoint.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise bad(f"--store: {endpoint!r} is not host:port")
    return user, password, endpoints
