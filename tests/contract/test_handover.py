"""Both hand-over files against each other, in one process: bootstrap's part is played by handing messages over.

The control variant is here too: a page that is overwritten after its transfer must change the output, or the
oracle's tests would prove nothing.
"""

from __future__ import annotations

import select
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from common.engine.config import EngineConfig
from common.engine.engine import Engine
from common.engine.messages import Sampling, SequenceFailed, Tokens
from common.kvcache.ledger import PageState
from common.mesh.ticket import Ticket
from common.transfer.base import TransferBackend, TransferConfig
from common.transfer.registry import create
from common.worker.messages import (
    Prefilled,
    RoomEnded,
    RoomFailed,
    RoomQuiet,
    RoomReleased,
    RoomReserved,
    RoomTransferred,
    RoomTransferring,
    StartSequence,
)
from common.worker.rank import build_engine
from common.worker.waker import Waker
from services.decode.handover import DecodeHandover
from services.prefill.handover import PrefillHandover
from tests.checkpoints import Answer, Oracle, make_checkpoint

pytestmark = [pytest.mark.contract, pytest.mark.slow]

NEW_TOKENS = 24
GREEDY = Sampling(max_new_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)
PATIENCE_S = 60.0


@dataclass
class Side:
    """One worker's rank, without its loop."""

    engine: Engine
    backend: TransferBackend
    memory: memoryview  # its pool
    handover: Any
    said: list[Any]

    def of(self, kind: type) -> list[Any]:
        return [message for message in self.said if isinstance(message, kind)]


@dataclass
class Pair:
    """A prefill and a decode rank, and what bootstrap would carry between them."""

    prefill: Side
    decode: Side
    waker: Waker
    held_back: list[RoomReserved] = field(default_factory=list)
    push: bool = True  # whether reservations reach prefill
    before_adoption: Callable[[], None] = lambda: None

    def start(self, number: int, prompt_ids: list[int], sampling: Sampling = GREEDY) -> Ticket:
        ticket = Ticket(f"room-{number}", 1, 1)
        message = StartSequence(number, f"request-{number}", ticket, prompt_ids, sampling)
        self.decode.handover.start(message)
        self.prefill.handover.start(message)
        self.relay()
        return ticket

    def relay(self) -> None:
        """Carry new reservations to prefill."""
        for message in self.decode.of(RoomReserved):
            self.held_back.append(message)
            self.decode.said.remove(message)
        while self.push and self.held_back:
            self.prefill.handover.on_message(self.held_back.pop(0))

    def turn(self) -> None:
        """One turn of both loops."""
        for side in (self.prefill, self.decode):
            if side is self.decode and self.prefill.of(Prefilled):
                self.before_adoption()
            side.handover.poll()
            if side.engine.has_work:
                result = side.engine.step()
                side.said += [*result.tokens, *result.failures]
                side.handover.on_step(result)
        self.relay()

    def until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE_S
        while not condition():
            if time.monotonic() > end:
                raise AssertionError(f"not in {PATIENCE_S} s; said: {self.prefill.said[-3:]} {self.decode.said[-3:]}")
            self.turn()
            if not (self.prefill.engine.has_work or self.decode.engine.has_work):
                select.select([self.waker.fd], [], [], 0.1)  # until a backend's thread has news
                self.waker.drain()

    def outputs(self, count: int) -> dict[int, list[int]]:
        """Run until `count` sequences have finished; their tokens by number."""
        self.until(lambda: sum(bool(tokens.finish) for tokens in self.decode.of(Tokens)) == count)
        joined: dict[int, list[int]] = {}
        for tokens in self.decode.of(Tokens):
            assert tokens.offset == len(joined.setdefault(tokens.sequence_id, []))
            joined[tokens.sequence_id] += tokens.token_ids
        return joined

    def at_rest(self) -> bool:
        return all(side.engine.allocator.ledger.at_rest for side in (self.prefill, self.decode))


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Answer]]:
    folder = make_checkpoint(tmp_path_factory.mktemp("model") / request.param, request.param, seed=11)
    return folder, Oracle(folder).answers(4, 200, NEW_TOKENS, seed=11)


def make_side(folder: Path, backend_name: str, waker: Waker, make_handover: Callable[..., Any]) -> Side:
    config = EngineConfig(
        model_path=str(folder), dtype="float32", chunked_prefill_size=64, max_total_tokens=2048, device="cpu"
    )
    backend = create(backend_name, TransferConfig(), waker.wake)
    memory: list[memoryview] = []

    def allocate(nbytes: int) -> memoryview:
        memory.append(backend.allocate(nbytes))
        return memory[0]

    engine = build_engine(config, allocate)
    said: list[Any] = []
    return Side(engine, backend, memory[0], make_handover(engine, backend, said.append), said)


@pytest.fixture(params=["local", "mooncake", "nixl"])
def pair(request: pytest.FixtureRequest, model: tuple[Path, list[Answer]]) -> Iterator[Pair]:
    waker = Waker()
    prefill = make_side(
        model[0], request.param, waker, lambda engine, backend, emit: PrefillHandover(engine, backend, emit, 30.0)
    )
    decode = make_side(model[0], request.param, waker, DecodeHandover)
    yield Pair(prefill, decode, waker)
    prefill.handover.close()
    decode.handover.close()
    waker.close()


def test_output_equals_the_oracle_and_all_pages_return(pair: Pair, model: tuple[Path, list[Answer]]) -> None:
    answers = model[1]
    for number, answer in enumerate(answers):
        pair.start(number, answer.prompt_ids)
    assert pair.outputs(len(answers)) == {number: answer.token_ids for number, answer in enumerate(answers)}
    assert len(pair.prefill.of(RoomTransferring)) == len(pair.decode.of(RoomTransferred)) == len(answers)
    page_bytes = pair.decode.engine.runner.layout.page_bytes
    sent = sum(message.nbytes for message in pair.decode.of(RoomTransferred))
    assert sent == page_bytes * sum(-(-len(answer.prompt_ids) // 16) for answer in answers)
    for told in [message.transfer for message in pair.decode.of(RoomTransferred)]:
        assert told.backend == pair.prefill.backend.name
        assert told.nbytes % page_bytes == 0
        assert 1 <= told.descriptors <= told.nbytes // page_bytes
        assert told.seconds > 0
        assert 0 <= told.hidden_s <= told.seconds <= told.hidden_s + told.exposed_s + 1e-6
    assert sum(message.transfer.nbytes for message in pair.prefill.of(Prefilled)) == sent
    assert pair.at_rest()


def test_control_an_overwritten_page_changes_the_output(pair: Pair, model: tuple[Path, list[Answer]]) -> None:
    answer = max(model[1], key=lambda answer: len(answer.prompt_ids))
    pair.start(1, answer.prompt_ids)

    def overwrite() -> None:
        """Between the last write and the adoption: zero one page of the prompt's middle."""
        ledger = pair.decode.engine.allocator.ledger
        reserved = [page for page in range(ledger.num_pages) if ledger.state(page) is PageState.RESERVED]
        if reserved:
            page_bytes = pair.decode.engine.runner.layout.page_bytes
            start = reserved[len(reserved) // 2] * page_bytes
            pair.decode.memory[start : start + page_bytes] = bytes(page_bytes)

    pair.before_adoption = overwrite
    assert pair.outputs(1)[1] != answer.token_ids


def test_a_room_that_ends_is_quarantined_until_its_writer_is_quiet(
    pair: Pair, model: tuple[Path, list[Answer]]
) -> None:
    answer = max(model[1], key=lambda answer: len(answer.prompt_ids))
    ticket = pair.start(1, answer.prompt_ids)
    ended = RoomEnded(ticket, "TRANSFER_TIMEOUT", "the transfer did not end")
    ledger = pair.decode.engine.allocator.ledger
    pair.turn()  # the first chunk is computed and on its way
    pair.decode.handover.on_message(ended)
    assert ledger.count(PageState.QUARANTINED) == len(answer.prompt_ids) // 16 + (len(answer.prompt_ids) % 16 > 0)
    pair.prefill.handover.on_message(ended)
    pair.until(lambda: bool(pair.prefill.of(RoomQuiet)))
    assert ledger.count(PageState.QUARANTINED) > 0, "pages return only when bootstrap says so"
    pair.decode.handover.on_message(RoomReleased(ticket))
    assert pair.at_rest()
    for side in (pair.prefill, pair.decode):
        assert [failed.reason for failed in side.of(SequenceFailed)] == ["TRANSFER_TIMEOUT"]
        assert not side.handover.pending


def test_an_abort_by_the_router_fails_the_room(pair: Pair, model: tuple[Path, list[Answer]]) -> None:
    pair.push = False
    ticket = pair.start(1, model[1][1].prompt_ids)
    for side in (pair.prefill, pair.decode):
        assert side.handover.on_abort(1)
        assert [failed.reason for failed in side.of(RoomFailed)] == ["ABORTED"]
    assert pair.prefill.of(RoomQuiet) == [RoomQuiet(ticket)]
    pair.decode.handover.on_message(RoomEnded(ticket, "ABORTED", "aborted"))
    pair.decode.handover.on_message(RoomReleased(ticket))
    assert pair.at_rest()
    assert not pair.prefill.handover.on_abort(1), "it is gone"


def test_news_may_come_before_the_prompt(pair: Pair, model: tuple[Path, list[Answer]]) -> None:
    """Bootstrap's stream and the router's are different: the reservation, or the end, may overtake the start."""
    answer = model[1][0]
    ticket = Ticket("room-1", 1, 1)
    start = StartSequence(1, "request-1", ticket, answer.prompt_ids, GREEDY)
    pair.decode.handover.start(start)
    pair.relay()
    pair.prefill.handover.start(start)
    assert pair.outputs(1)[1] == answer.token_ids

    late = Ticket("room-2", 1, 1)
    for side in (pair.prefill, pair.decode):
        side.handover.on_message(RoomEnded(late, "ABORTED", "the client left"))
        with pytest.raises(Exception, match="the client left"):
            side.handover.start(StartSequence(2, "request-2", late, answer.prompt_ids, GREEDY))
    assert RoomQuiet(late) in pair.prefill.said
    assert pair.at_rest()


def test_rooms_wait_their_turn_when_pages_are_short(pair: Pair, model: tuple[Path, list[Answer]]) -> None:
    """Twice as many prompts as the pool holds: all finish, none is lost, and the ledger is at rest."""
    answer = max(model[1], key=lambda answer: len(answer.prompt_ids))
    count = 2 * 2048 // len(answer.prompt_ids)
    for number in range(count):
        pair.start(number, answer.prompt_ids)
    assert pair.outputs(count) == dict.fromkeys(range(count), answer.token_ids)
    assert pair.at_rest()


def test_a_notice_with_another_ticket_is_dropped(pair: Pair, model: tuple[Path, list[Answer]]) -> None:
    """Decode never adopts pages on a notice of another attempt."""
    answer = model[1][0]
    pair.start(1, answer.prompt_ids)
    other = Ticket("room-1", 2, 1)
    room = pair.prefill.handover._rooms.pop(Ticket("room-1", 1, 1))
    room.ticket = other
    pair.prefill.handover._rooms[other] = room
    pair.until(lambda: pair.decode.handover.stale_notices == 1)
    assert not pair.decode.of(Tokens)
    assert pair.decode.engine.allocator.ledger.count(PageState.RESERVED) > 0


def test_prefill_computes_nothing_before_decode_has_reserved(pair: Pair, model: tuple[Path, list[Answer]]) -> None:
    """Rooms are computed in the order of their reservations, whatever the order of their prompts."""
    pair.push = False
    first, second = model[1][:2]
    pair.start(1, first.prompt_ids)
    pair.start(2, second.prompt_ids)
    engine, handover = pair.prefill.engine, pair.prefill.handover
    assert not engine.has_work
    load = handover.load(engine.load())
    assert (load.waiting, load.waiting_tokens) == (2, len(first.prompt_ids) + len(second.prompt_ids))
    assert load.credit is None
    pair.held_back.reverse()
    pair.push = True
    pair.relay()
    assert [sequence.sequence_id for sequence in engine.queue.waiting] == [2, 1]
    assert pair.outputs(2) == {1: first.token_ids, 2: second.token_ids}
    assert pair.at_rest()


def test_an_idle_optimistic_worker_begins_one_room_early(pair: Pair, model: tuple[Path, list[Answer]]) -> None:
    pair.push = False
    pair.prefill.handover._optimistic = True
    first, second = model[1][:2]
    pair.start(1, first.prompt_ids)
    pair.start(2, second.prompt_ids)
    engine = pair.prefill.engine
    assert [sequence.sequence_id for sequence in engine.queue.waiting] == [1]
    assert pair.prefill.handover.load(engine.load()).waiting == 2
    pair.push = True
    pair.relay()
    assert pair.outputs(2) == {1: first.token_ids, 2: second.token_ids}
    assert pair.at_rest()


def test_a_room_that_never_began_ends_in_silence(pair: Pair, model: tuple[Path, list[Answer]]) -> None:
    pair.push = False
    ticket = pair.start(1, model[1][0].prompt_ids)
    pair.prefill.handover.on_message(RoomEnded(ticket, "BOOTSTRAP_TIMEOUT", "decode reserved no pages"))
    assert pair.prefill.of(RoomQuiet) == [RoomQuiet(ticket)]
    assert not pair.prefill.handover.pending
    assert pair.prefill.engine.is_idle


def test_decode_grants_below_its_mark_and_says_what_is_left(pair: Pair, model: tuple[Path, list[Answer]]) -> None:
    """128 pages, 102 of them below the mark; each room takes its prompt's pages and those of its growth."""
    engine, handover = pair.decode.engine, pair.decode.handover
    pair.push = False
    prompt = model[1][0].prompt_ids[:1] * 200
    long = Sampling(max_new_tokens=1000, temperature=0.0, ignore_eos=True)  # 512 of them are counted
    cost = -(-(200 + 511) // 16)
    for number in range(3):
        pair.start(number, prompt, long)
    assert len(pair.held_back) == 2
    credit = handover.load(engine.load()).credit
    assert credit.limit_pages == 102
    assert credit.pages == 102 - 3 * cost, "what waits is counted: the routers have overspent"
    assert credit.sequences == engine.limits.max_running - 3
    assert handover.on_abort(2)
    assert handover.load(engine.load()).credit.pages == 102 - 2 * cost
    for number in range(2):
        assert handover.on_abort(number)
    quarantined = 2 * -(-200 // 16)
    assert handover.load(engine.load()).credit.pages == 102 - quarantined
    for number in range(3):
        handover.on_message(RoomReleased(Ticket(f"room-{number}", 1, 1)))
    assert handover.load(engine.load()).credit.untouched


def test_a_retracted_sequence_goes_on_over_a_new_hand_over(pair: Pair, model: tuple[Path, list[Answer]]) -> None:
    answer = model[1][1]
    pair.start(1, answer.prompt_ids)
    pair.until(lambda: sum(len(tokens.token_ids) for tokens in pair.decode.of(Tokens)) >= 5)
    pair.decode.engine.abort(1)
    known = [token for tokens in pair.decode.of(Tokens) for token in tokens.token_ids]
    ticket = Ticket("room-2", 2, 1)
    for side in (pair.decode, pair.prefill):
        side.handover.start(StartSequence(2, "request-1", ticket, answer.prompt_ids, GREEDY, known))
    pair.relay()
    pair.until(lambda: any(tokens.finish for tokens in pair.decode.of(Tokens)))
    again = [tokens for tokens in pair.decode.of(Tokens) if tokens.sequence_id == 2]
    assert again[0].offset == len(known)
    assert known + [token for tokens in again for token in tokens.token_ids] == answer.token_ids
    assert pair.at_rest()


def test_an_optimist_steps_back_for_a_room_that_has_its_reservation(
    pair: Pair, model: tuple[Path, list[Answer]]
) -> None:
    """Decode may wait for the one, and the one for the pages of the other."""
    pair.push = False
    pair.prefill.handover._optimistic = True
    engine = pair.prefill.engine
    first, second = model[1][:2]
    pair.start(1, first.prompt_ids)
    pair.until(lambda: not engine.has_work)
    pair.start(2, second.prompt_ids)
    assert not engine.is_idle, "the first is held until its reservation comes"
    hoard = engine.allocator.allocate(engine.allocator.num_free)
    pair.held_back.reverse()
    pair.prefill.handover.on_message(pair.held_back.pop(0))
    assert engine.find(1) is None
    engine.allocator.free(hoard)
    pair.push = True
    pair.relay()
    assert pair.outputs(2) == {1: first.token_ids, 2: second.token_ids}
    assert pair.at_rest()
