"""Decode's side of a hand-over: pages are granted, filled by the writer, and adopted by the engine.

Pages go free → reserved (granted to a room) → in use (all bytes are here). When a room ends while its writer
may still write, they go to quarantine and come back when bootstrap says that the writer is quiet.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field

from common.engine.engine import Engine, StepResult
from common.engine.messages import SequenceFailed, TokenLogprobs, Tokens
from common.engine.request import Sequence
from common.errors.base import MeshError, Reason
from common.kvcache.extents import to_extents
from common.kvcache.ledger import PageState
from common.mesh.ticket import Ticket
from common.obs.log import get_logger
from common.transfer import notice
from common.transfer.base import TransferBackend, TransferError
from common.transfer.notice import HandoverNotice
from common.worker.loop import Emit
from common.worker.messages import (
    RankReservation,
    RoomEnded,
    RoomFailed,
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
    """A room on its way in. It has no pages while it waits for them."""

    ticket: Ticket
    start: StartSequence
    pages: list[int] = field(default_factory=list)
    ended: bool = False


class DecodeHandover:
    """Implements `common.worker.loop.Handover`. Everything runs on the rank's loop."""

    def __init__(self, engine: Engine, backend: TransferBackend, emit: Emit) -> None:
        self._engine = engine
        self._backend = backend
        self._emit = emit
        self._descriptor = backend.export()
        self._rooms: dict[Ticket, Incoming] = {}
        self._by_sequence: dict[int, Incoming] = {}
        self._waiting: deque[Incoming] = deque()
        self._early: OrderedDict[Ticket, RoomEnded] = OrderedDict()
        self.stale_notices = 0

    # ------------------------------------------------------------------------------------ events

    def start(self, message: StartSequence) -> None:
        """A sequence whose prompt's pages another worker will bring. Raises `MeshError` when it cannot be run."""
        assert message.ticket is not None
        if early := self._early.pop(message.ticket, None):
            raise MeshError(Reason(early.reason), early.message)
        try:
            self._engine.check(Sequence(message.sequence_id, message.prompt_ids, message.sampling))
        except MeshError as error:
            self._emit(RoomFailed(message.ticket, error.reason, error.message))
            raise
        room = Incoming(message.ticket, message)
        self._rooms[room.ticket] = room
        self._by_sequence[message.sequence_id] = room
        self._waiting.append(room)
        self._grant()

    def on_message(self, message: RoomReserved | RoomEnded | RoomReleased) -> None:
        """News from bootstrap about a room."""
        room = self._rooms.get(message.ticket)
        match message:
            case RoomEnded():
                if room is None:
                    self._keep(message)
                elif not room.ended:
                    self._emit(SequenceFailed(room.start.sequence_id, message.reason, message.message))
                    self._end(room)
            case RoomReleased():
                if room is not None and room.ended:
                    self._engine.allocator.free(room.pages, PageState.QUARANTINED)
                    self._forget(room)
            case RoomReserved():
                pass  # meant for the other side

    def on_abort(self, sequence_id: int) -> bool:
        """The router gave the sequence up. False when the engine has it already, or nobody."""
        room = self._by_sequence.get(sequence_id)
        if room is None:
            return False
        if not room.ended:
            message = "the router aborted the sequence"
            self._emit(RoomFailed(room.ticket, Reason.ABORTED, message))
            self._emit(SequenceFailed(sequence_id, Reason.ABORTED, message))
            self._end(room)
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
        self._grant()

    @property
    def pending(self) -> bool:
        return bool(self._rooms)

    def close(self) -> None:
        self._backend.close()

    # ------------------------------------------------------------------------------------ steps of a room

    def _grant(self) -> None:
        """Reserve pages for waiting rooms, first come first served."""
        while self._waiting:
            room = self._waiting[0]
            needed = self._engine.runner.layout.pages_for(len(room.start.prompt_ids))
            granted = len(self._rooms) - len(self._waiting)
            running = len(self._engine.queue.running)
            if needed > self._engine.grantable_pages() or granted + running >= self._engine.limits.max_running:
                return
            self._waiting.popleft()
            room.pages = self._engine.allocator.allocate(needed, PageState.RESERVED)
            rank = RankReservation(0, self._backend.name, self._descriptor, to_extents(room.pages))
            self._emit(RoomReserved(room.ticket, (rank,)))

    def _arrived(self, arrived: HandoverNotice) -> None:
        room = self._rooms.get(arrived.ticket)
        if room is None or room.ended or not room.pages:
            self.stale_notices += 1
            log.warning("dropped a stale notice", room=str(arrived.ticket))
            return
        start = room.start
        sequence = Sequence(start.sequence_id, start.prompt_ids, start.sampling, request_id=start.request_id)
        sequence.pages = room.pages
        logprobs = [TokenLogprobs(*arrived.logprobs)] if arrived.logprobs else []
        first = Tokens(start.sequence_id, 0, [arrived.token_id], logprobs, cached_tokens=arrived.cached_tokens)
        self._forget(room)
        self._emit(RoomTransferred(room.ticket, arrived.nbytes))
        self._emit(self._engine.adopt(sequence, first))

    def _end(self, room: Incoming) -> None:
        room.ended = True
        if room.pages:
            self._engine.allocator.move(room.pages, PageState.RESERVED, PageState.QUARANTINED)
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
