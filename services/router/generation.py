"""A running request: its sequences, their attempts, and the one stream of deltas that comes of it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator

from common.errors.base import MeshError, Reason
from common.mesh.router_session import RouterSession
from common.obs.log import get_logger
from services.router import metrics
from services.router.admission import Admission
from services.router.attempt import Attempt, Retracted, Rooms
from services.router.passing import Need
from services.router.request import Delta, GenerationRequest, Usage
from services.router.sequence import SequenceOutput
from services.router.workers import Route

FIRST_ATTEMPT = 1
MOST_RETRIES = 2  # of a sequence that failed before its first token
RETRY_DELAY_S = 0.1  # before the first one; twice that before the second
# Failures that say nothing against the request, and that come soon: another try costs the client little.
WORTH_A_RETRY = frozenset(
    {
        Reason.BOOTSTRAP_UNREACHABLE,
        Reason.STORE_FAILED,
        Reason.NO_WORKER,
        Reason.DRAINING,
        Reason.WORKER_LOST,
        Reason.TRANSFER_FAILED,
        Reason.CHECKSUM_MISMATCH,
    }
)

log = get_logger(__name__)


class Generation:
    """One request from its first token to its last, or to its failure.

    A sequence is tried anew when decode retracted it, with the tokens it has, and, a few times, when it failed before
    its first token for a reason that lies with the mesh. Any other failure of any sequence fails the request.
    `deltas` may be iterated once; closing it early gives everything back.
    """

    def __init__(self, request: GenerationRequest, admission: Admission, session: RouterSession, rooms: Rooms) -> None:
        self.request = request
        self._admission = admission
        self._session = session
        self._rooms = rooms
        self._outputs = [SequenceOutput(request, index) for index in range(request.sequences)]
        self._unfinished = len(self._outputs)
        self._tasks: list[asyncio.Task[None]] = []
        self._attempts: list[Attempt] = []
        self._queue: list[Delta] = []
        self._news = asyncio.Event()
        self._error: MeshError | None = None
        self._aborted = False

    async def deltas(self) -> AsyncGenerator[Delta]:
        """The answer, piece by piece; the last piece carries the usage.

        Raises `MeshError` with what failed first, or DEADLINE_EXCEEDED.
        """
        loop = asyncio.get_running_loop()
        expiry = loop.call_at(self.request.deadline, self._expire)
        if not self._aborted:
            self._tasks = [asyncio.create_task(self._run(output)) for output in self._outputs]
        left = len(self._outputs)
        try:
            while left:
                await self._news.wait()
                self._news.clear()
                deltas, self._queue = self._queue, []
                for delta in deltas:
                    left -= bool(delta.finish)
                    yield delta
                if self._error and left:
                    raise self._error
        finally:
            expiry.cancel()
            self._give_up(self._error or MeshError(Reason.ABORTED, "the client left"))
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def abort(self) -> None:
        """End what is unfinished with FINISH_REASON_ABORT. Works before `deltas` is iterated, too."""
        self._aborted = True
        self._give_up(MeshError(Reason.ABORTED, "the client aborted the request"))
        for output in self._outputs:
            if not output.finish:
                self._deliver(output.abort())

    def usage(self) -> Usage:
        """Token counts so far."""
        completion = sum(output.tokens for output in self._outputs)
        first_of_prompt = self._outputs[:: self.request.sampling.n]
        cached = sum(output.cached_tokens for output in first_of_prompt)
        return Usage(self.request.prompt_tokens, completion, cached)

    async def _run(self, output: SequenceOutput) -> None:
        try:
            await self._try_until_done(output)
        except MeshError as error:
            self._fail(error)
        except Exception as error:
            log.exception("a sequence failed unexpectedly", request_id=self.request.request_id, index=output.index)
            self._fail(MeshError(Reason.INTERNAL, f"internal error: {type(error).__name__}"))

    async def _try_until_done(self, output: SequenceOutput) -> None:
        """Attempt after attempt; the first error stands when there is nobody to try again with."""
        number, retries, avoid = FIRST_ATTEMPT, 0, frozenset[str]()
        failed: MeshError | None = None
        while True:
            try:
                route = await self._enter(output, avoid)
            except MeshError as error:
                raise failed or error from None
            try:
                await self._try(number, route, output)
                return
            except Retracted as retracted:
                metrics.RETRACTED.inc()
                log.debug("retracted", request_id=self.request.request_id, attempt=number, why=retracted.message)
            except MeshError as error:
                if error.reason not in WORTH_A_RETRY or output.tokens or retries == MOST_RETRIES:
                    raise
                metrics.RETRIES.labels(error.reason).inc()
                log.info("trying again", request_id=self.request.request_id, attempt=number, why=str(error))
                failed, retries = failed or error, retries + 1
                avoid |= names(route)
                await asyncio.sleep(RETRY_DELAY_S * retries * random.uniform(0.5, 1.5))
            number += 1

    async def _enter(self, output: SequenceOutput, avoid: frozenset[str]) -> Route:
        need = Need(
            group=self.request.model.name,
            tokens=len(self.request.prompt_of(output.index)) + output.tokens,
            remaining=self.request.max_new_tokens_of(output.index) - output.tokens,
            avoid=avoid,
        )
        return await self._admission.enter(self.request, need, resumed=output.tokens > 0)

    async def _try(self, number: int, route: Route, output: SequenceOutput) -> None:
        admit_by = None if output.tokens else self._admission.admit_by()
        attempt = Attempt(number, route, self.request, output, self._deliver, admit_by)
        self._attempts.append(attempt)
        try:
            await attempt.run(self._session, self._rooms)
        finally:
            self._attempts.remove(attempt)
            self._admission.leave(route)

    def _give_up(self, error: MeshError) -> None:
        """Stop what still runs; `error` is what bootstrap is told of it."""
        for attempt in self._attempts:
            attempt.fail(error)
        for task in self._tasks:
            task.cancel()

    def _deliver(self, delta: Delta) -> None:
        if delta.finish:
            self._unfinished -= 1
            if not self._unfinished:
                delta.usage = self.usage()
        self._queue.append(delta)
        self._news.set()

    def _expire(self) -> None:
        self._fail(MeshError(Reason.DEADLINE_EXCEEDED, "the request's deadline passed"))

    def _fail(self, error: MeshError) -> None:
        self._error = self._error or error
        self._news.set()


def names(route: Route) -> frozenset[str]:
    """The workers of a route."""
    return frozenset(link.worker_id for link in (route.prefill, route.decode) if link)
