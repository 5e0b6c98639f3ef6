"""A rank's loop: messages in, a step, messages out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Protocol

import msgspec
import zmq
from msgspec import structs

from common.engine.engine import Engine, StepResult
from common.engine.messages import Load, Retracted, SequenceFailed, Tokens
from common.engine.request import Sequence
from common.errors.base import MeshError, Reason
from common.kvcache.audit import AUDIT_INTERVAL_S, Auditor, Claim
from common.kvcache.hashes import CacheChanges
from common.kvcache.ledger import Audit
from common.worker.messages import (
    AbortSequence,
    FromRank,
    Prefilled,
    RankFailed,
    RankReady,
    Registered,
    RoomEnded,
    RoomFailed,
    RoomFenced,
    RoomQuiet,
    RoomReleased,
    RoomReserved,
    RoomTransferred,
    RoomTransferring,
    StartSequence,
    Stop,
    ToRank,
)
from common.worker.waker import Waker

# Steps that are shorter than any client can tell apart (an emulated engine's, whose times are zero) are taken one
# after the other for so long, and told as one.
BURST_S = 0.002
PENDING_POLL_MS = 500  # how often deadlines of hand-overs are looked at when nothing else happens
AUDIT_POLL_MS = round(AUDIT_INTERVAL_S * 1000)

Outgoing = (
    RankReady
    | RankFailed
    | Tokens
    | Prefilled
    | Retracted
    | SequenceFailed
    | RoomReserved
    | RoomTransferring
    | RoomTransferred
    | RoomFailed
    | RoomQuiet
    | RoomFenced
    | Audit
    | CacheChanges
)
Emit = Callable[[Outgoing], None]


class Handover(Protocol):
    """The rank's side of hand-overs: knows the engine and the transfer backend. Called by the loop's thread only.

    It talks to the front through the `emit` it was made with. No call blocks.
    """

    @property
    def pending(self) -> bool:
        """Whether a hand-over is under way, so that `poll` must be called now and then."""
        ...

    def start(self, message: StartSequence) -> None:
        """Begin a sequence that has a ticket. Raises `MeshError` to refuse it."""
        ...

    def on_message(self, message: RoomReserved | RoomEnded | RoomReleased | Registered) -> None:
        """Apply what the control plane says about a room, or that a new life has begun."""
        ...

    def on_abort(self, sequence_id: int) -> bool:
        """Stop a sequence whose hand-over is under way. False if it is not one, and the engine should."""
        ...

    def on_step(self, result: StepResult) -> None:
        """Act on a step: send computed pages; tell the front of its own sequences that failed, and release them."""
        ...

    def poll(self) -> None:
        """Take note of what the backend did since the last call."""
        ...

    def load(self, engine: Load) -> Load:
        """The engine's load, with what waits and what is promised in hand-overs."""
        ...

    def claims(self) -> Iterable[Claim]:
        """The pages that hand-overs have, beside those of the engine's sequences."""
        ...

    def close(self) -> None:
        """Close the transfer endpoint. The pool stays mapped."""
        ...


class NoHandover:
    """For a worker that does both phases itself."""

    pending = False

    def start(self, message: StartSequence) -> None:
        """Refuse: there is nobody to hand over to."""
        raise MeshError(Reason.UNSUPPORTED, "a unified worker takes no part in a hand-over")

    def on_message(self, message: RoomReserved | RoomEnded | RoomReleased | Registered) -> None:
        """Ignore: it concerns a room that this worker refused."""

    def on_abort(self, sequence_id: int) -> bool:
        """Leave it to the engine."""
        return False

    def on_step(self, result: StepResult) -> None:
        """Nothing to send."""

    def poll(self) -> None:
        """Nothing to take note of."""

    def load(self, engine: Load) -> Load:
        """The engine's: nothing else is here."""
        return engine

    def claims(self) -> Iterable[Claim]:
        """None."""
        return ()

    def close(self) -> None:
        """Nothing to close."""


class RankTurns:
    """An engine and its hand-overs, a turn at a time, without any I/O: messages in, a step, messages out.

    Every sequence that the front starts gets exactly one last message: `Tokens` with a finish (also "abort"),
    `Prefilled`, `Retracted`, or `SequenceFailed`.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._auditor = Auditor(engine.allocator.ledger)
        self._handover: Handover = NoHandover()
        self._outbox: list[Outgoing] = []
        self._sent_load: Load | None = None
        self._last_start = 0
        self._step_s = 0.0  # how long the last step took
        self._stopping = False
        self._burst_s = BURST_S

    def emit(self, message: Outgoing) -> None:
        """Queue a message for the front; it leaves at the end of the loop's turn."""
        self._outbox.append(message)

    def _apply(
        self,
        message: StartSequence | AbortSequence | RoomReserved | RoomEnded | RoomReleased | Registered | Stop,
    ) -> None:
        match message:
            case StartSequence():
                self._start(message)
            case AbortSequence(sequence_id):
                if not self._handover.on_abort(sequence_id):
                    self._abort(sequence_id)
            case Stop():
                self._stopping = True
            case _:
                self._handover.on_message(message)

    def _start(self, message: StartSequence) -> None:
        self._last_start = message.sequence_id
        try:
            if message.ticket is not None:
                self._handover.start(message)
            else:
                request_id = message.request_id
                sequence = Sequence(message.sequence_id, message.prompt_ids, message.sampling, request_id=request_id)
                sequence.output_ids += message.output_ids
                self._engine.add(sequence)
        except MeshError as error:
            self.emit(SequenceFailed(message.sequence_id, error.reason, error.message))

    def _abort(self, sequence_id: int) -> None:
        sequence = self._engine.find(sequence_id)
        if sequence is not None and self._engine.abort(sequence_id):
            self.emit(Tokens(sequence_id, len(sequence.output_ids), [], [], "abort", sequence.cached_tokens))

    def _step(self) -> float | None:
        """Compute a step if there is work, or a burst of very short ones.

        Returns after how many seconds there may be more; None: not by itself.
        """
        began = last = time.monotonic()
        told: dict[int, Tokens] = {}
        while self._engine.has_work:
            result = self._engine.step()
            self._tell(result, told)
            if result.wait_s or not result.scheduled:
                return result.wait_s if result.scheduled else None
            now = time.monotonic()
            self._step_s, last = now - last, now
            if now - began >= self._burst_s or self._stopping:
                return 0.0 if self._engine.has_work else None
        return None

    def _tell(self, result: StepResult, told: dict[int, Tokens]) -> None:
        """Queue a step's news; `told` holds the last tokens of each sequence in this burst, which take up more."""
        self._outbox += [Retracted(sequence.sequence_id) for sequence in result.retracted]
        for tokens in result.tokens:
            if earlier := told.get(tokens.sequence_id):
                earlier.token_ids += tokens.token_ids
                earlier.logprobs += tokens.logprobs
                earlier.finish = tokens.finish
            else:
                told[tokens.sequence_id] = tokens
                self._outbox.append(tokens)
        # A failed sequence that is still held is the hand-over's to tell, together with its room.
        self._outbox += [failure for failure in result.failures if not self._engine.find(failure.sequence_id)]
        self._handover.on_step(result)

    def _take(self) -> FromRank | None:
        """What is queued for the front, with the load if it changed; None if there is nothing to tell."""
        if self._auditor.due:
            self.emit(self._auditor.run(chain(self._engine.claims(), self._handover.claims())))
        if changes := self._engine.pages.take_changes():
            self.emit(changes)
        load = structs.replace(self._handover.load(self._engine.load()), last_start=self._last_start)
        changed = load if load != self._sent_load else None
        if not self._outbox and not changed:
            return None
        batch, self._outbox = FromRank(self._outbox, changed), []
        self._sent_load = load
        return batch


class RankLoop(RankTurns):
    """Turns for the front at the other end of `socket`.

    Without work the loop sleeps until the front or a backend's thread has some, or the next audit is due.
    """

    def __init__(self, socket: zmq.Socket[bytes], engine: Engine, waker: Waker) -> None:
        super().__init__(engine)
        self._socket = socket
        self._waker = waker
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(ToRank)
        self._poller = zmq.Poller()
        self._poller.register(socket, zmq.POLLIN)
        self._poller.register(waker.fd, zmq.POLLIN)

    def stop(self) -> None:
        """Make `run` return after the step under way. May be called by a signal handler."""
        self._stopping = True
        self._waker.wake()

    def run(self, handover: Handover) -> None:
        """Loop until `Stop` or `stop`, then close the hand-over."""
        self._handover = handover
        wait_s: float | None = None
        self.flush()
        while not self._stopping:
            self._receive(wait_s)
            if self._stopping:
                break
            handover.poll()
            if self._outbox and self._step_s >= BURST_S:  # a first token, say, need not wait for the step
                self.flush()
            wait_s = self._step()
            self.flush()
        handover.close()
        self.flush()

    def _receive(self, wait_s: float | None) -> None:
        """Apply what the front sent. Wait for it, or for a call of `Waker.wake`, unless a step is due before."""
        timeout_ms = PENDING_POLL_MS if self._handover.pending else AUDIT_POLL_MS
        if wait_s is not None:  # rounded down: the rest is looked for at once
            timeout_ms = min(int(wait_s * 1000), PENDING_POLL_MS)
        ready = {source for source, _ in self._poller.poll(timeout_ms)}
        if self._waker.fd in ready:
            self._waker.drain()
        while self._socket in ready:
            try:
                data = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            for message in self._decoder.decode(data).messages:
                self._apply(message)

    def flush(self) -> None:
        """Send what there is to tell, as one message."""
        if batch := self._take():
            self._socket.send(self._encoder.encode(batch))
