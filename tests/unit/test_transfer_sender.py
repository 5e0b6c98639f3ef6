"""The sender pool: order, turns, bounds, and workers that are stuck."""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from common.transfer import sender
from common.transfer.base import Handle, Pieces, TransferError
from common.transfer.sender import GiveUp, Outlet, SenderPool, Transfer

pytestmark = pytest.mark.unit

WAIT_S = 30.0
QUEUES = 2


class Writer:
    """Writes nothing. A part waits for `gate` and fails if its first byte is in `bad`."""

    def __init__(
        self, *, parallel: bool, gate: threading.Event | None = None, bad: frozenset[int] = frozenset()
    ) -> None:
        self.parallel = parallel
        self.gate = gate
        self.bad = bad
        self.wrote: list[int] = []
        self.inside = self.most_inside = 0
        self.closed = False
        self.entered: queue.Queue[int] = queue.Queue()
        self._lock = threading.Lock()

    def write(self, pieces: Pieces, give_up: GiveUp) -> None:
        number = int(pieces[0, 0])
        with self._lock:
            self.inside += 1
            self.most_inside = max(self.most_inside, self.inside)
        self.entered.put(number)
        try:
            assert not self.closed
            if self.gate:
                assert self.gate.wait(WAIT_S)
            if number in self.bad:
                raise TransferError("this one is bad")
            self.wrote.append(number)
        finally:
            with self._lock:
                self.inside -= 1

    def close(self) -> None:
        assert self.inside == 0
        self.closed = True


class Bench:
    """A pool with what it told."""

    def __init__(self, size: int) -> None:
        self.ended: queue.Queue[tuple[Transfer, str]] = queue.Queue()
        self.pool = SenderPool(size, QUEUES, lambda transfer, error: self.ended.put((transfer, error)))
        self.outlets: list[Outlet] = []
        self.closed: queue.Queue[Outlet] = queue.Queue()
        self.handles = itertools.count(1)

    def outlet(self, open_writer: Callable[[], Writer]) -> Outlet:
        outlet = Outlet(self.pool, open_writer, lambda: self.closed.put(outlet))
        self.outlets.append(outlet)
        return outlet

    def put(self, outlet: Outlet, key: int, *parts: int) -> Transfer:
        pieces = deque(np.array([[part, 0, 1]], dtype=np.int64) for part in parts)
        transfer = Transfer(Handle(next(self.handles)), key % QUEUES, WAIT_S, pieces)
        outlet.put(transfer)
        return transfer

    def wait(self, count: int = 1) -> list[tuple[Transfer, str]]:
        return [self.ended.get(timeout=WAIT_S) for _ in range(count)]

    def close(self) -> None:
        for outlet in self.outlets:
            outlet.stop()
        for _ in self.outlets:
            self.closed.get(timeout=WAIT_S)
        self.pool.close()


@pytest.fixture
def make() -> Iterator[Callable[[int], Bench]]:
    made: list[Bench] = []

    def start(size: int) -> Bench:
        made.append(Bench(size))
        return made[-1]

    yield start
    before = {thread for thread in threading.enumerate() if thread.name == "transfer-sender"}
    for bench in made:
        bench.close()
    assert not any(thread.is_alive() for thread in before)


@pytest.mark.parametrize("parallel", [True, False])
def test_a_queue_keeps_its_order_and_every_part_is_written_once(make: Callable[[int], Bench], parallel: bool) -> None:
    bench = make(4)
    writer = Writer(parallel=parallel)
    outlet = bench.outlet(lambda: writer)
    numbers = itertools.count()
    transfers = [bench.put(outlet, key, *itertools.islice(numbers, 3)) for key in (0, 1) * 50]
    ended = bench.wait(len(transfers))
    assert {error for _, error in ended} == {""}
    for key in range(QUEUES):
        assert [transfer for transfer, _ in ended if transfer.queue == key] == transfers[key::QUEUES]
    assert sorted(writer.wrote) == list(range(300))
    assert parallel or writer.most_inside == 1


def test_workers_share_a_transfer_where_the_writer_lets_them(make: Callable[[int], Bench]) -> None:
    bench, gate = make(3), threading.Event()
    writer = Writer(parallel=True, gate=gate)
    bench.put(bench.outlet(lambda: writer), 0, *range(8))
    assert {writer.entered.get(timeout=WAIT_S) for _ in range(3)} == {0, 1, 2}
    gate.set()
    bench.wait()
    assert writer.most_inside == 3


def test_queues_and_peers_take_turns(make: Callable[[int], Bench]) -> None:
    bench, gate = make(1), threading.Event()
    writer = Writer(parallel=True, gate=gate)
    long, other = bench.outlet(lambda: writer), bench.outlet(lambda: writer)
    bench.put(long, 0, *range(10))
    writer.entered.get(timeout=WAIT_S)
    bench.put(long, 1, 100)
    bench.put(other, 0, 200)
    gate.set()
    bench.wait(3)
    assert writer.wrote.index(100) < 4
    assert writer.wrote.index(200) < 4


def test_a_failed_write_closes_its_engine_and_harms_no_other(make: Callable[[int], Bench]) -> None:
    bench = make(2)
    writers: list[Writer] = []

    def open_writer() -> Writer:
        writers.append(Writer(parallel=False, bad=frozenset([1])))
        return writers[-1]

    outlet = bench.outlet(open_writer)
    transfers = [bench.put(outlet, 0, 0), bench.put(outlet, 0, 1, 2), bench.put(outlet, 0, 3)]
    assert bench.wait(3) == list(zip(transfers, ["", "this one is bad", ""], strict=True))
    assert [writer.wrote for writer in writers] == [[0], [3]]
    assert [writer.closed for writer in writers] == [True, False]


def test_what_cannot_be_opened_fails_and_is_tried_again(make: Callable[[int], Bench]) -> None:
    bench, writer = make(1), Writer(parallel=False)
    tries = iter([RuntimeError("no engine today"), writer])

    def open_writer() -> Writer:
        found = next(tries)
        if isinstance(found, Exception):
            raise found
        return found

    outlet = bench.outlet(open_writer)
    first, second = bench.put(outlet, 0, 1), bench.put(outlet, 0, 2)
    [(_, error), well] = bench.wait(2)
    assert "no engine today" in error
    assert well == (second, "")
    assert first.error


def test_what_has_ended_is_not_written_and_what_is_being_written_is_told(make: Callable[[int], Bench]) -> None:
    bench, gate = make(1), threading.Event()
    writer = Writer(parallel=False, gate=gate)
    outlet = bench.outlet(lambda: writer)
    running, waiting = bench.put(outlet, 0, 1, 2), bench.put(outlet, 0, 3)
    writer.entered.get(timeout=WAIT_S)
    running.ended = waiting.ended = True
    assert outlet.is_writing(running)
    assert not outlet.is_writing(waiting)
    gate.set()
    assert bench.wait() == [(running, "")]
    assert not outlet.is_writing(running)
    bench.put(outlet, 0, 4)
    bench.wait()
    assert writer.wrote == [1, 4]


def test_a_stuck_peer_does_not_hold_up_the_others(
    make: Callable[[int], Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender, "STUCK_S", 0.0)
    bench, gate = make(1), threading.Event()
    stuck, healthy = Writer(parallel=False, gate=gate), Writer(parallel=False)
    to_stuck, to_healthy = bench.outlet(lambda: stuck), bench.outlet(lambda: healthy)
    first = bench.put(to_stuck, 0, 1)
    stuck.entered.get(timeout=WAIT_S)
    second = bench.put(to_healthy, 0, 2)
    bench.pool.relieve(time.monotonic() + 1)
    assert bench.wait() == [(second, "")]
    to_stuck.stop()  # does not wait
    gate.set()
    assert bench.wait() == [(first, "")]
    assert bench.closed.get(timeout=WAIT_S) is to_stuck
    assert stuck.closed
    bench.outlets.remove(to_stuck)
    assert len([thread for thread in threading.enumerate() if thread.name == "transfer-sender"]) <= 2


def test_an_outlet_that_was_never_used_closes_at_once(make: Callable[[int], Bench]) -> None:
    bench = make(1)
    outlet = bench.outlet(lambda: Writer(parallel=True))
    outlet.stop()
    outlet.stop()
    assert bench.closed.get_nowait() is outlet
    bench.outlets.remove(outlet)
    assert not [thread for thread in threading.enumerate() if thread.name == "transfer-sender"]
