"""Fencing, for every transfer backend: when a writer that was lost can write no more."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from common.transfer import registry
from common.transfer.base import TransferError
from tests.contract.transfer_ends import Peer, Writer, wait_until

pytestmark = pytest.mark.contract

LIFE = 7


@pytest.fixture(scope="module", params=registry.NAMES)
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if reason := registry.available()[name]:
        pytest.skip(reason)
    return name


@pytest.fixture
def target(backend: str) -> Iterator[Writer]:
    """The side that is written to, here; its pool holds random bytes."""
    target = Writer(backend)
    yield target
    target.endpoint.close()


@pytest.fixture
def writer(backend: str, tmp_path: Path) -> Iterator[Peer]:
    """The side that writes: another process."""
    peer = Peer(backend, tmp_path)
    peer.ask("live", LIFE)
    yield peer
    peer.cleanup()


def test_one_that_never_came_is_fenced_at_once_and_stays_out(target: Writer, writer: Peer) -> None:
    assert target.endpoint.fence(writer.descriptor, LIFE)
    refusal = writer.ask("connect", target.endpoint.export().hex())
    assert "welcome" in refusal
    writer.ask("live", LIFE + 1)
    assert isinstance(writer.ask("connect", target.endpoint.export().hex()), int), "its next life is welcome"
    assert target.endpoint.fence(writer.descriptor, LIFE), "and is not held against the one before"
    assert not target.endpoint.fence(writer.descriptor, LIFE + 1)


def test_one_that_is_stopped_is_not_fenced_until_it_is_killed(target: Writer, writer: Peer) -> None:
    peer = writer.ask("connect", target.endpoint.export().hex())
    writer.ask("fill", 3)
    assert writer.ask("write", peer) == "done"
    assert (target.pool == 3).all() or not target.endpoint.capabilities.moves_bytes
    assert not target.endpoint.fence(writer.descriptor, LIFE)
    writer.stop()
    assert not target.endpoint.fence(writer.descriptor, LIFE)
    writer.resume()
    writer.ask("fill", 4)
    assert writer.ask("write", peer) == "done", "it does go on to write"
    assert (target.pool == 4).all() or not target.endpoint.capabilities.moves_bytes
    writer.stop()
    assert not target.endpoint.fence(writer.descriptor, LIFE)
    writer.kill()
    wait_until(lambda: target.endpoint.fence(writer.descriptor, LIFE))


def test_one_that_disconnected_is_fenced(target: Writer, writer: Peer) -> None:
    peer = writer.ask("connect", target.endpoint.export().hex())
    writer.ask("write", peer)
    writer.ask("disconnect", peer)
    wait_until(lambda: target.endpoint.fence(writer.descriptor, LIFE))


def test_foreign_descriptors_cannot_be_fenced(target: Writer) -> None:
    with pytest.raises(TransferError):
        target.endpoint.fence(b"nonsense", 1)
