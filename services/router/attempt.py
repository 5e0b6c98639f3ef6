"""One try of one sequence: a route, a room, two legs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from google.protobuf.timestamp_pb2 import Timestamp

from common.errors.base import MeshError, Reason
from common.mesh.router_session import RouterSession
from common.mesh.ticket import Ticket
from common.mesh.wire import ticket_to
from common.obs.log import get_logger
from pdmesh.v1.bootstrap_service_pb2 import OpenRoom
from pdmesh.v1.decode_service_pb2 import DecodeCommand, DecodeEvent, DecodeStart
from pdmesh.v1.prefill_service_pb2 import PrefillCommand, PrefillEvent, PrefillStart, SequenceFailed
from pdmesh.v1.types_pb2 import Worker, Writer
from services.router.request import Delta, GenerationRequest
from services.router.sequence import SequenceOutput
from services.router.workers import RETRY_AFTER_S, Route

OPEN_TIMEOUT_S = 10.0  # an owner of the room's shard that died is replaced within its lease

log = get_logger(__name__)


class Retracted(MeshError):
    """Decode gave the sequence's pages to others: it goes on in another attempt, from the tokens it has."""

    def __init__(self, worker_id: str) -> None:
        super().__init__(Reason.OVERLOADED, f"worker {worker_id} ran out of pages and retracted the sequence")


class Rooms:
    """The attempts that have an open room, by room id: where bootstrap's room ends go."""

    def __init__(self) -> None:
        self._attempts: dict[str, Attempt] = {}

    def add(self, room_id: str, attempt: Attempt) -> None:
        self._attempts[room_id] = attempt

    def remove(self, room_id: str) -> None:
        self._attempts.pop(room_id, None)

    def failed(self, room_id: str, reason: str, message: str) -> None:
        """A room ended as FAILED."""
        if attempt := self._attempts.get(room_id):
            attempt.fail(to_error(reason, message))


class Attempt:
    """Runs one sequence on one route, once: `await attempt.run()`.

    `run` returns when the sequence is finished and raises `MeshError` when it failed; either way, and when it is
    cancelled, nothing of it is left on the workers and its room is closed. Deltas go to `deliver` as they come.
    The output goes on from what `output` holds of earlier attempts. Raises `Retracted` when decode ran out of pages.
    `admit_by` (the event loop's time) bounds the wait for decode's reservation.
    """

    def __init__(
        self,
        number: int,
        route: Route,
        request: GenerationRequest,
        output: SequenceOutput,
        deliver: Callable[[Delta], None],
        admit_by: float | None = None,
    ) -> None:
        self.number = number
        self.route = route
        self.request = request
        self.output = output
        self._deliver = deliver
        self._admit_by = admit_by
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._ticket: Ticket | None = None
        self._prefill_leg = PrefillLeg(self)
        self._prefill_id: int | None = None
        self._decode_id: int | None = None

    async def run(self, session: RouterSession, rooms: Rooms) -> None:
        """See the class."""
        try:
            if self.route.prefill is not None:
                room = self._open_room()
                self._ticket = session.begin_room(room) or await session.open_room(room, OPEN_TIMEOUT_S)
                rooms.add(self._ticket.room_id, self)
            self._start_legs()
            await self._done
        finally:
            self._release(session, rooms)

    def fail(self, error: MeshError) -> None:
        """End the attempt with `error`, unless it has ended; the first failure counts."""
        if not self._done.done():
            self._done.set_exception(error)

    # ---------------------------------------------------------------------------------- decode's sink

    def on_event(self, event: DecodeEvent) -> None:
        if self._done.done():
            return
        if event.WhichOneof("event") == "failed":
            self.fail(failure(event.failed))
            return
        if event.WhichOneof("event") == "retracted":
            self.route.decode.forget(event.sequence_id)
            self.fail(Retracted(self.route.decode.worker_id))
            return
        try:
            delta = self.output.accept(event.tokens)
        except MeshError as error:
            self.fail(error)
            return
        except Exception as error:  # a defect must cost one sequence, not the stream that all share
            log.exception("cannot handle tokens", request_id=self.request.request_id, index=self.output.index)
            self.fail(MeshError(Reason.INTERNAL, f"internal error: {type(error).__name__}"))
            return
        if event.tokens.finish_reason:
            self.route.decode.forget(event.sequence_id)
        if self.output.finish:
            self._done.set_result(None)
        self._deliver(delta)

    def on_lost(self, error: MeshError) -> None:
        self.fail(error)

    # ---------------------------------------------------------------------------------- begin and end

    def _open_room(self) -> OpenRoom:
        prefill, request, index = self.route.prefill, self.request, self.output.index
        assert prefill is not None
        output = len(self.output.token_ids)
        return OpenRoom(
            request_id=request.request_id,
            index=index,
            attempt=self.number,
            prefill_worker_id=prefill.worker_id,
            decode_worker_id=self.route.decode.worker_id,
            prompt_tokens=len(request.prompt_of(index)) + output,
            max_new_tokens=request.max_new_tokens_of(index) - output,
            deadline=timestamp_of(request.deadline),
            admission_deadline=None if self._admit_by is None else timestamp_of(self._admit_by),
        )

    def _start_legs(self) -> None:
        """Both at once: decode reserves pages while prefill computes."""
        request, index = self.request, self.output.index
        prompt, sampling = request.prompt_of(index), request.sampling_of(index)
        output_ids = list(self.output.token_ids)
        ticket = ticket_to(self._ticket) if self._ticket else None
        name = f"{request.request_id}/{index}"
        writer = writer_of(self.route.prefill.record) if self.route.prefill else None

        def decode(sequence_id: int) -> DecodeCommand:
            start = DecodeStart(sequence_id=sequence_id, ticket=ticket, request_id=name, writer=writer)
            start.prompt_ids.extend(prompt)
            start.output_ids.extend(output_ids)
            start.sampling.CopyFrom(sampling)
            return DecodeCommand(start=start)

        def prefill(sequence_id: int) -> PrefillCommand:
            start = PrefillStart(sequence_id=sequence_id, ticket=ticket, request_id=name)
            start.prompt_ids.extend(prompt)
            start.output_ids.extend(output_ids)
            start.sampling.CopyFrom(sampling)
            return PrefillCommand(start=start)

        self._decode_id = self.route.decode.start(decode, self)
        self.route.decode.account.sent(self.route.spend, self._decode_id)
        if self.route.prefill is not None:
            self._prefill_id = self.route.prefill.start(prefill, self._prefill_leg)

    def _release(self, session: RouterSession, rooms: Rooms) -> None:
        """Stop whatever still runs. Aborts have no effect on a leg that has ended."""
        error = self._error()
        finished = isinstance(error, Retracted) or (bool(self.output.finish) and error is None)
        if self._decode_id is not None:
            self.route.decode.abort(self._decode_id)  # finished by a stop string, decode still runs
        if self._prefill_id is not None and self.route.prefill is not None:
            stop = self.route.prefill.forget if finished else self.route.prefill.abort
            stop(self._prefill_id)
        if self._ticket is not None:
            rooms.remove(self._ticket.room_id)
            if not finished:
                error = error or MeshError(Reason.ABORTED, "the request was given up")
                session.abort_room(self._ticket, error.reason, error.message)
            session.close_room(self._ticket, error.message if isinstance(error, Retracted) else "")

    def _error(self) -> MeshError | None:
        """Why the attempt failed; None also when it is cancelled."""
        if not self._done.done() or self._done.cancelled():
            return None
        error = self._done.exception()
        assert error is None or isinstance(error, MeshError)
        return error


class PrefillLeg:
    """Takes the prefill worker's news of an attempt."""

    def __init__(self, attempt: Attempt) -> None:
        self._attempt = attempt

    def on_event(self, event: PrefillEvent) -> None:
        attempt = self._attempt
        assert attempt.route.prefill is not None
        attempt.route.prefill.forget(event.sequence_id)
        if event.WhichOneof("event") == "failed":
            attempt.fail(failure(event.failed))
        else:
            output = attempt.output
            output.cached_tokens = max(output.cached_tokens, event.finished.cached_tokens)

    def on_lost(self, error: MeshError) -> None:
        self._attempt.fail(error)


def writer_of(worker: Worker) -> Writer:
    """A prefill worker as its present process, whose connections can be told from others'."""
    return Writer(endpoints=worker.endpoints, epoch=worker.epoch, worker_id=worker.worker_id)


def timestamp_of(at: float) -> Timestamp:
    """The time of day at `at` of the event loop's time."""
    left_s = at - asyncio.get_running_loop().time()
    timestamp = Timestamp()
    timestamp.FromNanoseconds(round((time.time() + left_s) * 1e9))
    return timestamp


def failure(failed: SequenceFailed) -> MeshError:
    return to_error(failed.reason, failed.message)


def to_error(reason: str, message: str) -> MeshError:
    """An error that came over the wire; a reason this version does not know is a defect of the mesh."""
    known = Reason(reason) if reason in Reason.__members__ else Reason.INTERNAL
    error = MeshError(known, message or f"the worker gave no message ({reason})")
    error.retry_after_s = RETRY_AFTER_S if error.retryable else None
    return error
