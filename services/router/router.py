"""The router below its APIs: a draft goes in, deltas come out."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing

from common.config.tls import Credentials
from common.errors.base import MeshError, Reason
from common.mesh.router_session import RouterSession
from common.obs.log import get_logger
from pdmesh.v1 import types_pb2
from pdmesh.v1.bootstrap_service_pb2 import RoomEnded
from services.router import metrics
from services.router.admission import Admission
from services.router.attempt import Rooms
from services.router.config import RouterConfig
from services.router.directory import Directory, Texts
from services.router.generation import Generation
from services.router.policy.registry import make_policy
from services.router.request import Delta, Draft, GenerationRequest
from services.router.validate import check_request_id, refusal, validate
from services.router.workers import WorkerPool

# Between looks at a view of the workers that keeps changing: so long, and so many times what a look takes. With a
# thousand workers that is a few milliseconds, and there is a heartbeat every few milliseconds.
VIEW_INTERVAL_S = 0.01
VIEW_PAUSE = 20
INLINE_CHARACTERS = 8192  # longer texts are tokenized in a thread

log = get_logger(__name__)


class Router:
    """What all APIs share. Made inside the event loop; `start`, then `drain` and `close`.

    `on_change` is called whenever `not_ready` may have changed.
    """

    def __init__(
        self,
        config: RouterConfig,
        bootstrap_address: str,
        on_change: Callable[[], None] | None = None,
        log_requests: bool = False,
        tls: Credentials | None = None,
    ) -> None:
        self.config = config
        self.directory = Directory(config.tokenizer_path)
        self.session = Session(bootstrap_address, self._workers_changed, self._room_ended, tls)
        prefill_policy, decode_policy = make_policy(config.prefill_policy), make_policy(config.decode_policy)
        self.pool = WorkerPool(prefill_policy, decode_policy, self._changed, tls)
        self._on_change = on_change
        self._log_requests = log_requests
        self._rooms = Rooms()
        self._admission = Admission(
            self.pool, config.max_concurrent_requests, config.max_queued_requests, config.queue_timeout
        )
        self.pool.on_credit = self._admission.admit
        self._admission.on_wait = self.session.request_queued
        self._requests: dict[str, Generation] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False
        self._following: asyncio.TimerHandle | None = None
        self._rested_at = 0.0
        self._closed = False

    # ---------------------------------------------------------------------------------- requests

    async def arrive(self, request_id: str, api: str) -> None:
        """A call came of which nothing is read yet. `depart` must follow, whatever becomes of it.

        Raises `MeshError` (OVERLOADED) where there would be no place for it, before anything is done for it.
        """
        try:
            rush = self._admission.arrive(request_id)
        except MeshError as error:
            self._refused(request_id, api, error)
            raise
        if rush:  # who came at the same time and has no place is told first: it takes less long
            await asyncio.sleep(0)

    def depart(self, request_id: str) -> None:
        """The call is over, if it was not before. Idempotent."""
        self._admission.depart(request_id)

    async def prepare(self, draft: Draft) -> GenerationRequest:
        """Tokenize and check. Raises `MeshError`; nothing is held yet."""
        try:
            return await self._prepare(draft)
        except MeshError as error:
            self._refused(draft.request_id, draft.api, error)
            raise

    def _refused(self, request_id: str, api: str, error: MeshError) -> None:
        metrics.REQUESTS.labels(api, error.reason.lower()).inc()
        if error.reason is Reason.OVERLOADED:
            self.session.request_failed(request_id, error)

    async def _prepare(self, draft: Draft) -> GenerationRequest:
        arrived = asyncio.get_running_loop().time()
        self._check_open(draft.request_id)
        check_request_id(draft.request_id, draft.names)
        model = self.directory.get(draft.model)
        texts = await self.directory.texts(model)
        prompts = [await self._to_ids(prompt, draft, texts) for prompt in draft.prompts]
        if draft.sampling.stop:
            texts.need_tokenizer()
        timeout_s = self.config.request_timeout_secs if draft.timeout_s is None else draft.timeout_s
        return validate(draft, model, texts.tokenizer, prompts, arrived + timeout_s)

    async def _to_ids(self, prompt: str | Sequence[int], draft: Draft, texts: Texts) -> list[int]:
        if not isinstance(prompt, str):
            return list(prompt)
        if not prompt:
            name = draft.names.get("prompt", "prompt")
            raise MeshError(Reason.EMPTY_PROMPT, f"{name} is empty", parameter=name)
        if len(prompt) > (limit := self.config.max_payload_size):
            raise MeshError(Reason.BODY_TOO_LARGE, f"the prompt exceeds {limit} characters", parameter="prompt")
        encode = texts.need_tokenizer().encode
        if len(prompt) <= INLINE_CHARACTERS:
            return encode(prompt, draft.add_special_tokens)
        return await asyncio.to_thread(encode, prompt, draft.add_special_tokens)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Delta]:
        """The answer, piece by piece, the last with the usage. Close it to give the request up.

        Raises `MeshError`.
        """
        self._check_open(request.request_id)
        watch = Stopwatch(request)
        generation = Generation(request, self._admission, self.session, self._rooms)
        self._requests[request.request_id] = generation
        self._idle.clear()
        try:
            async with aclosing(generation.deltas()) as deltas:
                async for delta in deltas:
                    watch.saw(delta)
                    yield delta
            watch.ended("ok", self._log_requests)
        except MeshError as error:
            watch.ended(error.reason.lower(), self._log_requests)
            self.session.request_failed(request.request_id, error)
            raise
        except (asyncio.CancelledError, GeneratorExit):
            watch.ended("cancelled", self._log_requests)
            raise
        finally:
            self._admission.ended(request.request_id)
            del self._requests[request.request_id]
            if not self._requests:
                self._idle.set()

    def abort(self, request_id: str) -> bool:
        """Abort a request; False when there is none."""
        if (generation := self._requests.get(request_id)) is None:
            return False
        generation.abort()
        return True

    def _check_open(self, request_id: str) -> None:
        if self._draining:
            raise MeshError(Reason.DRAINING, "the router is shutting down", retry_after_s=1.0)
        if request_id in self._requests:
            raise refusal("request_id", f"{request_id} is running already", {})

    # ---------------------------------------------------------------------------------- life

    def start(self) -> None:
        """Begin to follow bootstrap."""
        self.session.start()

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests, wait for running ones, then abort what is left."""
        self._draining = True
        self._changed()
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            log.warning("requests still running at the end of the drain", requests=len(self._requests))
            for request_id in list(self._requests):
                self.abort(request_id)

    async def close(self) -> None:
        """Leave bootstrap and the workers. Idempotent."""
        self._closed = True
        await self.session.close()
        if self._following:
            self._following.cancel()
        await self.pool.close()
        await self.directory.close()

    # ---------------------------------------------------------------------------------- readiness

    def not_ready(self) -> str:
        """Why this router cannot serve at the moment; empty when it can serve some model."""
        if self._draining:
            return "the router is shutting down"
        if not self.session.ready.is_set():
            return f"bootstrap at {self.session.address} is not connected"
        models = self.directory.models()
        if not models:
            return "no worker has registered yet"
        lacking = [(model.name, self.pool.lacking(model.name)) for model in models]
        if all(why for _, why in lacking):
            return "; ".join(f"{name}: {why}" for name, why in lacking)
        return ""

    def _changed(self) -> None:
        self._admission.workers_changed()
        metrics.READY.set(not self.not_ready())
        if self._on_change:
            self._on_change()

    # ---------------------------------------------------------------------------------- bootstrap

    def _workers_changed(self) -> None:
        """Follow the view soon: loads change it many times a second, and each look costs as much as it is long."""
        if self._following is None and not self._closed:
            loop = asyncio.get_running_loop()
            self._following = loop.call_at(max(loop.time() + VIEW_INTERVAL_S, self._rested_at), self._follow)

    def _follow(self) -> None:
        began = asyncio.get_running_loop().time()
        self._following = None
        self.directory.update(self.session.workers.values())
        self.pool.update(self.session.workers)
        now = asyncio.get_running_loop().time()
        self._rested_at = now + VIEW_PAUSE * (now - began)

    def _room_ended(self, ended: RoomEnded) -> None:
        if ended.state == types_pb2.ROOM_STATE_FAILED:
            self._rooms.failed(ended.ticket.room_id, ended.reason, ended.message)


class Session(RouterSession):
    """A session with bootstrap whose loss is a change, too."""

    def lost(self, error: MeshError) -> None:
        super().lost(error)
        if self.on_workers_changed:
            self.on_workers_changed()


class Stopwatch:
    """Times and counts one request."""

    def __init__(self, request: GenerationRequest) -> None:
        self._request = request
        self._now = asyncio.get_running_loop().time
        self._start = self._now()
        self._last_token: dict[int, float] = {}
        self._tokens = 0
        metrics.PROMPT_TOKENS.inc(request.prompt_tokens)

    def saw(self, delta: Delta) -> None:
        if not (count := len(delta.token_ids)):
            return
        now = self._now()
        if not self._last_token:
            metrics.TTFT_SECONDS.observe(now - self._start)
        if (last := self._last_token.get(delta.index)) is not None:
            metrics.ITL_SECONDS.observe((now - last) / count)
        self._last_token[delta.index] = now
        self._tokens += count
        metrics.GENERATION_TOKENS.inc(count)

    def ended(self, outcome: str, log_it: bool) -> None:
        seconds = self._now() - self._start
        metrics.REQUESTS.labels(self._request.api, outcome).inc()
        metrics.REQUEST_SECONDS.observe(seconds)
        if log_it or outcome not in ("ok", "cancelled", "overloaded"):  # no flood of words on top of one of requests
            log.info(
                "request ended",
                request_id=self._request.request_id,
                api=self._request.api,
                outcome=outcome,
                model=self._request.model.name,
                prompt_tokens=self._request.prompt_tokens,
                generated_tokens=self._tokens,
                sequences=self._request.sequences,
                seconds=round(seconds, 4),
            )


def new_request_id(prefix: str) -> str:
    """A fresh id, such as `cmpl-9f86d081884c7d65`."""
    return f"{prefix}-{secrets.token_hex(12)}"
