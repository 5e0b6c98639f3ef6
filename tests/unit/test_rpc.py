"""The server set-up that all services share, over real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from common.errors.base import STATUS, MeshError, Reason
from common.rpc.channel import connect, error_from
from common.rpc.options import CHANNEL, SERVER, Options
from common.rpc.reflection import V1, V1ALPHA
from common.rpc.server import Server, Service, make_server
from common.rpc.status import to_trailers
from pdmesh.v1 import bootstrap_service_pb2 as pb
from pdmesh.v1 import bootstrap_service_pb2_grpc as pb_grpc
from pdmesh.v1 import errors_pb2

pytestmark = pytest.mark.unit
NAME = "pdmesh.v1.BootstrapService"


class Failing(pb_grpc.BootstrapServiceServicer):
    """Raises what the test put into `error`, from unary and streaming handlers."""

    error: Exception = MeshError(Reason.INTERNAL, "")

    async def ListWorkers(self, request: Any, context: Any) -> Any:
        raise self.error

    async def ListRooms(self, request: Any, context: Any) -> Any:
        await asyncio.Event().wait()

    async def GetRoom(self, request: Any, context: Any) -> Any:
        return pb.GetRoomResponse()

    async def WorkerSession(self, request_iterator: Any, context: Any) -> AsyncIterator[Any]:
        yield pb.WorkerSessionResponse()
        raise self.error

    async def RouterSession(self, request_iterator: Any, context: Any) -> AsyncIterator[Any]:
        async for _ in request_iterator:
            yield pb.RouterSessionResponse()


@asynccontextmanager
async def serving(servicer: Any, **options: Any) -> AsyncIterator[tuple[Server, grpc.aio.Channel]]:
    service = Service(NAME, pb_grpc.add_BootstrapServiceServicer_to_server, servicer)
    server = make_server("127.0.0.1", 0, [service], **options)
    await server.start()
    channel = connect(server.address)
    try:
        yield server, channel
    finally:
        await channel.close()
        await server.stop()


async def test_mesh_errors_reach_the_client_with_their_details() -> None:
    servicer = Failing()
    servicer.error = MeshError(Reason.OVERLOADED, "the mesh is full", parameter="n", retry_after_s=1.25)
    async with serving(servicer) as (_, channel):
        stub = pb_grpc.BootstrapServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.ListWorkers(pb.ListWorkersRequest(), timeout=5)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        error = error_from(caught.value)
        assert (error.reason, error.message, error.parameter) == (Reason.OVERLOADED, "the mesh is full", "n")
        assert error.retry_after_s == 1.25
        call = stub.WorkerSession(iter(()))
        assert await call.read() == pb.WorkerSessionResponse()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert error_from(caught.value).reason is Reason.OVERLOADED


async def test_unexpected_exceptions_are_internal_and_logged(capsys: pytest.CaptureFixture[str]) -> None:
    servicer = Failing()
    servicer.error = ZeroDivisionError("a secret")
    async with serving(servicer) as (_, channel):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await pb_grpc.BootstrapServiceStub(channel).ListWorkers(pb.ListWorkersRequest(), timeout=5)
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in (caught.value.details() or "")
    captured = capsys.readouterr()
    assert "a secret" in captured.out + captured.err


async def test_a_call_without_deadline_gets_the_default() -> None:
    async with serving(Failing(), default_deadline_s=0.05) as (_, channel):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await pb_grpc.BootstrapServiceStub(channel).ListRooms(pb.ListRoomsRequest())
    assert error_from(caught.value).reason is Reason.DEADLINE_EXCEEDED


async def test_health_says_what_it_was_told() -> None:
    async with serving(Failing()) as (server, channel):
        stub = health_pb2_grpc.HealthStub(channel)
        for serving_now, expected in ((False, "NOT_SERVING"), (True, "SERVING")):
            await server.set_serving(serving_now)
            for name in ("", NAME):
                answer = await stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=5)
                assert health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status) == expected


@pytest.mark.parametrize("package", [V1, V1ALPHA])
async def test_reflection_under_both_names(package: str) -> None:
    async with serving(Failing()) as (_, channel):
        ask = channel.stream_stream(
            f"/{package}.ServerReflection/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )
        requests = [reflection_pb2.ServerReflectionRequest(list_services="")]
        names = [NAME, "grpc.health.v1.Health", "grpc.channelz.v1.Channelz"]
        names += [f"{p}.ServerReflection" for p in (V1, V1ALPHA)]
        requests += [reflection_pb2.ServerReflectionRequest(file_containing_symbol=name) for name in names]
        answers = [answer async for answer in ask(iter(requests), timeout=5)]
        assert sorted(s.name for s in answers[0].list_services_response.service) == sorted(names)
        assert all(answer.file_descriptor_response.file_descriptor_proto for answer in answers[1:])


async def test_channelz_knows_the_server() -> None:
    async with serving(Failing()) as (_, channel):
        answer = await channelz_pb2_grpc.ChannelzStub(channel).GetServers(channelz_pb2.GetServersRequest(), timeout=5)
        assert answer.server


async def test_a_taken_port_is_refused_with_its_address() -> None:
    async with serving(Failing()) as (server, _):
        with pytest.raises(MeshError) as caught:
            make_server("127.0.0.1", server.port, [])
        assert caught.value.reason is Reason.BAD_CONFIG
        assert server.address in caught.value.message


def test_every_reason_has_a_status_and_stands_in_the_proto() -> None:
    values = errors_pb2.ErrorReason.DESCRIPTOR.values_by_name
    names = {name.removeprefix("ERROR_REASON_") for name in values} - {"UNSPECIFIED"}
    assert names == {str(reason) for reason in Reason} == {str(reason) for reason in STATUS}
    for reason in Reason:
        code, trailers = to_trailers(MeshError(reason, "x"))
        assert code is not grpc.StatusCode.OK
        assert trailers


def test_an_error_without_our_details_keeps_its_meaning() -> None:
    foreign = grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata(), "gone")
    assert error_from(foreign).reason is Reason.WORKER_LOST


async def test_a_quiet_stream_outlives_its_keepalive_pings() -> None:
    """The server must expect the client's pings, or it ends the connection with too_many_pings after a few.

    Same options as in service, all times a twentieth: an option whose name gRPC does not know would show.
    """

    def faster(options: Options) -> Options:
        return [(name, value // 20 if name.endswith("_ms") else value) for name, value in options]  # type: ignore

    server = grpc.aio.server(options=faster(SERVER))
    pb_grpc.add_BootstrapServiceServicer_to_server(Failing(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=faster(CHANNEL)) as channel:
            call = pb_grpc.BootstrapServiceStub(channel).RouterSession()
            answer = asyncio.create_task(call.read())
            await asyncio.wait([answer], timeout=4)  # eight quiet pings; the third unexpected one would be fatal
            assert not answer.done()
            await call.write(pb.RouterSessionRequest())
            assert await answer == pb.RouterSessionResponse()
            call.cancel()
    finally:
        await server.stop(0)


async def test_who_stops_a_server_may_be_cancelled() -> None:
    """At any turn, as happens to a call that stops its own server: whoever waits later learns of the end."""
    for turns in range(16):
        async with serving(Failing()) as (server, channel):
            stub = pb_grpc.BootstrapServiceStub(channel)
            call = stub.RouterSession()
            await call.write(pb.RouterSessionRequest())
            await call.read()
            stopper = asyncio.create_task(server.stop())
            for _ in range(turns):
                await asyncio.sleep(0)
            stopper.cancel()
            await server.stop()
