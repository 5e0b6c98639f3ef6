"""Prefill's side of a hand-over: pages of a computed chunk go out while the next chunk computes.

A room is known by its ticket. Its reservation (from bootstrap) and its prompt (from the router) come over
different streams, in either order, and so may its end; whichever comes first is kept for the other.

Nothing is computed for a room before decode has reserved its pages: rooms are computed in the order of their
reservations. An idle worker may be told to begin earlier (`--optimistic-prefill`). What the prefix cache has of a
prompt leaves with the reservation, before the prompt's turn; what decode has itself (`from_token`) is not sent.

What leaves goes by the transfer backend's queues, which are bounded. While the room's queue is full its pages wait,
and go as one with those computed meanwhile; a room that has not begun does not begin.

When a room ends before success, bootstrap is told `RoomQuiet` once nothing more will be written for it: decode
keeps the destination pages in quarantine until then.
"""

from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

from msgspec import structs

from common.engine.engine import Engine, StepResult
from common.engine.messages import Load, SequenceFailed, Tokens
from common.engine.request import Sequence
from common.errors.base import MeshError, Reason
from common.kvcache.audit import Claim
from common.kvcache.radix import Node
from common.mesh.ticket import Ticket
from common.obs.log import get_logger
from common.transfer import notice
from common.transfer.base import Completion, Handle, HandleState, PeerId, TransferBackend, TransferError
from common.transfer.checksum import Hasher, OutgoingSums
from common.transfer.meter import Meter
from common.transfer.notice import HandoverNotice
from common.transfer.runs import coalesce
from common.worker.loop import Emit
from common.worker.messages import (
    Prefilled,
    Registered,
    RoomEnded,
    RoomFailed,
    RoomQuiet,
    RoomReleased,
    RoomReserved,
    RoomTransferring,
    StartSequence,
)

log = get_logger(__name__)

# Reservations and ends that came before their prompt. A prompt follows within the router's call, so that what
# is older than this many rooms belongs to a router that is gone.
EARLY_ROOMS = 4096


@dataclass(slots=True)
class Destination:
    """Where a room's pages go: a peer and the pages there, in token order, from page `first` of the prompt on."""

    peer: PeerId
    pages: list[int]
    first: int


@dataclass(slots=True)
class Outgoing:
    """A room on its way out."""

    ticket: Ticket
    sequence: Sequence
    destination: Destination | None = None
    pages_computed: int = 0
    pages_sent: int = 0
    prefix: Node | None = None  # locked while cached pages are being sent
    bytes_sent: int = 0
    handles: set[Handle] = field(default_factory=set)
    meter: Meter = field(default_factory=Meter)
    sums: OutgoingSums | None = None  # of what is sent, where they are wanted
    first_token: Tokens | None = None  # set with the last chunk
    begun: bool = False  # the engine has it
    ended: bool = False

    @property
    def key(self) -> int:
        """Picks the queue: the same for all of the room's pages."""
        return zlib.crc32(self.ticket.room_id.encode())


class PrefillHandover:
    """Implements `common.worker.loop.Handover`. Everything runs on the rank's loop."""

    def __init__(
        self,
        engine: Engine,
        backend: TransferBackend,
        emit: Emit,
        timeout_s: float,
        optimistic: bool = False,
        hasher: Hasher | None = None,
        checksum: str = "off",
    ) -> None:
        self._engine = engine
        self._backend = backend
        self._emit = emit
        self._timeout_s = timeout_s
        self._optimistic = optimistic
        self._hasher = hasher if checksum != "off" else None
        self._checksum = checksum
        self._layout = engine.runner.layout
        self._rooms: dict[Ticket, Outgoing] = {}
        self._by_sequence: dict[int, Outgoing] = {}
        self._by_handle: dict[Handle, Outgoing] = {}
        self._early: OrderedDict[Ticket, Destination | RoomEnded] = OrderedDict()
        self._draining: dict[Handle, Outgoing] = {}  # writes that failed, and may still land
        self._stalled: dict[Ticket, Outgoing] = {}  # rooms whose queue is full, in the order of their reservations

    # ------------------------------------------------------------------------------------ events

    def start(self, message: StartSequence) -> None:
        """A prompt to compute for a room. Raises `MeshError` when the room has ended or the engine refuses it."""
        assert message.ticket is not None
        early = self._early.pop(message.ticket, None)
        if isinstance(early, RoomEnded):
            raise MeshError(Reason(early.reason), early.message)
        sequence = Sequence(
            message.sequence_id, message.prompt_ids, message.sampling, prefill_only=True, request_id=message.request_id
        )
        sequence.output_ids += message.output_ids
        try:
            self._engine.check(sequence)
        except MeshError as error:
            self._emit(RoomFailed(message.ticket, error.reason, error.message))
            self._emit(RoomQuiet(message.ticket))
            raise
        room = Outgoing(message.ticket, sequence)
        self._rooms[room.ticket] = room
        self._by_sequence[message.sequence_id] = room
        if early:
            self._send_to(room, early)
        self._begin_optimistically()

    def on_message(self, message: RoomReserved | RoomEnded | RoomReleased | Registered) -> None:
        """News from bootstrap."""
        match message:
            case RoomReserved():
                self._reserved(message)
            case RoomEnded():
                self._ended(message, self._rooms.get(message.ticket))
            case Registered():
                self._backend.live(message.epoch)
            case RoomReleased():
                pass  # meant for the other side

    def on_abort(self, sequence_id: int) -> bool:
        """The router gave the sequence up. False when it is none of ours."""
        room = self._by_sequence.get(sequence_id)
        if room is None:
            return False
        self._fail(room, Reason.ABORTED, "the router aborted the sequence")
        return True

    def on_step(self, result: StepResult) -> None:
        """Pages of the step's chunks are filled: let them go."""
        for progress in result.progress:
            room = self._by_sequence[progress.sequence.sequence_id]
            room.first_token = progress.first
            if progress.first:
                room.meter.computed()
                room.pages_computed = self._layout.pages_for(progress.computed)
            else:  # a page that the next chunk will write to again must wait for it
                room.pages_computed = progress.computed // self._layout.page_size
            self._advance(room)
        for failure in result.failures:
            self._fail(self._by_sequence[failure.sequence_id], Reason(failure.reason), failure.message)
        if result.progress:  # little may be there already
            self._take_completions()

    def poll(self) -> None:
        """Take in what the transfer backend has finished."""
        self._take_completions()
        for handle in [handle for handle in self._draining if self._backend.quiet(handle)]:
            room = self._draining.pop(handle)
            room.handles.discard(handle)
            self._quiet(room)
        if self._hasher:
            for room in [room for room in self._rooms.values() if not room.handles]:
                self._let_go(room)
                if room.first_token:
                    self._advance(room)
        self._begin_optimistically()

    def load(self, engine: Load) -> Load:
        """The engine's load, with the rooms that wait for their reservation. Prefill promises nothing."""
        waiting = [room.sequence.num_tokens for room in self._rooms.values() if not room.begun and not room.ended]
        return structs.replace(
            engine,
            waiting=engine.waiting + len(waiting),
            waiting_tokens=engine.waiting_tokens + sum(waiting),
            credit=None,
        )

    def claims(self) -> Iterable[Claim]:
        """None: its rooms' pages are their sequences'."""
        return ()

    @property
    def pending(self) -> bool:
        return bool(self._rooms)

    def close(self) -> None:
        if self._hasher:
            self._hasher.close()
        self._backend.close()

    # ------------------------------------------------------------------------------------ steps of a room

    def _take_completions(self) -> None:
        for completion in self._backend.poll():
            if room := self._by_handle.pop(completion.handle, None):
                self._completed(room, completion)
        for stalled in list(self._stalled.values()):
            self._go_on(stalled)

    def _keep(self, ticket: Ticket, early: Destination | RoomEnded) -> None:
        self._early[ticket] = early
        while len(self._early) > EARLY_ROOMS:
            self._early.popitem(last=False)

    def _reserved(self, message: RoomReserved) -> None:
        """Reach decode at once, also for a room whose prompt is not here yet.

        Should this worker's life end, decode fences off what was connected in it; to connect for a reservation of
        an earlier life would go around that.
        """
        room = self._rooms.get(message.ticket)
        if message.ticket in self._early or (room and (room.ended or room.destination)):
            return  # a repeated reservation is the same one: the ticket fences it
        rank = message.ranks[0]
        pages = [page for first, count in rank.extents for page in range(first, first + count)]
        try:
            peer = self._backend.connect(rank.descriptor)
        except TransferError as error:
            self._unreachable(message.ticket, room, str(error))
            return
        destination = Destination(peer, pages, message.from_token // self._layout.page_size)
        if room:
            self._send_to(room, destination)
        else:
            self._keep(message.ticket, destination)

    def _unreachable(self, ticket: Ticket, room: Outgoing | None, why: str) -> None:
        if room:
            self._fail(room, Reason.TRANSFER_FAILED, why)
            return
        self._keep(ticket, RoomEnded(ticket, Reason.TRANSFER_FAILED, why))
        self._emit(RoomFailed(ticket, Reason.TRANSFER_FAILED, why))
        self._emit(RoomQuiet(ticket))

    def _send_to(self, room: Outgoing, destination: Destination) -> None:
        room.destination = destination
        room.pages_sent = destination.first
        if self._hasher and destination.pages:
            room.sums = OutgoingSums(self._hasher, self._checksum, room.ticket, len(destination.pages))
        self._go_on(room)

    def _go_on(self, room: Outgoing) -> None:
        """Begin, and send what there is, if its queue takes more; else `poll` comes back to it."""
        to = room.destination
        if to is None or room.ended:
            return
        if not self._backend.accepts(to.peer, room.key):
            self._stalled[room.ticket] = room
            return
        self._stalled.pop(room.ticket, None)
        self._begin(room)
        if not room.pages_computed and not room.prefix:
            self._send_prefix(room, to)
        self._advance(room)

    def _begin(self, room: Outgoing) -> None:
        if not room.begun:
            if self._optimistic and self._layout.pages_for(room.sequence.num_tokens) > self._engine.pages.num_available:
                self._step_back()
            room.begun = True
            self._engine.add(room.sequence)

    def _begin_optimistically(self) -> None:
        """Let an idle engine compute the oldest room whose reservation is not here yet."""
        if self._optimistic and self._engine.is_idle:
            waiting = (room for room in self._rooms.values() if not room.begun and not room.ended)
            if room := next(waiting, None):
                self._begin(room)

    def _step_back(self) -> None:
        """Take the pages of a room that began without a reservation, as if it had not.

        Decode may have none for it before a room is done that has a reservation, and now wants these pages.
        """
        for room in self._rooms.values():
            if room.begun and not room.destination and not room.ended:
                tried = room.sequence
                self._engine.abort(tried.sequence_id)
                known = tried.output_ids[:-1] if room.first_token else tried.output_ids
                room.sequence = Sequence(
                    tried.sequence_id,
                    tried.prompt_ids,
                    tried.sampling,
                    prefill_only=True,
                    request_id=tried.request_id,
                    output_ids=known,
                )
                room.begun, room.first_token, room.pages_computed = False, None, 0

    def _advance(self, room: Outgoing) -> None:
        """Send the pages that are computed and wanted; when all have arrived, tell decode."""
        to = room.destination
        if to is None or room.ended:
            return
        if room.pages_sent < room.pages_computed:
            if not self._backend.accepts(to.peer, room.key):
                self._stalled[room.ticket] = room
                return
            if not self._send(room, to, room.sequence.pages[: room.pages_computed]):
                return
        if room.first_token and not room.handles and (room.sums is None or room.sums.done):
            self._finish(room, to.peer, room.first_token)

    def _send_prefix(self, room: Outgoing, to: Destination) -> None:
        """Send what is cached of a prompt whose turn has not come.

        It is locked only as long as it is being read: prompts that wait must not keep what those before them need.
        Should it be evicted before the prompt's turn, it is computed again, but not sent again.
        """
        prefix = self._engine.pages.find(room.sequence)
        if prefix and len(prefix.pages) > room.pages_sent:
            room.prefix = self._engine.pages.lock(prefix.node)
            self._send(room, to, prefix.pages)

    def _send(self, room: Outgoing, to: Destination, pages: list[int]) -> bool:
        """Send those of the prompt's first `pages` that were not sent before. False if the room failed by it."""
        if room.pages_sent == to.first:
            self._emit(RoomTransferring(room.ticket))
        source = pages[room.pages_sent :]
        target = to.pages[room.pages_sent - to.first : len(pages) - to.first]
        runs = coalesce(source, target, self._layout.page_bytes)
        try:
            handle = self._backend.submit(to.peer, runs, self._timeout_s, room.key)
        except TransferError as error:
            self._fail(room, Reason.TRANSFER_FAILED, str(error))
            return False
        room.handles.add(handle)
        room.meter.submitted(handle)
        self._by_handle[handle] = room
        room.bytes_sent += len(source) * self._layout.page_bytes
        room.pages_sent = len(pages)
        if room.sums:
            room.sums.add(source)
        return True

    def _let_go(self, room: Outgoing) -> None:
        """What was sent from the cache has arrived: it may be evicted. A room that ended first waits to be quiet."""
        if room.prefix and not room.ended and not room.handles and (room.sums is None or room.sums.done):
            self._engine.pages.unlock(room.prefix)
            room.prefix = None

    def _finish(self, room: Outgoing, peer: PeerId, first: Tokens) -> None:
        chosen = first.logprobs[0] if first.logprobs else None
        transfer = room.meter.stats(self._backend.name)
        arrived = HandoverNotice(
            ticket=room.ticket,
            rank=0,
            nbytes=room.bytes_sent,
            token_id=first.token_ids[0],
            logprobs=(chosen.token_id, chosen.logprob, chosen.top) if chosen else None,
            cached_tokens=first.cached_tokens,
            transfer=transfer,
            sums=room.sums.result() if room.sums else None,
        )
        try:
            self._backend.notify(peer, notice.encode(arrived))
        except TransferError as error:
            self._fail(room, Reason.TRANSFER_FAILED, str(error))
            return
        self._emit(Prefilled(room.sequence.sequence_id, first.cached_tokens, transfer))
        self._forget(room)

    def _completed(self, room: Outgoing, completion: Completion) -> None:
        room.meter.ended(completion)
        if completion.state is HandleState.FAILED and not self._backend.quiet(completion.handle):
            self._draining[completion.handle] = room
        else:
            room.handles.discard(completion.handle)
        if room.ended:
            self._quiet(room)
        elif completion.state is HandleState.FAILED:
            self._fail(room, Reason.TRANSFER_FAILED, completion.error)
        else:
            self._let_go(room)
            self._advance(room)

    def _ended(self, message: RoomEnded, room: Outgoing | None) -> None:
        if room is None:
            self._keep(message.ticket, message)
            self._emit(RoomQuiet(message.ticket))
        elif not room.ended:
            self._emit(SequenceFailed(room.sequence.sequence_id, message.reason, message.message))
            self._stop(room)
            self._quiet(room)

    def _fail(self, room: Outgoing, reason: Reason, message: str) -> None:
        """Give a room up from this side."""
        if room.ended:
            return
        log.warning("room failed", room=str(room.ticket), reason=reason, message=message)
        self._emit(RoomFailed(room.ticket, reason, message))
        self._emit(SequenceFailed(room.sequence.sequence_id, reason, message))
        self._stop(room)
        self._quiet(room)

    def _stop(self, room: Outgoing) -> None:
        """Compute and send no more; the pages stay ours while writes may still read them."""
        room.ended = True
        for handle in room.handles:
            self._backend.cancel(handle)
        if room.begun:
            self._engine.abort(room.sequence.sequence_id, quarantine=True)

    def _quiet(self, room: Outgoing) -> None:
        if not room.handles:
            transfer = room.meter.stats(self._backend.name) if room.bytes_sent else None
            self._emit(RoomQuiet(room.ticket, transfer))
            self._forget(room)

    def _forget(self, room: Outgoing) -> None:
        self._stalled.pop(room.ticket, None)
        self._engine.pages.unlock(room.prefix)
        if room.begun:
            self._engine.release(room.sequence.sequence_id)
        self._rooms.pop(room.ticket, None)
        self._by_sequence.pop(room.sequence.sequence_id, None)
