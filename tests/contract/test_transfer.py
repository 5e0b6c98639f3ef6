"""The contract of the transfer seam: every backend passes it, between real processes."""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from common.transfer import registry
from common.transfer.base import (
    Handle,
    HandleState,
    Run,
    TransferConfig,
    TransferError,
    no_wake,
)
from common.transfer.channel import MAX_PAYLOAD_BYTES
from common.transfer.endpoint import QUEUE_DEPTH
from common.transfer.peers import Descriptor
from common.transfer.runs import coalesce
from tests.contract.transfer_ends import (
    BOUND_S,
    PAGE,
    PAGES,
    POOL,
    TIMEOUT_S,
    WHOLE,
    Peer,
    Writer,
    digest,
    is_mapped,
    listeners,
    resources,
    wait_until,
)

pytestmark = pytest.mark.contract


@pytest.fixture(scope="module", autouse=True)
def _short_timeouts() -> Iterator[None]:
    """Mooncake's own clock decides how long a disconnect from a stopped peer takes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MC_TRANSFER_TIMEOUT", "5")
        patch.setenv("MC_TCP_PROGRESS_TIMEOUT_SEC", "2")
        yield


@pytest.fixture(scope="module", params=registry.NAMES)
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    try:
        registry.create(name, TransferConfig(), no_wake).close()
    except TransferError as error:
        pytest.skip(str(error))
    return name


@pytest.fixture
def _moves_bytes(backend: str) -> None:
    """For tests that look at bytes: the emulated backend's are none."""
    if backend == "emulated":
        pytest.skip("nothing is moved")


@pytest.fixture(scope="module")
def lasting_peer(backend: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
    peer = Peer(backend, tmp_path_factory.mktemp("peer"))
    yield peer
    peer.cleanup()


@pytest.fixture
def peer(lasting_peer: Peer) -> Peer:
    """A peer that several tests write to, zeroed; no test may harm it."""
    lasting_peer.ask("fill", 0)
    return lasting_peer


@pytest.fixture
def writer(backend: str) -> Iterator[Writer]:
    made = Writer(backend)
    yield made
    made.endpoint.close()


# ------------------------------------------------------------------------------------------------ bytes


def test_pool_is_zeroed_and_aligned(writer: Writer) -> None:
    assert writer.pool.ctypes.data % (2 << 20) == 0
    other = registry.create(writer.endpoint.name, TransferConfig(), no_wake)
    try:
        assert not np.frombuffer(other.allocate(POOL), dtype=np.uint8).any()
        with pytest.raises(TransferError, match="has its pool already"):
            other.allocate(POOL)
    finally:
        other.close()


@pytest.mark.usefixtures("_moves_bytes")
def test_whole_pool_arrives(writer: Writer, peer: Peer) -> None:
    reached = writer.endpoint.connect(peer.descriptor)
    completion = writer.write(reached, WHOLE)
    assert (completion.state, completion.error) == (HandleState.DONE, "")
    assert completion.seconds >= completion.queued_s > 0
    assert (completion.nbytes, completion.descriptors) == (POOL, 1)
    assert peer.ask("digest") == digest(writer.pool)


@pytest.mark.usefixtures("_moves_bytes")
def test_scattered_pages_arrive_and_nothing_else(writer: Writer, peer: Peer) -> None:
    reached = writer.endpoint.connect(peer.descriptor)
    random = np.random.default_rng(1)
    count = PAGES // 2
    source, target = random.permutation(PAGES)[:count], random.permutation(PAGES)[:count]
    expected = np.zeros_like(writer.pool).reshape(PAGES, PAGE)
    expected[target] = writer.pool.reshape(PAGES, PAGE)[source]
    writer.write_well(reached, coalesce(source.tolist(), target.tolist(), PAGE))
    assert peer.ask("digest") == digest(expected)


@pytest.mark.usefixtures("_moves_bytes")
def test_unaligned_runs_and_no_runs(writer: Writer, peer: Peer) -> None:
    reached = writer.endpoint.connect(peer.descriptor)
    runs = [Run(3, 1, 5), Run(POOL - 1, POOL - 1, 1), Run(100_001, 200_003, 70_007)]
    expected = np.zeros_like(writer.pool)
    for run in runs:
        part = writer.pool[run.local_offset : run.local_offset + run.nbytes]
        expected[run.remote_offset : run.remote_offset + run.nbytes] = part
    writer.write_well(reached, runs)
    writer.write_well(reached, [])
    assert peer.ask("digest") == digest(expected)


@pytest.mark.usefixtures("_moves_bytes")
def test_many_handles_to_two_peers_all_end(writer: Writer, start_peer: Callable[[], Peer]) -> None:
    peers = [start_peer(), start_peer()]
    reached = [writer.endpoint.connect(peer.descriptor) for peer in peers]
    assert reached[0] != reached[1]
    handles: set[Handle] = set()
    for page in range(64):
        run = Run(page * PAGE, page * PAGE, PAGE)
        handles |= {writer.endpoint.submit(peer, [run], TIMEOUT_S, key=page) for peer in reached}
    ended = writer.wait(len(handles))
    assert {completion.handle for completion in ended} == handles
    assert {completion.state for completion in ended} == {HandleState.DONE}
    expected = np.zeros_like(writer.pool)
    expected[: 64 * PAGE] = writer.pool[: 64 * PAGE]
    assert [peer.ask("digest") for peer in peers] == [digest(expected)] * 2


@pytest.mark.parametrize(
    "run",
    [Run(-1, 0, 8), Run(0, -1, 8), Run(0, 0, 0), Run(0, 0, -8), Run(1, 0, POOL), Run(0, 1, POOL), Run(0, 1 << 70, 8)],
    ids=str,
)
def test_runs_outside_the_pools_are_refused(run: Run) -> None:
    """The check is the same code for all backends and needs no peer process."""
    ends = [registry.create("local", TransferConfig(), no_wake) for _ in range(2)]
    try:
        for end in ends:
            end.allocate(POOL)
        peer = ends[0].connect(ends[1].export())
        with pytest.raises(TransferError, match="outside the pools"):
            ends[0].submit(peer, [Run(0, 0, 8), run], TIMEOUT_S)
        assert ends[0].poll() == []
    finally:
        for end in ends:
            end.close()


@pytest.mark.usefixtures("_moves_bytes")
def test_refused_run_harms_nothing(writer: Writer, peer: Peer) -> None:
    reached = writer.endpoint.connect(peer.descriptor)
    with pytest.raises(TransferError, match="outside the pools"):
        writer.endpoint.submit(reached, [Run(0, PAGE, POOL)], TIMEOUT_S)
    writer.write_well(reached, WHOLE)
    assert peer.ask("digest") == digest(writer.pool)


# ---------------------------------------------------------------------------------------- notifications


@pytest.mark.usefixtures("_moves_bytes")
def test_notification_comes_after_its_bytes_and_in_order(writer: Writer, peer: Peer) -> None:
    reached = writer.endpoint.connect(peer.descriptor)
    pages = 100
    writer.pool.reshape(PAGES, PAGE)[:pages] = np.arange(1, pages + 1, dtype=np.uint8)[:, None]
    peer.tell("watch", pages, PAGE)
    for page in range(pages):
        writer.write_well(reached, [Run(page * PAGE, page * PAGE, PAGE)])
        writer.endpoint.notify(reached, bytes([page]))
    assert peer.answer() == [[page, page + 1, page + 1] for page in range(pages)]


def test_notifications_of_all_sizes(writer: Writer, peer: Peer) -> None:
    reached = writer.endpoint.connect(peer.descriptor)
    payloads = [b"", b"x", os.urandom(MAX_PAYLOAD_BYTES)] * 20
    for payload in payloads:
        writer.endpoint.notify(reached, payload)
    assert peer.ask("receive", len(payloads)) == [payload.hex() for payload in payloads]
    with pytest.raises(TransferError, match="longer than"):
        writer.endpoint.notify(reached, bytes(MAX_PAYLOAD_BYTES + 1))


# ------------------------------------------------------------------------------------------ descriptors


def test_connecting_twice_gives_the_same_peer(writer: Writer, peer: Peer) -> None:
    first = writer.endpoint.connect(peer.descriptor)
    assert writer.endpoint.connect(peer.descriptor) == first
    writer.endpoint.disconnect(first)
    again = writer.endpoint.connect(peer.descriptor)
    assert again != first
    writer.write_well(again, WHOLE)
    with pytest.raises(TransferError, match="no peer"):
        writer.endpoint.submit(first, WHOLE, TIMEOUT_S)


def test_foreign_descriptors_are_refused(writer: Writer, peer: Peer) -> None:
    good = peer.descriptor
    with pytest.raises(TransferError, match="not a transfer descriptor"):
        writer.endpoint.connect(b"")
    with pytest.raises(TransferError, match="not a transfer descriptor"):
        writer.endpoint.connect(os.urandom(len(good)))
    with pytest.raises(TransferError, match="damaged"):
        writer.endpoint.connect(good[:-1])
    read = Descriptor.decode(good)
    with pytest.raises(TransferError, match="transfer backend is other"):
        writer.endpoint.connect(msgspec.structs.replace(read, backend="other").encode())
    stranger = writer.endpoint.connect(msgspec.structs.replace(read, incarnation=os.urandom(16)).encode())
    assert re.search("did not welcome us|no peer", writer.refusal(stranger))


# ------------------------------------------------------------------------------------------------ faults


@pytest.mark.fault
def test_killed_peer_fails_its_handles_and_can_be_replaced(writer: Writer, start_peer: Callable[[], Peer]) -> None:
    peer = start_peer()
    reached = writer.endpoint.connect(peer.descriptor)
    writer.write_well(reached, WHOLE)
    handles = {writer.endpoint.submit(reached, WHOLE, BOUND_S, key) for key in range(4 * QUEUE_DEPTH)}
    started = time.monotonic()
    peer.kill()
    ended = writer.wait(len(handles))
    assert time.monotonic() - started < BOUND_S / 2
    assert {completion.handle for completion in ended} == handles
    assert all(completion.error for completion in ended if completion.state == HandleState.FAILED)

    wait_until(lambda: all(writer.endpoint.quiet(handle) for handle in handles))
    for call in (
        lambda: writer.endpoint.submit(reached, WHOLE, TIMEOUT_S),
        lambda: writer.endpoint.notify(reached, b"are you there"),
        lambda: writer.endpoint.connect(peer.descriptor),
    ):
        with pytest.raises(TransferError, match=r"gone|cannot be reached|welcome"):
            call()
    assert writer.endpoint.accepts(reached), "who asks is told by `submit`"
    writer.endpoint.disconnect(reached)

    restarted = start_peer()
    again = writer.endpoint.connect(restarted.descriptor)
    writer.write_well(again, WHOLE)
    if writer.endpoint.capabilities.moves_bytes:
        assert restarted.ask("digest") == digest(writer.pool)


@pytest.fixture
def _copies_need_the_peer(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """NIXL's same-host copies go on into a stopped process as the local backend's do; over TCP they cannot."""
    if backend == "nixl":
        monkeypatch.setenv("UCX_TLS", "tcp")


@pytest.mark.fault
@pytest.mark.usefixtures("_copies_need_the_peer")
def test_stopped_peer_fails_by_the_deadline_and_disconnect_fences_it(
    start_peer: Callable[[], Peer], writer: Writer, backend: str
) -> None:
    peer = start_peer()
    reached = writer.endpoint.connect(peer.descriptor)
    writer.pool[:] = 1
    writer.write_well(reached, [Run(0, 0, PAGE)])
    peer.stop()
    scattered = [Run(page * PAGE, page * PAGE, PAGE) for page in range(0, PAGES, 2)]
    completion = writer.write(reached, scattered, timeout_s=1.0)
    if backend in ("local", "emulated"):  # shared memory needs nothing of the peer's process, and nothing less
        assert completion.state == HandleState.DONE
    else:
        assert completion.state == HandleState.FAILED
        assert "did not end within 1 s" in completion.error
    writer.endpoint.disconnect(reached)
    writer.pool[:] = 99  # whatever is written from now on shows
    peer.resume()
    reached = writer.endpoint.connect(peer.descriptor)
    writer.pool[:PAGE] = 2
    writer.write_well(reached, [Run(0, PAGE, PAGE)])
    writer.endpoint.notify(reached, b"done")
    assert peer.ask("receive", 1) == [b"done".hex()]
    if backend == "emulated":
        return
    assert peer.ask("count", 2) == PAGE
    assert peer.ask("count", 99) == 0


@pytest.mark.fault
def test_stopped_peer_cannot_be_connected(tmp_path: Path) -> None:
    """The hand-shake is the same code for all backends, and this takes its whole time-out."""
    peer = Peer("local", tmp_path)
    writer = Writer("local")
    try:
        peer.stop()
        assert "did not welcome us" in writer.refusal(writer.endpoint.connect(peer.descriptor))
    finally:
        writer.endpoint.close()
        peer.cleanup()


@pytest.mark.fault
def test_disconnect_ends_what_is_under_way(writer: Writer, peer: Peer) -> None:
    reached = writer.endpoint.connect(peer.descriptor)
    handles = {writer.endpoint.submit(reached, WHOLE, TIMEOUT_S, key) for key in range(50)}
    writer.endpoint.disconnect(reached)
    writer.endpoint.disconnect(reached)
    ended = writer.wait(len(handles))
    assert {completion.handle for completion in ended} == handles
    assert ended[-1].state == HandleState.FAILED
    assert "disconnected" in ended[-1].error


# -------------------------------------------------------------------------------------------------- end


def test_close_is_idempotent_and_ends_handles(writer: Writer, start_peer: Callable[[], Peer]) -> None:
    peer = start_peer()
    reached = writer.endpoint.connect(peer.descriptor)
    handle = writer.endpoint.submit(reached, WHOLE, TIMEOUT_S)
    writer.endpoint.close()
    writer.endpoint.close()
    writer.endpoint.disconnect(reached)
    assert [completion.handle for completion in writer.endpoint.poll()] == [handle]
    writer.pool[:] = 0  # the pool stays mapped
    for call in (
        lambda: writer.endpoint.submit(reached, WHOLE, TIMEOUT_S),
        lambda: writer.endpoint.connect(peer.descriptor),
        lambda: writer.endpoint.notify(reached, b""),
        writer.endpoint.export,
    ):
        with pytest.raises(TransferError, match="closed"):
            call()
    assert peer.ask("close") == ["MainThread"]


def test_names_and_local_import_no_engine() -> None:
    """In a fresh interpreter: other tests may have imported engines."""
    program = (
        "import sys; from common.transfer import registry; from common.transfer.base import *;"
        "assert 'local' in registry.NAMES; registry.create('local', TransferConfig(), no_wake).close();"
        "assert not {'torch', 'nixl', 'mooncake', 'grpc'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_close_before_a_pool(backend: str) -> None:
    endpoint = registry.create(backend, TransferConfig(), no_wake)
    with pytest.raises(TransferError, match="no pool yet"):
        endpoint.export()
    endpoint.close()
    endpoint.close()


def test_threads_and_descriptors_are_back_after_close(backend: str, peer: Peer) -> None:

    def use_once() -> None:
        writer = Writer(backend)
        writer.write_well(writer.endpoint.connect(peer.descriptor), WHOLE)
        writer.endpoint.close()

    use_once()  # what an engine keeps for the process's life is there from now on
    before = resources()
    for _ in range(3):
        use_once()
    wait_until(lambda: resources() <= before)


def test_pool_is_unmapped_when_nobody_refers_to_it(backend: str) -> None:
    writer = Writer(backend)
    start = writer.pool.ctypes.data
    assert is_mapped(start)
    writer.endpoint.close()
    del writer
    gc.collect()
    assert not is_mapped(start)


def test_nothing_would_be_left_in_a_file_system(writer: Writer, start_peer: Callable[[], Peer], tmp_path: Path) -> None:
    peer = start_peer()
    writer.write_well(writer.endpoint.connect(peer.descriptor), WHOLE)
    process = Path("/proc") / str(peer.process.pid)
    names = [os.readlink(link) for link in (process / "fd").iterdir()]
    names += [line.split(maxsplit=5)[5] for line in (process / "maps").read_text().splitlines() if "/" in line]
    names = [name for name in names if not name.endswith("(deleted)")]
    assert [name for name in names if name.startswith(("/dev/shm/", "/tmp/pdmesh"))] == []
    peer.kill()
    assert list(tmp_path.iterdir()) == []


def test_nothing_listens_beyond_loopback(backend: str, peer: Peer) -> None:
    before = {inode for inode, _, _ in listeners()}
    writer = Writer(backend)
    writer.write_well(writer.endpoint.connect(peer.descriptor), WHOLE)
    opened = [(address, device) for inode, address, device in listeners() if inode not in before]
    writer.endpoint.close()
    assert opened or backend == "local"
    assert [(address, device) for address, device in opened if address != "127.0.0.1" and device != "lo"] == []
