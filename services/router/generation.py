"""A running request: its sequences, their attempts, and the one stream of deltas that comes of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from common.errors.base import MeshError, Reason
from common.mesh.router_session import RouterSession
from common.obs.log import get_logger
from services.router.attempt import Attempt, Rooms
from services.router.request import Delta, GenerationRequest, Usage
from services.router.sequence import SequenceOutput
from services.router.workers import WorkerPool

FIRST_ATTEMPT = 1

log = get_logger(__name__)


class Generation:
    """One request from its first token to its last, or to its failure.

    The first failure of any sequence fails the request. `deltas` may be iterated once; closing it early gives
    everything back.
    """

    def __init__(self, request: GenerationRequest, pool: WorkerPool, session: RouterSession, rooms: Rooms) -> None:
        self.request = request
        self._pool = pool
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
            route = self._pool.choose(self.request)
            attempt = Attempt(FIRST_ATTEMPT, route, self.request, output, self._deliver)
            self._attempts.append(attempt)
            await attempt.run(self._session, self._rooms)
        except MeshError as error:
            self._fail(error)
        except Exception as error:
            log.exception("a sequence failed unexpectedly", request_id=self.request.request_id, index=output.index)
            self._fail(MeshError(Reason.INTERNAL, f"internal error: {type(error).__name__}"))

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
