"""Decode's side of a hand-over: pages are granted, filled by the writer, and adopted by the engine.

Pages go free → reserved (granted to a room) → in use (all bytes are here). When a room ends while its writer
may still write, they go to quarantine and come back when bootstrap says that the writer is quiet; or, when it
says that the writer is lost, as soon as the transfer endpoint here has seen the last of it.

With a prefix cache, only the pages are granted that it lacks, and the reservation says from which token on they are
wanted; what it has is locked from then on.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field

from msgspec import structs

from common.engine.engine import Engine, StepResult
from common.engine.messages import Arrivals, Load, SequenceFailed, TokenLogprobs, Tokens
from common.engine.request import Sequence
from common.errors.base import MeshError, Reason
from common.kvcache.audit import Claim
from common.kvcache.extents import to_extents
from common.kvcache.ledger import PageState
from common.kvcache.radix import Prefix
from common.mesh.credit import Credit
from common.mesh.ticket import Ticket
from common.obs.log import get_logger
from common.transfer import notice
from common.transfer.base import TransferBackend, TransferError
from common.transfer.checksum import Hasher
from common.transfer.notice import HandoverNotice
from common.worker.loop import Emit
from common.worker.messages import (
    RankReservation,
    Registered,
    RoomEnded,
    RoomFailed,
    RoomFenced,
    RoomReleased,
    RoomReserved,
    RoomTransferred,
    StartSequence,
)

log = get_logger(__name__)

# Ends of rooms that came before their sequence; older ones belong to a router that is gone.
EARLY_ROOMS = 4096


@dataclass(slots=True)
class Incoming:
    """A room on its way in. It has no pages while it waits for them; those that are cached come before them."""

    ticket: Ticket
    start: StartSequence
    pages: list[int] = field(default_factory=list)
    prefix: Prefix | None = None  # what the cache has of it, locked
    granted: bool = False  # though perhaps no page, when the cache has all of them
    ended: bool = False
    arrived: HandoverNotice | None = None  # all bytes are said to be here, and are verified
    digests: Future[bytes] | None = None
    writer: RoomReleased | None = None  # once it is lost: what to wait for

    @property
    def tokens(self) -> int:
        """Tokens whose pages another worker brings: the prompt, and what an earlier attempt generated."""
        return len(self.start.prompt_ids) + len(self.start.output_ids)

    def cost(self, credit: Credit) -> int:
        """Pages that it takes of `credit`. The engine counts those that are locked."""
        cost = credit.cost(self.tokens, self.start.sampling.max_new_tokens - len(self.start.output_ids))
        return cost - len(self.shared)

    @property
    def shared(self) -> list[int]:
        """The cached pages that come before its own."""
        return self.prefix.pages if self.prefix else []


class DecodeHandover:
    """Implements `common.worker.loop.Handover`. Everything runs on the rank's loop."""

    def __init__(self, engine: Engine, backend: TransferBackend, emit: Emit, hasher: Hasher | None = None) -> None:
        self._engine = engine
        self._hasher = hasher
        self._backend = backend
        self._emit = emit
        self._descriptor = backend.export()
        self._rooms: dict[Ticket, Incoming] = {}
        self._by_sequence: dict[int, Incoming] = {}
        self._waiting: deque[Incoming] = deque()
        self._early: OrderedDict[Ticket, RoomEnded] = OrderedDict()
        self.stale_notices = 0
        self._pages_verified = 0
        self._checksum_mismatches = 0

    # ------------------------------------------------------------------------------------ events

    def start(self, message: StartSequence) -> None:
        """A sequence whose prompt's pages another worker will bring. Raises `MeshError` when it cannot be run."""
        assert message.ticket is not None
        if early := self._early.pop(message.ticket, None):
            raise MeshError(Reason(early.reason), early.message)
        try:
            self._engine.check(sequence_of(message))
        except MeshError as error:
            self._emit(RoomFailed(message.ticket, error.reason, error.message))
            raise
        room = Incoming(message.ticket, message)
        self._rooms[room.ticket] = room
        self._by_sequence[message.sequence_id] = room
        self._waiting.append(room)
        self._grant()

    def on_message(self, message: RoomReserved | RoomEnded | RoomReleased | Registered) -> None:
        """News from bootstrap."""
        match message:
            case RoomEnded():
                room = self._rooms.get(message.ticket)
                if room is None:
                    self._keep(message)
                elif not room.ended:
                    self._emit(SequenceFailed(room.start.sequence_id, message.reason, message.message))
                    self._end(room)
            case RoomReleased():
                room = self._rooms.get(message.ticket)
                if room is not None and room.ended:
                    self._released(room, message)
                elif room is None and message.when_gone:
                    self._emit(RoomFenced(message.ticket))  # all had arrived, or it never was here: nothing waits
            case RoomReserved() | Registered():
                pass  # meant for the other side

    def on_abort(self, sequence_id: int) -> bool:
        """The router gave the sequence up. False when the engine has it already, or nobody."""
        room = self._by_sequence.get(sequence_id)
        if room is None:
            return False
        if not room.ended:
            self._fail(room, Reason.ABORTED, "the router aborted the sequence")
        return True

    def on_step(self, result: StepResult) -> None:
        """Nothing to do: pages that a step gave back are granted by `poll`."""

    def poll(self) -> None:
        """Take in what has arrived, then grant what is free."""
        for payload in self._backend.received():
            try:
                self._arrived(notice.decode(payload))
            except TransferError as error:
                log.warning("dropped a notice that cannot be read", error=str(error))
        self._backend.poll()
        for room in list(self._rooms.values()):
            if room.writer:
                self._fence(room)
            elif room.arrived and room.digests and room.digests.done() and not room.ended:
                self._verified(room, room.arrived, room.digests.result())
        self._grant()

    def load(self, engine: Load) -> Load:
        """The engine's load; rooms wait, and take of the credit, from their start on."""
        assert engine.credit is not None
        rooms = [room for room in self._rooms.values() if not room.ended]
        cost = sum(room.cost(engine.credit) for room in rooms)
        return structs.replace(
            engine,
            waiting=engine.waiting + len(rooms),
            waiting_tokens=engine.waiting_tokens + sum(room.tokens for room in rooms),
            credit=engine.credit.less(cost, len(rooms)),
            arrivals=Arrivals(self.stale_notices, self._pages_verified, self._checksum_mismatches),
        )

    def claims(self) -> Iterator[Claim]:
        """The pages that are granted to rooms, or in quarantine after them."""
        for room in self._rooms.values():
            state = PageState.QUARANTINED if room.ended else PageState.RESERVED
            yield Claim(f"room {room.ticket}", state, room.pages)

    @property
    def pending(self) -> bool:
        return bool(self._rooms)

    def close(self) -> None:
        if self._hasher:
            self._hasher.close()
        self._backend.close()

    # ------------------------------------------------------------------------------------ steps of a room

    def _grant(self) -> None:
        """Reserve pages for waiting rooms below the high-water mark, first come first served."""
        if not self._waiting:
            return
        credit = self._engine.credit()
        granted = [room for room in self._rooms.values() if room.granted and not room.ended]
        credit = credit.less(sum(room.cost(credit) for room in granted), len(granted))
        while self._waiting:
            room = self._waiting[0]
            cost = room.cost(credit)
            if not credit.fits(cost) or not self._reserve(room):
                return
            self._waiting.popleft()
            credit = credit.less(cost, 1)
            rank = RankReservation(0, self._backend.name, self._descriptor, to_extents(room.pages))
            from_token = len(room.shared) * self._engine.runner.layout.page_size
            self._emit(RoomReserved(room.ticket, (rank,), from_token))

    def _reserve(self, room: Incoming) -> bool:
        """Lock what is cached of a room and take pages for the rest; False, and nothing happens, if they lack."""
        pages = self._engine.pages
        prefix = pages.find(sequence_of(room.start), compute_last=False)
        pages.lock(prefix.node if prefix else None)
        needed = self._engine.runner.layout.pages_for(room.tokens) - (len(prefix.pages) if prefix else 0)
        if needed > self._engine.grantable_pages():
            pages.unlock(prefix.node if prefix else None)
            return False
        room.granted, room.prefix = True, prefix
        after = room.shared[-1] if room.shared else None
        room.pages = self._engine.allocator.allocate(needed, PageState.RESERVED, after=after)
        return True

    def _arrived(self, arrived: HandoverNotice) -> None:
        room = self._rooms.get(arrived.ticket)
        if room is None or room.ended or not room.granted or room.arrived:
            self.stale_notices += 1
            log.warning("dropped a stale notice", room=str(arrived.ticket))
        elif arrived.sums and self._hasher:
            room.arrived = arrived
            room.digests = self._hasher.digests(arrived.sums.of(room.pages))
        else:
            self._adopt(room, arrived)

    def _verified(self, room: Incoming, arrived: HandoverNotice, digests: bytes) -> None:
        assert arrived.sums
        self._pages_verified += len(arrived.sums.of(room.pages))
        if wrong := arrived.sums.mismatch(digests):
            self._checksum_mismatches += 1
            self._fail(room, Reason.CHECKSUM_MISMATCH, wrong)
        else:
            self._adopt(room, arrived)

    def _fail(self, room: Incoming, reason: Reason, message: str) -> None:
        """Give a room up from this side."""
        log.warning("room failed", room=str(room.ticket), reason=reason, message=message)
        self._emit(RoomFailed(room.ticket, reason, message))
        self._emit(SequenceFailed(room.start.sequence_id, reason, message))
        self._end(room)

    def _adopt(self, room: Incoming, arrived: HandoverNotice) -> None:
        start = room.start
        sequence = sequence_of(start)
        sequence.pages = room.shared + room.pages
        if room.prefix:  # its lock is the sequence's from now on
            sequence.prefix, sequence.shared = room.prefix.node, len(room.prefix.pages)
        logprobs = [TokenLogprobs(*arrived.logprobs)] if arrived.logprobs else []
        offset = len(start.output_ids)
        first = Tokens(start.sequence_id, offset, [arrived.token_id], logprobs, cached_tokens=arrived.cached_tokens)
        self._forget(room)
        self._emit(RoomTransferred(room.ticket, arrived.nbytes, arrived.transfer))
        self._emit(self._engine.adopt(sequence, first))

    def _released(self, room: Incoming, message: RoomReleased) -> None:
        if message.when_gone:
            room.writer = message
            self._fence(room)
        else:
            self._free(room)

    def _fence(self, room: Incoming) -> None:
        """Free the pages if their lost writer is gone; if not, `poll` asks again."""
        writer = room.writer
        assert writer is not None
        # all are fenced off now, so that nothing new can come of one while another is waited for
        gone = [self._backend.fence(endpoint, writer.epoch) for endpoint in writer.when_gone]
        if all(gone):
            log.info("the writer of a failed room is gone", room=str(room.ticket), pages=len(room.pages))
            self._emit(RoomFenced(room.ticket))
            self._free(room)

    def _free(self, room: Incoming) -> None:
        """Nobody writes to the pages any more."""
        self._engine.allocator.free(room.pages, PageState.QUARANTINED)
        self._forget(room)

    def _end(self, room: Incoming) -> None:
        room.ended = True
        if room.granted:
            self._engine.allocator.move(room.pages, PageState.RESERVED, PageState.QUARANTINED)
            self._engine.pages.unlock(room.prefix.node if room.prefix else None)
        else:
            self._waiting.remove(room)
            self._forget(room)

    def _keep(self, message: RoomEnded) -> None:
        self._early[message.ticket] = message
        while len(self._early) > EARLY_ROOMS:
            self._early.popitem(last=False)

    def _forget(self, room: Incoming) -> None:
        self._rooms.pop(room.ticket, None)
        self._by_sequence.pop(room.start.sequence_id, None)


def sequence_of(start: StartSequence) -> Sequence:
    """The engine's sequence, which goes on from what an earlier attempt generated."""
    sequence = Sequence(start.sequence_id, start.prompt_ids, start.sampling, request_id=start.request_id)
    sequence.output_ids += start.output_ids
    return sequence
