"""RouterService: gRPC in and out of the router."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import TYPE_CHECKING

from google.protobuf.timestamp_pb2 import Timestamp

from common.errors.base import MeshError, Reason
from common.rpc.server import Service
from pdmesh.v1 import router_service_pb2 as pb
from pdmesh.v1 import router_service_pb2_grpc as pb_grpc
from pdmesh.v1 import types_pb2
from services.router.request import Delta, Draft, Sampling, Usage
from services.router.router import Router, new_request_id

if TYPE_CHECKING:
    from common.rpc.interceptor import Context

DEFAULT_MAX_NEW_TOKENS = 128
API = "grpc"  # in metrics and logs


class RouterServicer(pb_grpc.RouterServiceServicer):
    """Handlers of RouterService."""

    def __init__(self, router: Router) -> None:
        self._router = router

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> AsyncIterator[pb.GenerateResponse]:
        request_id = request.request_id or new_request_id("gen")
        await self._router.arrive(request_id, API)
        try:
            prepared = await self._router.prepare(to_draft(request, request_id, context.time_remaining()))
            joined = [Delta(index, [], "", 0, []) for index in range(prepared.sequences)]
            async with aclosing(self._router.generate(prepared)) as deltas:
                async for delta in deltas:
                    if request.stream:
                        yield to_response(prepared.request_id, delta)
                        continue
                    whole = joined[delta.index]
                    append(whole, delta)
                    if delta.finish:
                        yield to_response(prepared.request_id, whole)
        finally:
            self._router.depart(request_id)

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        response = pb.ListModelsResponse()
        for model in self._router.directory.models():
            ready_at = Timestamp()
            ready_at.FromNanoseconds(round(model.ready_at_s * 1e9))
            response.models.add(
                name=model.name,
                context_length=model.context_length,
                vocab_size=model.vocab_size,
                ready_at=ready_at,
            )
        return response

    async def AbortRequest(self, request: pb.AbortRequestRequest, context: Context) -> pb.AbortRequestResponse:
        return pb.AbortRequestResponse(found=self._router.abort(request.request_id))


def make_service(router: Router) -> Service:
    return Service("pdmesh.v1.RouterService", pb_grpc.add_RouterServiceServicer_to_server, RouterServicer(router))


def to_draft(request: pb.GenerateRequest, request_id: str, timeout_s: float | None) -> Draft:
    """Raises `MeshError` (EMPTY_PROMPT) for a request without input."""
    match request.WhichOneof("input"):
        case "prompt":
            prompt: str | list[int] = request.prompt
        case "token_ids":
            prompt = list(request.token_ids.ids)
        case _:
            raise MeshError(Reason.EMPTY_PROMPT, "set prompt or token_ids", parameter="prompt")
    return Draft(
        request_id=request_id,
        api=API,
        model=request.model,
        prompts=[prompt],
        sampling=sampling_from(request.sampling),
        timeout_s=timeout_s,
        default_max_new_tokens=DEFAULT_MAX_NEW_TOKENS,
    )


def sampling_from(message: types_pb2.SamplingParams) -> Sampling:
    """Every field that is set; the rest keep `Sampling`'s defaults, which are the proto's."""
    values = {field.name: value for field, value in message.ListFields()}
    for name in ("stop", "stop_token_ids"):
        values[name] = tuple(values.get(name, ()))
    return Sampling(**values)


def append(whole: Delta, delta: Delta) -> None:
    """Join a delta to what came before it."""
    whole.token_ids += delta.token_ids
    whole.text += delta.text
    whole.logprobs += delta.logprobs
    whole.finish, whole.stop_reason, whole.usage = delta.finish, delta.stop_reason, delta.usage


def to_response(request_id: str, delta: Delta) -> pb.GenerateResponse:
    return pb.GenerateResponse(
        request_id=request_id,
        index=delta.index,
        token_ids=delta.token_ids,
        text=delta.text,
        token_offset=delta.token_offset,
        finish_reason=delta.finish,
        usage=to_usage(delta.usage) if delta.usage else None,
        logprobs=delta.logprobs,
    )


def to_usage(usage: Usage) -> types_pb2.Usage:
    return types_pb2.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=usage.cached_tokens,
    )
