"""The response of a generating call: runs the generation for as long as the client is there."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import aclosing
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from common.errors.base import MeshError
from services.router.http import sse
from services.router.http.errors import error_body, error_response, json_response
from services.router.request import Delta, GenerationRequest, Usage
from services.router.router import Router

Json = dict[str, Any]


class Shape(ABC):
    """How an API writes deltas."""

    @abstractmethod
    def chunks(self, delta: Delta) -> Iterable[Json]:
        """What is streamed for a delta; perhaps nothing."""

    @abstractmethod
    def usage_chunk(self, usage: Usage) -> Json:
        """The last chunk, for clients that want the usage."""

    @abstractmethod
    def whole(self, deltas: list[list[Delta]], usage: Usage) -> Json:
        """The answer in one piece, from all deltas of each sequence."""


class Answer(Response):
    """Starts to answer with the first delta, so that what fails before it still gets its own status."""

    def __init__(self, router: Router, request: GenerationRequest, shape: Shape, stream: bool, usage: bool) -> None:
        super().__init__()
        self._router = router
        self._request = request
        self._shape = shape
        self._streamed = stream
        self._with_usage = usage
        self._answered = self._left = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one call; gives the generation up as soon as the client disconnects."""
        serving = asyncio.current_task()
        assert serving is not None
        watcher = asyncio.create_task(self._watch(receive, serving))
        try:
            await (self._stream if self._streamed else self._whole)(scope, receive, send)
        except asyncio.CancelledError:
            if not self._left or serving.uncancel():  # it was not the client, or not it alone
                raise
        finally:
            watcher.cancel()
            self._router.depart(self._request.request_id)

    async def _watch(self, receive: Receive, serving: asyncio.Task[Any]) -> None:
        """Cancel `serving` when the client leaves before it has its answer, whose end looks the same from here."""
        while (await receive())["type"] != "http.disconnect":
            pass
        if not self._answered:
            self._left = True
            serving.cancel()

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        deltas: list[list[Delta]] = [[] for _ in range(self._request.sequences)]
        headers = {"x-request-id": self._request.request_id}
        try:
            async with aclosing(self._router.generate(self._request)) as generated:
                async for delta in generated:
                    deltas[delta.index].append(delta)
                    if delta.usage:  # the last one; the client need not wait for what is still to be tidied up
                        response = json_response(self._shape.whole(deltas, delta.usage), headers=headers)
                        self._answered = True
                        await response(scope, receive, send)
        except MeshError as error:
            await error_response(error, self._request.request_id)(scope, receive, send)

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False
        try:
            async with aclosing(self._router.generate(self._request)) as generated:
                async for delta in generated:
                    if not started:
                        await self._start(send)
                        started = True
                    events = [sse.event(chunk) for chunk in self._shape.chunks(delta)]
                    if delta.usage:
                        events += [sse.event(self._shape.usage_chunk(delta.usage))] if self._with_usage else []
                        events.append(sse.DONE)
                    if events:
                        await send({"type": "http.response.body", "body": b"".join(events), "more_body": True})
        except MeshError as error:
            if not started:
                await error_response(error, self._request.request_id)(scope, receive, send)
                return
            body = sse.event(error_body(error), "error")
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def _start(self, send: Send) -> None:
        headers = [*sse.HEADERS, (b"x-request-id", self._request.request_id.encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})


def usage_json(usage: Usage) -> Json:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }
