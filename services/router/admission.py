"""Who may start, and who waits: the one queue of a router."""

from __future__ import annotations

import asyncio
from bisect import insort
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from common.errors.base import MeshError, Reason
from common.mesh.credit import Credit, most_pages
from services.router import metrics
from services.router.passing import Need, next_to_go
from services.router.request import GenerationRequest
from services.router.workers import RETRY_AFTER_S, Route, WorkerPool

MOST_PASSES = 32  # of smaller sequences before one that does not fit
LOOK_AHEAD = 128  # sequences that do not fit, looked at to find one that does
LEAST_PATIENCE_S = 1.0  # with rooms that several routers opened for the same credit
LONGEST_RETRY_S = 60.0
TOLD_AFTER_S = 0.25  # of waiting: then somebody may want to know why
RATE_WINDOW = 64  # admissions from which the time until a place is free is estimated


@dataclass(slots=True, eq=False)
class Waiter:
    """A sequence in the queue. Those that were admitted before, and retracted, come first."""

    request: GenerationRequest
    need: Need
    arrived: float
    resumed: bool
    route: asyncio.Future[Route] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    @property
    def place(self) -> tuple[bool, float]:
        return not self.resumed, self.arrived


class Open(dict[str, dict[str, Credit | None]]):
    """What each worker of a group can still be given, looked up when the group is first asked for."""

    def __init__(self, pool: WorkerPool) -> None:
        super().__init__()
        self._pool = pool
        self._roomy: dict[str, bool] = {}

    def __missing__(self, group: str) -> dict[str, Credit | None]:
        self[group] = self._pool.offers(group)
        return self[group]

    def roomy(self, group: str) -> bool:
        """Whether some worker has room for anything at all: if not, nobody's turn need be looked at."""
        if (known := self._roomy.get(group)) is None:
            credits = self[group].values()
            known = self._roomy[group] = any(credit is None or credit.fits(1) for credit in credits)
        return known

    def spent(self, route: Route) -> None:
        """The route's worker has less from now on."""
        group = route.decode.record.model.served_model_name
        self[group][route.decode.worker_id] = route.decode.account.credit
        self._roomy.pop(group, None)


class Admission:
    """Gives sequences their routes: at once, or when decode's credit allows it, in the order that `passing` says.

    At most `max_running` requests have sequences that were admitted. At most `max_queued` have none yet: further
    ones are refused. A sequence that has been admitted before is never refused for want of room: it waits until
    its request's deadline, as long as there are workers. `on_wait` is told of a request that has waited for a moment,
    and what for.
    """

    on_wait: Callable[[str, str], None] | None = None

    def __init__(self, pool: WorkerPool, max_running: int, max_queued: int, queue_timeout_s: float) -> None:
        self._pool = pool
        self._max_running = max_running
        self._max_queued = max_queued
        self._queue_timeout_s = queue_timeout_s
        self._waiting: list[Waiter] = []
        self._waiters: dict[Need, Waiter] = {}
        self._groups: Counter[str] = Counter()
        self._running: set[str] = set()
        self._arriving: set[str] = set()  # requests that are being read and checked
        self._queued: dict[str, int] = {}  # sequences that wait, of requests that have not begun
        self._admitted_at: deque[float] = deque(maxlen=RATE_WINDOW)

    @property
    def queued(self) -> int:
        """Requests that wait and have not begun."""
        return len(self._queued)

    def arrive(self, request_id: str) -> bool:
        """A request came that will want a place once it is read and checked, until it enters or `depart`s.

        Tells whether others are on their way, too. Raises `MeshError` (OVERLOADED) if all places are taken then,
        whatever it asks for: it costs no more than this.
        """
        if self.queued + len(self._arriving) >= self._max_queued:
            free = min(self._pool.free_sequences(), self._max_running - len(self._running))
            if self.queued + len(self._arriving) >= self._max_queued + max(0, free):
                raise self._queue_full()
        self._arriving.add(request_id)
        return len(self._arriving) > 1

    def depart(self, request_id: str) -> None:
        """The request is not on its way any more. Idempotent."""
        self._arriving.discard(request_id)

    async def enter(self, request: GenerationRequest, need: Need, *, resumed: bool = False) -> Route:
        """A route for a sequence, with its credit spent. Give it back with `leave`.

        Raises `MeshError`: OVERLOADED when the queue is full or the wait is too long, NO_WORKER, CONTEXT_TOO_LONG
        for a sequence that fits no worker at all.
        """
        loop = asyncio.get_running_loop()
        self.depart(request.request_id)
        if not resumed:
            self._check(need)
        waiter = Waiter(request, need, loop.time(), resumed)
        insort(self._waiting, waiter, key=lambda other: other.place)
        self._waiters[need] = waiter
        self._groups[need.group] += 1
        self._enqueued(waiter, 1)
        try:
            self.admit()
            if waiter.route.done():
                return waiter.route.result()
            if self.queued > self._max_queued and request.request_id in self._queued:
                raise self._queue_full()
            return await self._wait(waiter)
        except BaseException:
            if waiter.route.done() and not waiter.route.cancelled() and not waiter.route.exception():
                self.leave(waiter.route.result())  # it came at the last moment
            raise
        finally:
            self._remove(waiter)

    def admit_by(self) -> float:
        """Until when, on the event loop's clock, decode must have reserved for a sequence that is sent now."""
        return asyncio.get_running_loop().time() + max(self._queue_timeout_s, LEAST_PATIENCE_S)

    def leave(self, route: Route) -> None:
        """A sequence's attempt is over: credit that did not reach the worker is free again."""
        route.decode.account.give_back(route.spend)
        self.admit()

    def ended(self, request_id: str) -> None:
        """A request is over."""
        self.depart(request_id)
        if request_id in self._running:
            self._running.discard(request_id)
            metrics.RUNNING.dec()
            self.admit()

    def admit(self) -> None:
        """Let everybody go who can: to be called when credit, places or workers have come."""
        offers = Open(self._pool)
        while any(offers.roomy(group) for group in self._groups):  # or a long queue would be walked for nothing
            eligible = self._eligible(offers)
            chosen = next_to_go(eligible, offers, most_passes=MOST_PASSES, look_ahead=LOOK_AHEAD)
            if chosen is None:
                return
            for passed in chosen.passes:
                passed.passed += 1
            waiter = self._waiters[chosen.need]
            route = self._pool.route(waiter.request, waiter.need, chosen.workers)
            offers.spent(route)
            self._begin(waiter)
            waiter.route.set_result(route)

    def workers_changed(self) -> None:
        """Workers came or went: requests that have not begun and that nobody is left to serve are told so."""
        self.admit()
        fresh = [waiter for waiter in self._waiting if not waiter.resumed and not waiter.route.done()]
        unserved = {waiter.need.group for waiter in fresh}
        unserved = {group for group in unserved if not self._pool.decodes(group)}
        for waiter in fresh:
            if waiter.need.group in unserved:
                waiter.route.set_exception(self._no_worker(waiter.need.group))

    # ---------------------------------------------------------------------------------- parts

    def _eligible(self, offers: Open) -> Iterator[Need]:
        """Those of the queue that may begin: of requests that run already, and of others while there are places."""
        full = len(self._running) >= self._max_running
        for waiter in self._waiting:
            may_begin = not full or waiter.request.request_id in self._running
            if may_begin and offers.roomy(waiter.need.group) and not waiter.route.done():
                yield waiter.need

    def _begin(self, waiter: Waiter) -> None:
        self._remove(waiter)
        request_id = waiter.request.request_id
        if request_id not in self._running:
            self._running.add(request_id)
            metrics.RUNNING.inc()
            self._queued.pop(request_id, None)  # its other sequences wait as part of a request that runs
            metrics.QUEUED.set(len(self._queued))
        self._admitted_at.append(asyncio.get_running_loop().time())

    def _remove(self, waiter: Waiter) -> None:
        if self._waiters.pop(waiter.need, None):
            self._waiting.remove(waiter)
            self._groups[waiter.need.group] -= 1
            if not self._groups[waiter.need.group]:
                del self._groups[waiter.need.group]
            self._enqueued(waiter, -1)

    def _enqueued(self, waiter: Waiter, by: int) -> None:
        request_id = waiter.request.request_id
        if request_id not in self._running and not waiter.resumed:
            count = self._queued.get(request_id, 0) + by
            if count > 0:
                self._queued[request_id] = count
            else:
                self._queued.pop(request_id, None)
            metrics.QUEUED.set(len(self._queued))

    async def _wait(self, waiter: Waiter) -> Route:
        if not self._has_begun(waiter):
            told_after_s = min(TOLD_AFTER_S, self._queue_timeout_s)
            await asyncio.wait((waiter.route,), timeout=told_after_s)
            if not waiter.route.done():
                self._tell(waiter)
                await asyncio.wait((waiter.route,), timeout=self._queue_timeout_s - told_after_s)
            if not waiter.route.done() and not self._has_begun(waiter):
                raise self._overloaded(f"decode had no room within {self._queue_timeout_s:g} s")
        while not waiter.route.done():
            await asyncio.wait((waiter.route,), timeout=max(self._queue_timeout_s, LEAST_PATIENCE_S))
            if not waiter.route.done() and not self._pool.decodes(waiter.need.group):
                raise self._no_worker(waiter.need.group)
        return waiter.route.result()

    def _tell(self, waiter: Waiter) -> None:
        if self.on_wait:
            full = len(self._running) >= self._max_running
            lacks = f"all {self._max_running} places are taken" if full else "decode has no credit for it"
            what = f"{lacks}, with {waiter.need.tokens} tokens known and up to {waiter.need.remaining} to come"
            self.on_wait(waiter.request.request_id, f"{what}; {self.queued} requests wait there")

    def _has_begun(self, waiter: Waiter) -> bool:
        """Whether something of its request was admitted before."""
        return waiter.resumed or waiter.request.request_id in self._running

    def _check(self, need: Need) -> None:
        """Raise `MeshError` for a sequence that no worker can take, whatever happens."""
        workers = self._pool.decodes(need.group)
        if not workers:
            raise self._no_worker(need.group)
        largest = max(workers, key=lambda worker: worker.pool_tokens)
        pages = largest.record.pool_pages
        if pages and most_pages(need.tokens, need.remaining, largest.record.kv_layout.page_size) > pages:
            message = (
                f"{need.tokens} prompt tokens and {need.remaining} new ones are more than the largest KV pool holds "
                f"({largest.pool_tokens} tokens)"
            )
            raise MeshError(Reason.CONTEXT_TOO_LONG, message)

    def _no_worker(self, group: str) -> MeshError:
        message = f"no worker is ready to serve {group}: {self._pool.lacking(group)}"
        return MeshError(Reason.NO_WORKER, message, retry_after_s=RETRY_AFTER_S)

    def _queue_full(self) -> MeshError:
        return self._overloaded(f"{self._max_queued} requests wait already")

    def _overloaded(self, why: str) -> MeshError:
        return MeshError(Reason.OVERLOADED, f"the mesh is full: {why}", retry_after_s=self._retry_after_s())

    def _retry_after_s(self) -> float:
        """When a request that comes now would be admitted, going by how fast others were."""
        times = self._admitted_at
        if len(times) < 2 or times[-1] <= times[0]:
            return RETRY_AFTER_S
        each_s = (asyncio.get_running_loop().time() - times[0]) / (len(times) - 1)
        return min(LONGEST_RETRY_S, max(RETRY_AFTER_S, each_s * (self.queued + 1)))
