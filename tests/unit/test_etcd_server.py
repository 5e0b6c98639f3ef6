"""Finding etcd and keeping house after it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from common.errors.base import MeshError, Reason
from services.bootstrap.store import etcd_server
from services.bootstrap.store.etcd_client import prefix_end

pytestmark = pytest.mark.unit


def test_the_named_binary_comes_first(tmp_path: Path) -> None:
    binary = tmp_path / "my-etcd"
    with pytest.raises(MeshError) as caught:
        etcd_server.find_etcd({"ETCD_BIN": str(binary)})
    assert caught.value.reason is Reason.BAD_CONFIG
    binary.write_bytes(b"\x7fELF")
    binary.chmod(0o755)
    assert etcd_server.find_etcd({"ETCD_BIN": str(binary)}) == binary


def test_a_script_on_the_path_is_passed_over(tmp_path: Path) -> None:
    script, binary = tmp_path / "a" / "etcd", tmp_path / "b" / "etcd"
    for path, content in ((script, b"#!/bin/sh\n"), (binary, b"\x7fELF")):
        path.parent.mkdir()
        path.write_bytes(content)
        path.chmod(0o755)
    assert etcd_server.find_etcd({"PATH": f"{script.parent}{os.pathsep}{binary.parent}"}) == binary


def test_the_end_of_a_prefix() -> None:
    assert prefix_end(b"/a/") == b"/a0"
    assert prefix_end(b"a\xff") == b"b"
    assert prefix_end(b"\xff") == b"\0"
