"""PrefillService: translates between routers' streams and the front."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc

from common.engine.messages import SequenceFailed
from common.rpc.server import Service
from common.worker import convert, sessions
from common.worker.front import Front, Role, SequenceNews
from common.worker.messages import Prefilled
from pdmesh.v1 import prefill_service_pb2 as pb
from pdmesh.v1 import prefill_service_pb2_grpc as pb_grpc
from pdmesh.v1 import types_pb2

PrefillFront = Front[pb.PrefillEvent]


class PrefillServicer(pb_grpc.PrefillServiceServicer):
    """Handlers of PrefillService."""

    def __init__(self, front: PrefillFront) -> None:
        self._front = front

    async def Session(
        self,
        requests: AsyncIterator[pb.PrefillServiceSessionRequest],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[pb.PrefillServiceSessionResponse]:
        await context.send_initial_metadata(())  # or the router would not know that the stream is up
        async for events in self._front.serve_session(requests, self._apply):
            yield pb.PrefillServiceSessionResponse(events=events)

    def _apply(self, session: sessions.Session[pb.PrefillEvent], request: pb.PrefillServiceSessionRequest) -> None:
        for command in request.commands:
            if command.HasField("start"):
                start = command.start
                self._front.start(
                    session,
                    start.sequence_id,
                    start.request_id,
                    start.ticket,
                    list(start.prompt_ids),
                    start.sampling,
                    list(start.output_ids),
                )
            else:
                self._front.abort(session, command.abort.sequence_id)


def to_event(number: int, news: SequenceNews) -> pb.PrefillEvent:
    """A rank's news as the router sees it."""
    match news:
        case Prefilled():
            return pb.PrefillEvent(sequence_id=number, finished=pb.PrefillFinished(cached_tokens=news.cached_tokens))
        case SequenceFailed():
            return pb.PrefillEvent(sequence_id=number, failed=convert.failed_to(news))
    raise TypeError(f"a prefill rank sends no {type(news).__name__}")


def to_cache_event(update: types_pb2.PrefixCacheUpdate) -> pb.PrefillEvent:
    return pb.PrefillEvent(cache=update)


def make_service(front: PrefillFront) -> Service:
    return Service("pdmesh.v1.PrefillService", pb_grpc.add_PrefillServiceServicer_to_server, PrefillServicer(front))


ROLE = Role("prefill", types_pb2.WORKER_ROLE_PREFILL, "services.prefill.rank", make_service, to_event, to_cache_event)
