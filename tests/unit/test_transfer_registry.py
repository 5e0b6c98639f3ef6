"""Backends by name, without importing an engine."""

from __future__ import annotations

import sys

import pytest

from common.transfer import mooncake, registry
from common.transfer.base import TransferConfig, TransferError, no_wake

pytestmark = pytest.mark.unit


def test_unknown_backend_names_the_known_ones() -> None:
    with pytest.raises(TransferError, match="'rdma'; there are local, mooncake, nixl, emulated"):
        registry.create("rdma", TransferConfig(), no_wake)


def test_missing_engine_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("mooncake.engine", "nixl._api"):
        monkeypatch.setitem(sys.modules, module, None)
    reasons = registry.available()
    assert reasons["local"] is None
    assert "pdmesh[mooncake]" in str(reasons["mooncake"])
    assert "pdmesh[nixl]" in str(reasons["nixl"])


def test_missing_system_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise ImportError("libibverbs.so.1: cannot open shared object file: No such file or directory")

    monkeypatch.setattr(mooncake.importlib, "import_module", refuse)
    with pytest.raises(TransferError, match="install libibverbs1"):
        mooncake.load()


def test_absent_rdma_device_is_refused() -> None:
    with pytest.raises(TransferError, match="no RDMA device no_such_device on this host"):
        mooncake.MooncakeEndpoint(TransferConfig(ib_devices=("no_such_device",)), no_wake, None)
