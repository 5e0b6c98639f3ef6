"""The hand-over files at the edges of a hand-over: when a writer is quiet, and when pages are free.

The transfer backend here does what it is told: writes end when the test says so, and a fence opens on its word.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from common.engine.messages import Sampling, SequenceFailed
from common.errors.base import MeshError, Reason
from common.kvcache.audit import Auditor
from common.kvcache.ledger import PageState
from common.mesh.ticket import Ticket
from common.transfer.base import Capabilities, Completion, Handle, HandleState, PeerId, Run, TransferError
from common.worker.messages import (
    RankReservation,
    Registered,
    RoomEnded,
    RoomFailed,
    RoomFenced,
    RoomQuiet,
    RoomReleased,
    RoomReserved,
    StartSequence,
)
from services.decode.handover import DecodeHandover
from services.prefill.handover import PrefillHandover
from tests.toys import toy_engine

pytestmark = pytest.mark.unit

TICKET = Ticket("r", 1, 7)
START = StartSequence(1, "q", TICKET, [5, 6, 7, 8, 9, 10], Sampling(max_new_tokens=4, temperature=0.0))
RESERVED = RoomReserved(TICKET, (RankReservation(0, "scripted", b"decode", ((3, 2),)),))
ENDED = RoomEnded(TICKET, "ABORTED", "no longer wanted")


class Scripted:
    """A transfer backend without an engine."""

    name = "scripted"
    capabilities = Capabilities()

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.completions: list[Completion] = []
        self.gone: set[bytes] = set()
        self.unreachable = False
        self.noisy: set[Handle] = set()
        self.full = False
        self._handles = itertools.count(1)

    def export(self) -> bytes:
        return b"me"

    def connect(self, descriptor: bytes) -> PeerId:
        self.calls.append(("connect", descriptor))
        if self.unreachable:
            raise TransferError("not welcome")
        return PeerId(1)

    def accepts(self, peer: PeerId, key: int = 0) -> bool:
        return not self.full

    def cancel(self, handle: Handle) -> None:
        self.calls.append(("cancel", handle))

    def quiet(self, handle: Handle) -> bool:
        return handle not in self.noisy

    def live(self, epoch: int) -> None:
        self.calls.append(("live", epoch))

    def fence(self, descriptor: bytes, epoch: int) -> bool:
        self.calls.append(("fence", descriptor, epoch))
        return descriptor in self.gone

    def submit(self, peer: PeerId, runs: Sequence[Run], timeout_s: float, key: int = 0) -> Handle:
        handle = Handle(next(self._handles))
        self.calls.append(("submit", handle))
        return handle

    def notify(self, peer: PeerId, payload: bytes) -> None:
        self.calls.append(("notify", peer))

    def poll(self) -> list[Completion]:
        completions, self.completions = self.completions, []
        return completions

    def received(self) -> list[bytes]:
        return []

    def allocate(self, nbytes: int) -> memoryview:
        return memoryview(bytearray(nbytes))

    def register(self, address: int, nbytes: int) -> None:
        self.calls.append(("register", address))

    def close(self) -> None:
        self.noisy.clear()


class Side:
    """A hand-over with a toy engine."""

    def __init__(self, make: Callable[..., Any]) -> None:
        self.backend = Scripted()
        self.engine = toy_engine(num_pages=16, decode_prealloc_high_water=1)
        self.said: list[Any] = []
        self.handover = make(self.engine, self.backend, self.said.append)
        self.auditor = Auditor(self.engine.allocator.ledger)

    def has_said(self, kind: type) -> bool:
        return any(isinstance(message, kind) for message in self.said)

    def count(self, state: PageState) -> int:
        audit = self.auditor.run([*self.engine.claims(), *self.handover.claims()])
        assert (audit.leaked_pages, audit.disputed_pages) == (0, 0)
        return self.engine.allocator.ledger.count(state)


@pytest.fixture
def prefill() -> Iterator[Side]:
    side = Side(lambda engine, backend, emit: PrefillHandover(engine, backend, emit, 30.0))
    yield side
    side.handover.close()


@pytest.fixture
def decode() -> Iterator[Side]:
    side = Side(DecodeHandover)
    side.handover.start(START)
    yield side
    side.handover.close()


def write(side: Side) -> Handle:
    """Compute the prompt; its pages are on their way when this returns."""
    side.handover.start(START)
    side.handover.on_message(RESERVED)
    side.handover.on_step(side.engine.step())
    [(_, handle)] = [call for call in side.backend.calls if call[0] == "submit"]
    return Handle(handle)


@pytest.mark.parametrize("ends_first", [True, False])
def test_a_write_that_failed_is_quiet_only_when_the_backend_says_so(prefill: Side, ends_first: bool) -> None:
    """Its bytes may still land; also those of a room that had ended before."""
    handle = write(prefill)
    if ends_first:
        prefill.handover.on_message(ENDED)
        assert not prefill.has_said(RoomQuiet), "a write is under way"
        assert ("cancel", handle) in prefill.backend.calls
    prefill.backend.noisy.add(handle)
    prefill.backend.completions.append(Completion(handle, HandleState.FAILED, "too late"))
    for _ in range(3):
        prefill.handover.poll()
    assert not prefill.has_said(RoomQuiet)
    assert prefill.count(PageState.QUARANTINED) == 1, "its own page may still be read"
    assert prefill.engine.pages.num_shared == 1, "and so may the one that it has cached"
    prefill.backend.noisy.clear()
    prefill.handover.poll()
    assert prefill.has_said(RoomQuiet)
    assert prefill.count(PageState.FREE) + prefill.count(PageState.CACHED) == 16
    assert prefill.has_said(RoomFailed) is not ends_first
    assert sum(isinstance(message, SequenceFailed) for message in prefill.said) == 1


def test_a_write_that_ends_well_after_its_room_is_quiet(prefill: Side) -> None:
    handle = write(prefill)
    prefill.handover.on_message(ENDED)
    prefill.backend.completions.append(Completion(handle, HandleState.DONE, nbytes=64, descriptors=1))
    prefill.handover.poll()
    quiet = prefill.said[-1]
    assert isinstance(quiet, RoomQuiet)
    assert quiet.ticket == TICKET
    assert quiet.transfer, "what had been written is told"
    assert (quiet.transfer.nbytes, quiet.transfer.descriptors) == (64, 1)
    assert not any(call[0] == "notify" for call in prefill.backend.calls)


def test_pages_wait_while_their_queue_is_full_and_no_room_begins(prefill: Side) -> None:
    prefill.backend.full = True
    prefill.handover.start(START)
    prefill.handover.on_message(RESERVED)
    assert not prefill.engine.has_work, "it would compute what cannot leave"
    prefill.backend.full = False
    prefill.handover.poll()
    assert prefill.engine.has_work
    prefill.backend.full = True
    prefill.handover.on_step(prefill.engine.step())
    prefill.handover.poll()
    assert not any(call[0] == "submit" for call in prefill.backend.calls)
    prefill.backend.full = False
    prefill.handover.poll()
    [(_, handle)] = [call for call in prefill.backend.calls if call[0] == "submit"]
    prefill.backend.completions.append(Completion(handle, HandleState.DONE))
    prefill.handover.poll()
    assert ("notify", 1) in prefill.backend.calls
    assert prefill.count(PageState.FREE) + prefill.count(PageState.CACHED) == 16


def test_a_room_that_ends_while_its_pages_wait_is_quiet_at_once(prefill: Side) -> None:
    prefill.handover.start(START)
    prefill.handover.on_message(RESERVED)
    prefill.backend.full = True
    prefill.handover.on_step(prefill.engine.step())
    prefill.handover.on_message(ENDED)
    assert prefill.has_said(RoomQuiet)
    prefill.backend.full = False
    prefill.handover.poll()
    assert not any(call[0] == "submit" for call in prefill.backend.calls)
    assert prefill.count(PageState.FREE) + prefill.count(PageState.CACHED) == 16


def test_a_reservation_is_connected_in_the_life_in_which_it_came(prefill: Side) -> None:
    prefill.handover.on_message(Registered(8))
    prefill.handover.on_message(RESERVED)
    prefill.handover.on_message(Registered(9))
    prefill.handover.start(START)
    prefill.handover.on_message(RESERVED)  # said once more
    assert prefill.backend.calls == [("live", 8), ("connect", b"decode"), ("live", 9)]


def test_a_decode_worker_that_cannot_be_reached_fails_its_room_before_the_prompt(prefill: Side) -> None:
    prefill.backend.unreachable = True
    prefill.handover.on_message(RESERVED)
    assert prefill.said == [RoomFailed(TICKET, Reason.TRANSFER_FAILED, "not welcome"), RoomQuiet(TICKET)]
    with pytest.raises(MeshError, match="not welcome"):
        prefill.handover.start(START)


def test_pages_of_a_lost_writer_are_free_when_all_its_endpoints_are_gone(decode: Side) -> None:
    assert decode.count(PageState.RESERVED) == 2
    decode.handover.on_message(ENDED)
    decode.handover.on_message(RoomReleased(TICKET, (b"rank 0", b"rank 1"), 8))
    assert decode.backend.calls == [("fence", b"rank 0", 8), ("fence", b"rank 1", 8)], "both are barred at once"
    decode.backend.gone.add(b"rank 1")
    decode.handover.poll()
    assert decode.count(PageState.QUARANTINED) == 2
    assert decode.handover.pending
    decode.backend.gone.add(b"rank 0")
    decode.handover.poll()
    assert decode.count(PageState.FREE) == 16
    assert decode.said[-1] == RoomFenced(TICKET)
    assert not decode.handover.pending
    decode.handover.on_message(RoomReleased(TICKET))  # said once more


def test_a_lost_writer_that_comes_back_and_is_quiet_need_not_be_gone(decode: Side) -> None:
    decode.handover.on_message(ENDED)
    decode.handover.on_message(RoomReleased(TICKET, (b"rank 0",), 8))
    decode.handover.on_message(RoomReleased(TICKET))
    assert decode.count(PageState.FREE) == 16
    assert not decode.has_said(RoomFenced)


def test_a_room_that_is_not_here_waits_for_no_writer(decode: Side) -> None:
    """It was adopted before its writer was lost, or this process was started in the place of another."""
    other = Ticket("other", 1, 7)
    decode.handover.on_message(RoomReleased(other, (b"rank 0",), 8))
    assert decode.said[-1] == RoomFenced(other)


def test_a_release_that_comes_before_the_end_frees_nothing(decode: Side) -> None:
    decode.handover.on_message(RoomReleased(TICKET))
    assert decode.count(PageState.RESERVED) == 2
