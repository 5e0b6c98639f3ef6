"""The one place where exceptions meet gRPC status, and where a call without a deadline gets one."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, NoReturn, TypeAlias

import grpc

from common.errors.base import MeshError, Reason
from common.obs.log import get_logger, log_context
from common.rpc.status import to_trailers

log = get_logger(__name__)

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
REQUEST_ID_KEY = "x-request-id"


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Turns `MeshError` into its status with details, and anything unexpected into INTERNAL with a logged traceback.

    A unary call that brings no deadline gets `default_deadline_s`. The caller's `x-request-id` stands in what the
    handler logs.
    """

    def __init__(self, default_deadline_s: float) -> None:
        self.default_deadline_s = default_deadline_s

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        handler = await continuation(handler_call_details)
        if handler is None:  # an unknown method: gRPC answers UNIMPLEMENTED
            return None
        metadata = dict(handler_call_details.invocation_metadata or ())
        ids = {"rpc": handler_call_details.method}
        if request_id := metadata.get(REQUEST_ID_KEY):
            ids["request_id"] = str(request_id)
        kind = "_".join("stream" if s else "unary" for s in (handler.request_streaming, handler.response_streaming))
        behaviour = getattr(handler, kind)
        if inspect.isasyncgenfunction(behaviour):
            wrapped: Any = guard_stream(behaviour, ids)
        elif inspect.iscoroutinefunction(behaviour):
            wrapped = guard_call(behaviour, ids, self.default_deadline_s if kind == "unary_unary" else None)
        else:
            return handler
        make = getattr(grpc, f"{kind}_rpc_method_handler")
        made: Handler = make(wrapped, handler.request_deserializer, handler.response_serializer)
        return made


def guard_call(
    behaviour: Callable[[Any, Context], Awaitable[Any]], ids: dict[str, str], default_deadline_s: float | None
) -> Callable[[Any, Context], Awaitable[Any]]:
    async def call(request: Any, context: Context) -> Any:
        with log_context(**ids):
            try:
                if default_deadline_s is None or context.time_remaining() is not None:
                    return await behaviour(request, context)
                async with asyncio.timeout(default_deadline_s) as deadline:
                    return await behaviour(request, context)
            except TimeoutError as error:
                if default_deadline_s is None or not deadline.expired():
                    await refuse(context, error)
                message = f"not done within the default deadline of {default_deadline_s:g} s"
                await refuse(context, MeshError(Reason.DEADLINE_EXCEEDED, message))
            except Exception as error:
                await refuse(context, error)

    return call


def guard_stream(
    behaviour: Callable[[Any, Context], AsyncIterator[Any]], ids: dict[str, str]
) -> Callable[[Any, Context], AsyncIterator[Any]]:
    async def stream(request: Any, context: Context) -> AsyncIterator[Any]:
        # bound by hand: a generator may be resumed in another context than the one it was entered in
        try:
            async with aclosing(behaviour(request, context)) as responses:  # type: ignore[type-var]
                async for response in responses:
                    yield response
        except Exception as error:
            with log_context(**ids):
                await refuse(context, error)

    return stream


async def refuse(context: Context, error: Exception) -> NoReturn:
    """End the call with the status of `error`. Always raises gRPC's own abort error."""
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if not isinstance(error, MeshError):
        log.error("unexpected error in a handler", exc_info=error)
        error = MeshError(Reason.INTERNAL, f"internal error: {type(error).__name__}")
    code, trailers = to_trailers(error)
    await context.abort(code, error.message, trailers)
    raise AssertionError("abort returned")
