"""One thread a peer that does the writing, in order, blocking where its engine blocks."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from common.transfer.base import Completion, Handle, HandleState, TransferError
from common.transfer.runs import LENGTH, Pieces

GiveUp = Callable[[], bool]


class Writer(Protocol):
    """An engine's way into one peer's pool. Made, used and closed by one thread."""

    def write(self, pieces: Pieces, give_up: GiveUp) -> None:
        """Copy; return when all bytes are at the peer. Raises `TransferError`.

        Asks `give_up` between batches, and returns soon after it says so, by raising.
        """

    def close(self) -> None:
        """Free the engine's side of the connection. When this returns, this process writes no more."""


@dataclass(eq=False)
class Transfer:
    """A submitted transfer. `ended` is set once, by whoever ends it first: the writer, the clock or a loss.

    `begun` is when its turn to be written came; it waits until then.
    """

    handle: Handle
    pieces: Pieces
    timeout_s: float
    submitted: float = field(default_factory=time.monotonic)
    begun: float | None = None
    ended: bool = False

    @property
    def deadline(self) -> float:
        return self.submitted + self.timeout_s

    def completion(self, state: HandleState, error: str) -> Completion:
        """How it ended, just now."""
        now = time.monotonic()
        return Completion(
            self.handle,
            state,
            error,
            seconds=now - self.submitted,
            queued_s=(now if self.begun is None else min(self.begun, now)) - self.submitted,
            nbytes=int(self.pieces[:, LENGTH].sum()),
            descriptors=len(self.pieces),
        )


class PeerQueue(Protocol):
    """What takes the transfers to one peer, in order; a `Dispatcher` unless the backend has its own."""

    def put(self, transfer: Transfer) -> None:
        """Queue a transfer. Does not block."""

    def stop(self) -> None:
        """End after what is queued; whoever calls has ended those transfers."""

    def join(self) -> None:
        """Wait until nothing more is written."""


class Dispatcher:
    """Runs a peer's transfers one after the other; `open_writer` and the writer run in its thread."""

    def __init__(
        self,
        name: str,
        open_writer: Callable[[], Writer],
        finish: Callable[[Transfer, HandleState, str], None],
    ) -> None:
        self._open_writer = open_writer
        self._finish = finish
        self._queue: queue.SimpleQueue[Transfer | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, transfer: Transfer) -> None:
        self._queue.put(transfer)

    def stop(self) -> None:
        """Ask the thread to end after what is queued; whoever calls has ended those transfers."""
        self._queue.put(None)

    def join(self) -> None:
        """Wait until the writer is closed."""
        self._thread.join()

    def _run(self) -> None:
        writer: Writer | None = None
        try:
            while (transfer := self._queue.get()) is not None:
                if transfer.ended:
                    continue
                try:
                    writer = writer or self._open_writer()
                    transfer.begun = time.monotonic()
                    self._write(writer, transfer)
                except Exception as error:  # an engine raises what it likes, and every handle must end
                    self._finish(transfer, HandleState.FAILED, _sentence(error))
                else:
                    self._finish(transfer, HandleState.DONE, "")
        finally:
            if writer is not None:
                writer.close()

    @staticmethod
    def _write(writer: Writer, transfer: Transfer) -> None:
        writer.write(transfer.pieces, lambda: transfer.ended)


def _sentence(error: Exception) -> str:
    return str(error) if isinstance(error, TransferError) else f"the engine failed: {error!r}"
