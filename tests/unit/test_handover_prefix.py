"""The hand-over files with prefix caches: what leaves at once, what is not wanted, and what stays locked how long."""

from __future__ import annotations

from typing import Any

import pytest

from common.engine.messages import Sampling, Tokens
from common.engine.request import Sequence
from common.kvcache.ledger import PageState
from common.mesh.ticket import Ticket
from common.transfer import notice
from common.transfer.base import Completion, HandleState
from common.transfer.notice import HandoverNotice
from common.worker.messages import (
    Prefilled,
    RankReservation,
    RoomEnded,
    RoomQuiet,
    RoomReleased,
    RoomReserved,
    RoomTransferred,
    RoomTransferring,
    StartSequence,
)
from services.decode.handover import DecodeHandover
from services.prefill.handover import PrefillHandover
from tests.toys import greedy
from tests.unit.test_handover_fence import Side

pytestmark = pytest.mark.unit

PAGE = 4
PROMPT = list(range(50, 62))  # three pages
GREEDY = Sampling(max_new_tokens=4, temperature=0.0, ignore_eos=True)


class Both(Side):
    """A side whose backend tells what is to be copied, and brings what the test says."""

    def __init__(self, make: Any) -> None:
        super().__init__(make)
        self.copied: list[list[tuple[int, int]]] = []
        self.payloads: list[bytes] = []
        submit = self.backend.submit

        def note(peer: Any, runs: Any, *rest: Any) -> Any:
            page = self.engine.runner.layout.page_bytes
            pairs = [
                (here // page + i, there // page + i)
                for here, there, nbytes in runs.tolist()
                for i in range(nbytes // page)
            ]
            self.copied.append(pairs)
            return submit(peer, runs, *rest)

        self.backend.submit = note  # type: ignore[method-assign]
        self.backend.received = self.received  # type: ignore[method-assign]

    def received(self) -> list[bytes]:
        payloads, self.payloads = self.payloads, []
        return payloads

    def done(self) -> None:
        """All writes so far have arrived."""
        handles = [call[1] for call in self.backend.calls if call[0] == "submit"]
        pages = sum(map(len, self.copied))
        self.backend.completions += [
            Completion(handle, HandleState.DONE, nbytes=pages, descriptors=1)
            for handle in handles
            if handle in self.handover._by_handle
        ]
        self.handover.poll()

    def step(self) -> None:
        result = self.engine.step()
        self.said += result.tokens
        self.handover.on_step(result)

    def run(self) -> None:
        while self.engine.has_work:
            self.step()

    def keep(self, tokens: list[int]) -> None:
        """Have the pages of `tokens` cached."""
        self.engine.add(Sequence(99, [*tokens, 1], Sampling(max_new_tokens=1, ignore_eos=True)))
        while self.engine.has_work:
            self.engine.step()


@pytest.fixture
def prefill() -> Both:
    return Both(lambda engine, backend, emit: PrefillHandover(engine, backend, emit, 30.0))


@pytest.fixture
def decode() -> Both:
    return Both(DecodeHandover)


def begin(side: Both, number: int = 1, prompt: list[int] = PROMPT) -> Ticket:
    ticket = Ticket(f"r{number}", 1, 7)
    side.handover.start(StartSequence(number, f"q{number}", ticket, prompt, GREEDY))
    side.handover.poll()  # decode looks at what has come, and grants
    return ticket


def reserve(side: Both, ticket: Ticket, extents: tuple[tuple[int, int], ...], from_token: int = 0) -> None:
    rank = RankReservation(0, "scripted", b"decode", extents)
    side.handover.on_message(RoomReserved(ticket, (rank,), from_token))


def test_a_cached_prefix_leaves_with_the_reservation(prefill: Both) -> None:
    prefill.keep(PROMPT[:8])
    ticket = begin(prefill)
    reserve(prefill, ticket, ((5, 3),))
    assert [[there for _, there in pairs] for pairs in prefill.copied] == [[5, 6]]
    assert prefill.has_said(RoomTransferring)
    assert prefill.engine.pages.num_shared == 2, "it is being read"
    prefill.run()
    assert [[there for _, there in pairs] for pairs in prefill.copied] == [[5, 6], [7]]
    prefill.done()
    assert [message.cached_tokens for message in prefill.said if isinstance(message, Prefilled)] == [8]
    assert prefill.engine.allocator.ledger.at_rest
    assert prefill.engine.pages.num_shared == 0


def test_what_was_sent_of_a_prompt_that_waits_may_be_evicted(prefill: Both) -> None:
    """Else prompts that wait would keep the pages that those before them need. It is computed again, not sent again."""
    prefill.keep(PROMPT[:8])
    ticket = begin(prefill)
    reserve(prefill, ticket, ((5, 3),))
    prefill.done()
    assert prefill.engine.pages.num_shared == 0
    prefill.engine.pages.cache.evict(16)  # type: ignore[union-attr]
    assert prefill.engine.load().ledger.cached == 0
    prefill.run()
    assert [[there for _, there in pairs] for pairs in prefill.copied] == [[5, 6], [7]]
    prefill.done()
    assert prefill.has_said(Prefilled)
    assert prefill.engine.allocator.ledger.at_rest


def test_what_an_ended_room_s_writes_may_read_is_kept_until_they_are_quiet(prefill: Both) -> None:
    prefill.keep(PROMPT[:8])
    ticket = begin(prefill)
    reserve(prefill, ticket, ((5, 3),))
    prefill.handover.on_message(RoomEnded(ticket, "ABORTED", "no longer wanted"))
    prefill.engine.pages.cache.evict(16)  # type: ignore[union-attr]
    assert prefill.count(PageState.CACHED) == 2
    assert not prefill.has_said(RoomQuiet)
    prefill.done()
    assert prefill.has_said(RoomQuiet)
    assert prefill.engine.pages.num_shared == 0


@pytest.mark.parametrize("cached", [0, 4, 8])
def test_only_pages_that_are_wanted_are_sent(prefill: Both, cached: int) -> None:
    if cached:
        prefill.keep(PROMPT[:cached])
    ticket = begin(prefill)
    reserve(prefill, ticket, ((7, 1),), from_token=8)
    assert prefill.copied == [], "nothing that is cached is wanted"
    prefill.run()
    assert [[there for _, there in pairs] for pairs in prefill.copied] == [[7]]
    prefill.done()
    assert prefill.has_said(Prefilled)


def test_a_room_that_wants_no_page_gets_its_first_token(prefill: Both) -> None:
    ticket = begin(prefill)
    reserve(prefill, ticket, (), from_token=12)
    prefill.run()
    assert prefill.copied == []
    assert prefill.has_said(Prefilled)
    assert ("notify", 1) in prefill.backend.calls
    assert prefill.engine.allocator.ledger.at_rest


@pytest.mark.parametrize("known", [0, 4, 8, 12])
def test_decode_asks_for_what_it_lacks(decode: Both, known: int) -> None:
    if known:
        decode.keep(PROMPT[:known])
    kept = decode.engine.load().ledger.cached
    ticket = begin(decode)
    (reserved,) = [message for message in decode.said if isinstance(message, RoomReserved)]
    assert reserved.from_token == known
    assert decode.count(PageState.RESERVED) == sum(count for _, count in reserved.ranks[0].extents) == 3 - known // PAGE
    assert decode.engine.pages.num_shared == known // PAGE
    credit = decode.handover.load(decode.engine.load()).credit
    assert credit.pages == 16 - 4, "three pages and one to grow into, whoever has them"

    pages = [*decode.handover._rooms[ticket].shared, *decode.handover._rooms[ticket].pages]
    decode.engine.runner.slots[pages] = [PROMPT[at : at + PAGE] for at in range(0, 12, PAGE)]  # type: ignore[attr-defined]
    decode.payloads.append(notice.encode(HandoverNotice(ticket, 0, 0, greedy(PROMPT, 1)[0])))
    decode.handover.poll()
    assert decode.has_said(RoomTransferred)
    decode.run()
    tokens = [token for message in decode.said if isinstance(message, Tokens) for token in message.token_ids]
    assert tokens == greedy(PROMPT, 4)
    assert decode.count(PageState.CACHED) == max(kept, 3)
    assert decode.engine.allocator.ledger.at_rest
    assert decode.engine.pages.num_shared == 0


def test_a_failed_room_lets_go_of_what_it_shared(decode: Both) -> None:
    decode.keep(PROMPT[:8])
    ticket = begin(decode)
    decode.handover.on_message(RoomEnded(ticket, "ABORTED", "no longer wanted"))
    assert decode.count(PageState.QUARANTINED) == 1
    assert decode.engine.pages.num_shared == 0, "nobody writes there"
    decode.handover.on_message(RoomReleased(ticket))
    assert decode.count(PageState.CACHED) == 2
    assert decode.engine.allocator.ledger.at_rest


def test_a_room_with_no_page_of_its_own_ends_like_any_other(decode: Both) -> None:
    decode.keep(PROMPT)
    ticket = begin(decode)
    decode.handover.on_message(RoomEnded(ticket, "ABORTED", "no longer wanted"))
    assert decode.handover.pending
    decode.handover.on_message(RoomReleased(ticket))
    assert not decode.handover.pending
    assert decode.engine.allocator.ledger.at_rest
    assert decode.engine.pages.num_shared == 0


def test_a_room_that_waits_locks_nothing(decode: Both) -> None:
    decode.keep(PROMPT[:8])
    hoard = decode.engine.allocator.allocate(14, PageState.RESERVED)
    begin(decode)
    assert not any(isinstance(message, RoomReserved) for message in decode.said)
    assert decode.engine.pages.num_shared == 0
    decode.engine.allocator.free(hoard, PageState.RESERVED)
    decode.handover.poll()
    assert decode.has_said(RoomReserved)
