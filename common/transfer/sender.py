"""The sender pool: a few workers that do all the writing of an endpoint.

Every peer has an `Outlet` with the same number of ordered queues. A transfer's key, its room, picks the queue, and
the transfers of one queue are written one after the other. Workers take turns over peers and queues, one part
(some 10 MiB) at a time, so that neither a long transfer nor a slow peer holds up the others for long.

As many workers as there are write to a peer at once where its `Writer` allows it (a mapping: `local`). An engine that
serves one thread is used by one worker at a time, whichever: a peer has one engine for all its queues, because each
registers the whole pool anew, and one fills the wire.

An engine's call may be stuck in a dead peer for longer than anybody should wait. A worker that has been in one part
for `STUCK_S` while others wait is relieved: a new one takes its place, and it ends when its call returns. There are
never more of those than peers that are stuck.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from common.obs.log import get_logger
from common.transfer.base import Handle, Pieces, TransferError
from common.transfer.runs import LENGTH

log = get_logger(__name__)

STUCK_S = 1.0

GiveUp = Callable[[], bool]


class Writer(Protocol):
    """An engine's way into one peer's pool. Used by one thread at a time, unless it is `parallel`."""

    parallel: bool

    def write(self, pieces: Pieces, give_up: GiveUp) -> None:
        """Copy; return when all bytes are at the peer. Raises `TransferError`.

        Returns soon after `give_up` says so, by raising, where the engine can. One that is not parallel is closed
        after it raised, because bytes may still be on their way.
        """

    def close(self) -> None:
        """Free the engine's side of the connection. When this returns, it writes no more."""


@dataclass(eq=False)
class Transfer:
    """A submitted transfer. `ended` is set once, by whoever ends it first: a worker, the clock, a loss, its owner.

    `parts` are those that no worker has taken yet. `give_up` asks a worker to leave also the part that it is in,
    at the cost of the engine; of one that is only cancelled it finishes that part. The pool's lock guards `parts`,
    `writing` and `error`.
    """

    handle: Handle
    queue: int
    timeout_s: float
    parts: deque[Pieces]
    nbytes: int = 0
    descriptors: int = 0
    submitted: float = field(default_factory=time.monotonic)
    begun: float | None = None
    writing: int = 0
    error: str = ""
    ended: bool = False
    give_up: bool = False

    def __post_init__(self) -> None:
        self.nbytes = sum(int(part[:, LENGTH].sum()) for part in self.parts)
        self.descriptors = sum(len(part) for part in self.parts)

    @property
    def deadline(self) -> float:
        return self.submitted + self.timeout_s


class Ended(Protocol):
    """Whom the pool tells that it has done with a transfer."""

    def __call__(self, transfer: Transfer, error: str) -> None:
        """Nothing more is written for it; all was, if there is no `error` and it had not ended before."""


class Outlet:
    """One peer's queues, and the way into its pool. Guarded by the pool's lock."""

    def __init__(self, pool: SenderPool, open_writer: Callable[[], Writer], on_closed: Callable[[], None]) -> None:
        self.open_writer = open_writer
        self.on_closed = on_closed
        self.writer: Writer | None = None
        self.queues: list[deque[Transfer]] = [deque() for _ in range(pool.queues)]
        self.turn = 0
        self.workers = 0
        self.offered = False
        self.stopping = False
        self._pool = pool

    def put(self, transfer: Transfer) -> None:
        """Queue a transfer. Does not block."""
        self._pool.put(self, transfer)

    def stop(self) -> None:
        """Close the writer as soon as no worker is in it, then call `on_closed`. Does not block.

        Whoever calls has ended the transfers. Idempotent.
        """
        self._pool.stop(self)

    def is_writing(self, transfer: Transfer) -> bool:
        """Whether a worker is in one of its parts. Once an ended one is not written, it never will be."""
        return self._pool.is_writing(transfer)

    @property
    def parallel(self) -> bool:
        """Whether more than one worker may be here."""
        return self.writer is not None and self.writer.parallel and not self.stopping

    def take(self) -> Transfer | None:
        """The next transfer of which a part may be written now; the queues take turns."""
        for step in range(len(self.queues)):
            queue = self.queues[(self.turn + step) % len(self.queues)]
            while queue and queue[0].ended and not queue[0].writing:
                queue.popleft()
            if queue and queue[0].parts and not queue[0].ended:
                return queue[0]
        return None


@dataclass(eq=False)
class _Worker:
    since: float = 0.0
    relieved: bool = False


class SenderPool:
    """At most `size` workers, started when there is work for them."""

    def __init__(self, size: int, queues: int, ended: Ended) -> None:
        self.queues = queues
        self._size = size
        self._ended = ended
        self._changed = threading.Condition()
        self._offered: deque[Outlet] = deque()  # those where there may be something to do
        self._workers: set[_Worker] = set()  # without those that are relieved
        self._busy: set[_Worker] = set()
        self._threads: set[threading.Thread] = set()
        self._closing = False

    def put(self, outlet: Outlet, transfer: Transfer) -> None:
        with self._changed:
            outlet.queues[transfer.queue].append(transfer)
            self._offer(outlet)
            self._wake()

    def stop(self, outlet: Outlet) -> None:
        with self._changed:
            if outlet.stopping:
                return
            outlet.stopping = True
            unused = outlet.writer is None and not outlet.workers
            if not unused:
                self._offer(outlet)
                self._wake()
        if unused:
            outlet.on_closed()

    def is_writing(self, transfer: Transfer) -> bool:
        with self._changed:
            return transfer.writing > 0

    def relieve(self, now: float) -> None:
        """Replace workers that are stuck, if there is something else to do. `now` is the monotonic clock's."""
        with self._changed:
            stuck = [worker for worker in self._busy if now - worker.since > STUCK_S and not worker.relieved]
            if self._offered and len(self._busy & self._workers) == len(self._workers):
                for worker in stuck:
                    worker.relieved = True
                    self._workers.discard(worker)
                    self._start()

    def close(self) -> None:
        """End the workers. All outlets have been stopped."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            threads = list(self._threads)
        for thread in threads:
            thread.join()

    def _offer(self, outlet: Outlet) -> None:
        if not outlet.offered:
            outlet.offered = True
            self._offered.append(outlet)

    def _wake(self) -> None:
        """Let somebody look at what is offered."""
        if len(self._busy & self._workers) < len(self._workers):
            self._changed.notify()
        elif len(self._workers) < self._size:
            self._start()

    def _start(self) -> None:
        worker = _Worker()
        thread = threading.Thread(target=self._run, args=(worker,), name="transfer-sender", daemon=True)
        self._workers.add(worker)
        self._threads.add(thread)
        thread.start()

    def _run(self, me: _Worker) -> None:
        while job := self._next(me):
            outlet, transfer, part = job
            if transfer is None or part is None:
                self._close(outlet)
            else:
                error = self._write(outlet, transfer, part)
                self._done(outlet, transfer, error)
            with self._changed:
                self._busy.discard(me)
        with self._changed:
            self._workers.discard(me)
            self._threads.discard(threading.current_thread())

    def _next(self, me: _Worker) -> tuple[Outlet, Transfer | None, Pieces | None] | None:
        with self._changed:
            while not me.relieved:
                while self._offered:
                    outlet = self._offered.popleft()
                    outlet.offered = False
                    if outlet.workers and not outlet.parallel:
                        continue  # who is there offers it again
                    transfer = None if outlet.stopping else outlet.take()
                    if transfer is None and not outlet.stopping:
                        continue
                    outlet.workers += 1
                    me.since = time.monotonic()
                    self._busy.add(me)
                    if transfer is None:
                        return outlet, None, None
                    outlet.turn = (transfer.queue + 1) % self.queues
                    transfer.writing += 1
                    transfer.begun = transfer.begun or me.since
                    part = transfer.parts.popleft()
                    if outlet.parallel and outlet.take():
                        self._offer(outlet)
                    if self._offered:
                        self._wake()
                    return outlet, transfer, part
                if self._closing:
                    return None
                self._changed.wait()
            if self._offered:
                self._wake()  # it leaves that to others
            return None

    def _write(self, outlet: Outlet, transfer: Transfer, part: Pieces) -> str:
        """Write one part; returns what went wrong."""
        if not len(part):
            return ""
        try:
            writer = outlet.writer or self._open(outlet)
            writer.write(part, lambda: transfer.give_up)
        except Exception as error:  # an engine raises what it likes, and every handle must end
            if outlet.writer is not None and not outlet.writer.parallel:
                self._close_writer(outlet)
            return str(error) if isinstance(error, TransferError) else f"the engine failed: {error!r}"
        return ""

    def _open(self, outlet: Outlet) -> Writer:
        writer = outlet.open_writer()
        with self._changed:
            outlet.writer = writer
            if outlet.parallel:
                self._offer(outlet)
                self._wake()
        return writer

    def _done(self, outlet: Outlet, transfer: Transfer, error: str) -> None:
        with self._changed:
            transfer.writing -= 1
            outlet.workers -= 1
            transfer.error = transfer.error or error
            if transfer.error:
                transfer.parts.clear()
            over = not transfer.writing and (transfer.ended or not transfer.parts)
            queue = outlet.queues[transfer.queue]
            if over and queue and queue[0] is transfer:
                queue.popleft()
            self._offer(outlet)  # this worker looks at it next
        if over:
            self._ended(transfer, transfer.error)

    def _close(self, outlet: Outlet) -> None:
        self._close_writer(outlet)
        for queue in outlet.queues:
            queue.clear()
        outlet.on_closed()

    @staticmethod
    def _close_writer(outlet: Outlet) -> None:
        writer, outlet.writer = outlet.writer, None
        if writer is None:
            return
        try:
            writer.close()
        except Exception as error:  # an engine that broke may break once more; it is gone in any case
            log.warning("a transfer engine failed while it was closed", error=repr(error))
