"""Queues that are full, peers that are gone for a while or for ever, and writes that fail: for every backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from common.transfer import channel, endpoint, peers, registry
from common.transfer.base import Handle, HandleState, PeerId, Run, TransferConfig, TransferError
from common.transfer.endpoint import QUEUE_DEPTH
from common.transfer.local import LocalEndpoint
from common.transfer.sender import GiveUp, Writer
from tests.contract.transfer_ends import BOUND_S, PAGE, WHOLE, Peer, resources, wait_until
from tests.contract.transfer_ends import Writer as End

pytestmark = [pytest.mark.contract, pytest.mark.fault]


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "HANDSHAKE_TIMEOUT_S", 0.5)
    monkeypatch.setattr(endpoint, "UNANSWERED_S", 0.5)
    monkeypatch.setattr(endpoint, "_PING_S", 0.1)
    monkeypatch.setattr(endpoint, "_TICK_S", 0.05)
    monkeypatch.setattr(peers, "PROBE_FIRST_S", 0.05)
    monkeypatch.setattr(peers, "PROBE_MOST_S", 0.2)
    monkeypatch.setenv("MC_TRANSFER_TIMEOUT", "5")
    monkeypatch.setenv("MC_TCP_PROGRESS_TIMEOUT_SEC", "2")


@pytest.fixture(params=registry.NAMES)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name: str = request.param
    if name == "nixl":  # its same-host copies would go on into a stopped process, as the local backend's do
        monkeypatch.setenv("UCX_TLS", "tcp")
    if reason := registry.available()[name]:
        pytest.skip(reason)
    return name


@pytest.fixture
def peer(start_peer: Callable[[], Peer]) -> Peer:
    return start_peer()


@pytest.fixture
def writer(backend: str) -> Iterator[End]:
    made = End(backend)
    yield made
    made.endpoint.close()


def reconnected(writer: End, descriptor: bytes) -> PeerId:
    """As soon as a probe has found the peer."""
    found: list[PeerId] = []

    def tried() -> bool:
        try:
            found.append(writer.endpoint.connect(descriptor))
        except TransferError:
            return False
        return True

    wait_until(tried)
    return found[0]


@pytest.mark.flaky(reruns=0)
def test_a_queue_is_bounded_and_what_is_cancelled_leaves_it(
    writer: End, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing leaves while the peer has not welcomed us."""
    monkeypatch.setattr(channel, "HANDSHAKE_TIMEOUT_S", BOUND_S)
    peer.stop()
    reached = writer.endpoint.connect(peer.descriptor)
    handles = [
        writer.endpoint.submit(reached, [Run(0, page * PAGE, PAGE)], BOUND_S, key=4) for page in range(QUEUE_DEPTH)
    ]
    assert not writer.endpoint.accepts(reached, key=4)
    assert not writer.endpoint.accepts(reached, key=0), "there are four queues"
    assert writer.endpoint.accepts(reached, key=1)
    with pytest.raises(TransferError, match="wait in this queue already"):
        writer.endpoint.submit(reached, WHOLE, BOUND_S)
    writer.endpoint.cancel(handles[5])
    writer.endpoint.cancel(handles[5])
    (cancelled,) = writer.wait()
    assert (cancelled.handle, cancelled.state, cancelled.error) == (handles[5], HandleState.FAILED, "it was cancelled")
    assert writer.endpoint.quiet(handles[5])
    assert not writer.endpoint.quiet(handles[6])
    assert writer.endpoint.accepts(reached, key=4)
    writer.pool[:PAGE] = 9
    peer.resume()
    ended = writer.wait(QUEUE_DEPTH - 1)
    assert {completion.handle: completion.state for completion in ended} == dict.fromkeys(
        handles[:5] + handles[6:], HandleState.DONE
    )
    assert [completion.handle for completion in ended] == handles[:5] + handles[6:], "in their order"
    assert all(completion.seconds >= completion.queued_s for completion in ended)
    if writer.endpoint.capabilities.moves_bytes:
        assert peer.ask("count", 9) == (QUEUE_DEPTH - 1) * PAGE


def test_a_peer_that_does_not_answer_is_probed_and_comes_back_by_itself(writer: End, peer: Peer) -> None:
    peer.stop()
    reached = writer.endpoint.connect(peer.descriptor)
    writer.endpoint.notify(reached, b"lost with the connection")
    assert "did not welcome us" in writer.refusal(reached)
    with pytest.raises(TransferError, match=r"did not welcome us.*; it is tried again in \d+\.\d s"):
        writer.endpoint.connect(peer.descriptor)
    peer.resume()
    again = reconnected(writer, peer.descriptor)
    assert again != reached
    writer.write_well(again, WHOLE)
    with pytest.raises(TransferError, match="no peer"):
        writer.endpoint.submit(reached, WHOLE, BOUND_S)


def test_a_peer_that_stops_answering_fails_its_transfers(writer: End, peer: Peer, backend: str) -> None:
    if backend in ("local", "emulated"):
        pytest.skip("its writes need nothing of the peer's process")
    reached = writer.endpoint.connect(peer.descriptor)
    writer.write_well(reached, [Run(0, 0, PAGE)])
    peer.stop()
    handles = {writer.endpoint.submit(reached, WHOLE, BOUND_S, key) for key in range(6)}
    ended = writer.wait(len(handles))
    assert {completion.handle for completion in ended} == handles
    failed = [completion.error for completion in ended if completion.state is HandleState.FAILED]
    assert any("has not answered for 0.5 s" in error for error in failed), failed
    assert all("has not answered" in error or "Mooncake gave up" in error for error in failed), failed
    peer.resume()
    wait_until(lambda: all(writer.endpoint.quiet(handle) for handle in handles))
    writer.write_well(reconnected(writer, peer.descriptor), WHOLE)


def test_one_write_that_fails_harms_no_other(
    writer: End, peer: Peer, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here by its time."""
    if backend in ("local", "emulated"):
        pytest.skip("its writes need nothing of the peer's process")
    monkeypatch.setattr(endpoint, "UNANSWERED_S", BOUND_S)
    reached = writer.endpoint.connect(peer.descriptor)
    writer.write_well(reached, [Run(0, 0, PAGE)])
    peer.stop()
    late = writer.endpoint.submit(reached, WHOLE, 0.3, key=1)
    others = {writer.endpoint.submit(reached, WHOLE, BOUND_S, key) for key in (1, 2)}
    (failed,) = writer.wait()
    assert (failed.handle, failed.state) == (late, HandleState.FAILED)
    assert "did not end within 0.3 s" in failed.error
    peer.resume()
    ended = writer.wait(2)
    assert {completion.handle: completion.state for completion in ended} == dict.fromkeys(others, HandleState.DONE)
    assert writer.endpoint.connect(peer.descriptor) == reached, "it is healthy"
    wait_until(lambda: writer.endpoint.quiet(late))


def test_peers_that_are_gone_leave_nothing_behind(
    backend: str, writer: End, start_peer: Callable[[], Peer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No mapping, socket or thread, without anybody's `disconnect`."""
    lasting = start_peer()
    writer.write_well(writer.endpoint.connect(lasting.descriptor), WHOLE)

    def come_and_go() -> None:
        mortal = start_peer()
        writer.write_well(writer.endpoint.connect(mortal.descriptor), WHOLE)
        mortal.cleanup()

    def mappings() -> int:
        return Path("/proc/self/maps").read_text().count("pdmesh-pool")

    come_and_go()
    wait_until(lambda: len(writer.endpoint._peers.all()) == 1)  # type: ignore[attr-defined]
    before, mapped = resources(), mappings()
    come_and_go()
    wait_until(lambda: resources() <= before and mappings() <= mapped)
    monkeypatch.setattr(peers, "PROBE_FOR_S", 0.0)
    wait_until(lambda: len(writer.endpoint._peers._targets) == 1)  # type: ignore[attr-defined]


# ------------------------------------------------------------------- the same code for all backends


class _Refusing:
    """An engine that writes nothing."""

    parallel = False

    def write(self, pieces: object, give_up: GiveUp) -> None:
        raise TransferError("the engine is broken")

    def close(self) -> None:
        """Nothing to free."""


def test_writes_that_keep_failing_cost_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    target = registry.create("local", TransferConfig(), lambda: None)
    target.allocate(1 << 21)
    writer = End("local")
    try:
        reached = writer.endpoint.connect(target.export())
        runs = [Run(0, 0, PAGE)]
        with monkeypatch.context() as broken:
            refusing: Writer = _Refusing()
            broken.setattr(LocalEndpoint, "_open_writer", lambda *_: refusing)
            for _ in range(peers.STRIKES):
                assert writer.write(reached, runs).error == "the engine is broken"
            wait_until(lambda: "no peer" in writer.refusal(reached) or "in a row" in writer.refusal(reached))
        writer.write_well(reconnected(writer, target.export()), runs)
    finally:
        writer.endpoint.close()
        target.close()


def test_a_good_write_between_bad_ones_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    target = registry.create("local", TransferConfig(), lambda: None)
    target.allocate(1 << 21)
    writer = End("local")
    try:
        reached = writer.endpoint.connect(target.export())
        handles: list[Handle] = []
        monkeypatch.setattr(_Refusing, "write", lambda self, pieces, give_up: self.next())
        outcomes = iter([TransferError("no"), TransferError("no"), None] * 4)

        def act(self: object) -> None:
            if outcome := next(outcomes):
                raise outcome

        monkeypatch.setattr(_Refusing, "next", act, raising=False)
        monkeypatch.setattr(LocalEndpoint, "_open_writer", lambda *_: _Refusing())
        for turn in range(12):
            handles.append(writer.endpoint.submit(reached, [Run(0, 0, PAGE)], BOUND_S))
            (ended,) = writer.wait()
            assert (ended.state is HandleState.DONE) == (turn % 3 == 2)
        assert writer.endpoint.connect(target.export()) == reached
    finally:
        writer.endpoint.close()
        target.close()


def test_probes_grow_apart_up_to_a_bound_and_never_in_step() -> None:
    target = peers.Target(peers.Descriptor("local", b"", "", 0, b""))
    waits = []
    for turn in range(12):
        peers._down(target, "gone", float(turn))
        waits.append(target.probe_at - turn)
    assert all(0.75 * 0.05 <= wait <= 1.25 * 0.2 for wait in waits)
    assert waits[2] > waits[0]
    assert len(set(waits)) == len(waits)
    assert target.down_since == 0.0, "since the first"
