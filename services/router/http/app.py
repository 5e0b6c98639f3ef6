"""The HTTP application: routes, and errors in OpenAI's shape."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from common.errors.base import MeshError, Reason
from common.obs import metrics
from services.router.http.body import parse
from services.router.http.chat import chat
from services.router.http.completions import complete
from services.router.http.errors import error_response, error_type, json_response
from services.router.http.models import list_json, model_json
from services.router.http.schemas import ChatRequest, CompletionRequest
from services.router.router import Router, new_request_id
from services.router.validate import REQUEST_ID

PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"


Call = Callable[[Request], Awaitable[Response]]


def make_app(router: Router) -> ASGIApp:
    """The application for one router."""
    app = FastAPI(title="pdmesh", docs_url=None, redoc_url=None)
    calls = add_openai(app, router)
    add_operations(app, router)

    @app.exception_handler(MeshError)
    async def refused(request: Request, error: MeshError) -> Response:
        return error_response(error, request_id_of(request, "req"))

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        body = {"message": message, "type": error_type(error.status_code), "param": None, "code": None}
        return json_response({"error": body}, error.status_code, dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> Response:  # the server logs the traceback
        return broken_response(request, error)

    return Shortcut(calls, app)


class Shortcut:
    """Serves the calls that generate by itself and leaves the rest to FastAPI.

    They parse their own bodies, so that all that FastAPI does for them is to document them; for a short answer that
    would be a fifth of the router's work.
    """

    def __init__(self, calls: Mapping[str, Call], app: ASGIApp) -> None:
        self._calls = calls
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        call = self._calls.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if call is None:
            await self._app(scope, receive, send)
            return
        started = False

        async def sending(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        request = Request(scope, receive)
        try:
            response = await call(request)
        except MeshError as error:
            response = error_response(error, request_id_of(request, "req"))
        except Exception as error:
            await broken_response(request, error)(scope, receive, send)
            raise  # the server logs the traceback
        try:
            await response(scope, receive, sending)
        except Exception as error:
            if not started:
                await broken_response(request, error)(scope, receive, send)
            raise


def broken_response(request: Request, error: Exception) -> Response:
    wrapped = MeshError(Reason.INTERNAL, f"internal error: {type(error).__name__}")
    return error_response(wrapped, request_id_of(request, "req"))


def add_openai(app: FastAPI, router: Router) -> dict[str, Call]:
    """OpenAI's routes; returns those that generate, by path."""
    limit = router.config.max_payload_size

    @app.post("/v1/completions", openapi_extra=takes(CompletionRequest))
    async def completions(request: Request) -> Response:
        request_id = own_request_id(request, "cmpl")
        async with arrival(router, request_id, "completions"):
            return await complete(router, await parse(request, CompletionRequest, limit), request_id)

    @app.post("/v1/chat/completions", openapi_extra=takes(ChatRequest))
    async def chat_completions(request: Request) -> Response:
        request_id = own_request_id(request, "chatcmpl")
        async with arrival(router, request_id, "chat"):
            return await chat(router, await parse(request, ChatRequest, limit), request_id)

    @app.get("/v1/models")
    async def models() -> Response:
        return json_response(list_json(router.directory.models()))

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        return json_response(model_json(router.directory.get(name)))

    return {"/v1/completions": completions, "/v1/chat/completions": chat_completions}


def add_operations(app: FastAPI, router: Router) -> None:
    @app.get("/health")
    async def health() -> Response:
        """The process is alive."""
        return json_response({"status": "ok"})

    @app.get("/ready")
    async def ready() -> Response:
        """The router can serve at least one model."""
        problem = router.not_ready()
        return json_response({"ready": not problem, "reason": problem or None}, 503 if problem else 200)

    @app.get("/metrics")
    async def metrics_page() -> Response:
        return Response(metrics.page(), media_type=PROMETHEUS)


@asynccontextmanager
async def arrival(router: Router, request_id: str, api: str) -> AsyncIterator[None]:
    """A call on its way to an `Answer`, which sees to the rest. Raises `MeshError` where there is no place for it."""
    await router.arrive(request_id, api)
    try:
        yield
    except BaseException:
        router.depart(request_id)
        raise


def takes(schema: type[BaseModel]) -> dict[str, Any]:
    """The request body of a route that parses it itself, for the OpenAPI document."""
    content = {"application/json": {"schema": schema.model_json_schema()}}
    return {"requestBody": {"required": True, "content": content}}


def own_request_id(request: Request, prefix: str) -> str:
    """The client's `X-Request-Id`, checked later, or a new one."""
    return request.headers.get("x-request-id") or new_request_id(prefix)


def request_id_of(request: Request, prefix: str) -> str:
    """The same for an error's response: an id that may not stand in a header is replaced."""
    given = request.headers.get("x-request-id", "")
    return given if REQUEST_ID.fullmatch(given) else new_request_id(prefix)
