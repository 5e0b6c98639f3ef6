"""DecodeService: translates between routers' streams and the front. A unified worker serves it too."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc

from common.engine.messages import Retracted, SequenceFailed, Tokens
from common.mesh.credit import Credit
from common.rpc.server import Service
from common.worker import convert, sessions
from common.worker.front import Front, Role, SequenceNews
from pdmesh.v1 import decode_service_pb2 as pb
from pdmesh.v1 import decode_service_pb2_grpc as pb_grpc
from pdmesh.v1 import types_pb2

DecodeFront = Front[pb.DecodeEvent]


class DecodeServicer(pb_grpc.DecodeServiceServicer):
    """Handlers of DecodeService."""

    def __init__(self, front: DecodeFront) -> None:
        self._front = front

    async def Session(
        self,
        requests: AsyncIterator[pb.DecodeServiceSessionRequest],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[pb.DecodeServiceSessionResponse]:
        await context.send_initial_metadata(())  # or the router would not know that the stream is up
        async for events in self._front.serve_session(requests, self._apply):
            yield pb.DecodeServiceSessionResponse(events=events)

    def _apply(self, session: sessions.Session[pb.DecodeEvent], request: pb.DecodeServiceSessionRequest) -> None:
        for command in request.commands:
            if command.HasField("start"):
                start = command.start
                self._front.start(
                    session,
                    start.sequence_id,
                    start.request_id,
                    start.ticket if start.HasField("ticket") else None,
                    list(start.prompt_ids),
                    start.sampling,
                    list(start.output_ids),
                    start.writer if start.HasField("writer") else None,
                )
            else:
                self._front.abort(session, command.abort.sequence_id)


def to_event(number: int, news: SequenceNews) -> pb.DecodeEvent:
    """A rank's news as the router sees it."""
    match news:
        case Tokens():
            return pb.DecodeEvent(sequence_id=number, tokens=convert.tokens_to(news))
        case SequenceFailed():
            return pb.DecodeEvent(sequence_id=number, failed=convert.failed_to(news))
        case Retracted():
            return pb.DecodeEvent(sequence_id=number, retracted=pb.SequenceRetracted())
    raise TypeError(f"a decode rank sends no {type(news).__name__}")


def to_credit_event(credit: Credit, last_start: int) -> pb.DecodeEvent:
    """The worker's credit as a router sees it that has started `last_start`."""
    update = pb.CreditUpdate(credit=convert.credit_to(credit), last_start=last_start)
    return pb.DecodeEvent(credit=update)


def to_cache_event(update: types_pb2.PrefixCacheUpdate) -> pb.DecodeEvent:
    return pb.DecodeEvent(cache=update)


def make_service(front: DecodeFront) -> Service:
    return Service("pdmesh.v1.DecodeService", pb_grpc.add_DecodeServiceServicer_to_server, DecodeServicer(front))


DECODE = Role(
    "decode",
    types_pb2.WORKER_ROLE_DECODE,
    "services.decode.rank",
    make_service,
    to_event,
    to_cache_event,
    to_credit_event,
)
UNIFIED = Role(
    "unified",
    types_pb2.WORKER_ROLE_UNIFIED,
    "services.decode.unified_rank",
    make_service,
    to_event,
    to_cache_event,
    to_credit_event,
)
