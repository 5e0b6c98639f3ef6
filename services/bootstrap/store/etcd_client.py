"""A client of etcd's v3 API: the calls the store needs, over several endpoints."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, TypeVar

import grpc

from common.config.tls import Credentials
from common.errors.base import MeshError, Reason
from common.obs.log import get_logger
from common.rpc.channel import connect
from pdmesh.etcd.v1 import etcd_pb2 as pb

log = get_logger(__name__)

R = TypeVar("R")

# A member without a leader answers at once instead of waiting for one.
LEADER = ("hasleader", "true")
TRY_TIMEOUT_S = 2.0
PAUSE_S = 0.05

# Another member, or the same one a moment later, may do better.
TRANSIENT = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}


# What etcd says, as INVALID_ARGUMENT, to a token that is older than the last change of users or roles.
OLD_AUTH = "revision of auth store is old"


class Compacted(Exception):
    """A watch asked for a revision that etcd has forgotten."""


def failed(message: str) -> MeshError:
    return MeshError(Reason.STORE_FAILED, f"etcd: {message}")


def prefix_end(prefix: bytes) -> bytes:
    """The first key after all that begin with `prefix`; b"\\0", etcd's word for no end, when there is none."""
    stripped = prefix.rstrip(b"\xff")
    return stripped[:-1] + bytes([stripped[-1] + 1]) if stripped else b"\0"


class EtcdClient:
    """One channel an endpoint, used in turn: a call goes to the endpoint that served the last one.

    Every call is repeated on the next endpoint for up to `timeout_s`, also after an answer was lost: whoever calls
    must take a repetition. Raises `MeshError` (STORE_FAILED).
    """

    def __init__(
        self,
        endpoints: list[str],
        *,
        user: str = "",
        password: str = "",
        timeout_s: float = 5.0,
        tls: Credentials | None = None,
    ) -> None:
        self.endpoints = endpoints
        self._tls = tls
        self._user, self._password = user, password
        self._timeout_s = timeout_s
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._current = 0
        self._token = ""

    async def close(self) -> None:
        channels, self._channels = self._channels, {}
        for channel in channels.values():
            await channel.close()

    # ---------------------------------------------------------------------------------- calls

    async def range(self, request: pb.RangeRequest) -> pb.RangeResponse:
        return await self._call("KV/Range", request, pb.RangeResponse)

    async def put(self, request: pb.PutRequest) -> pb.PutResponse:
        return await self._call("KV/Put", request, pb.PutResponse)

    async def txn(self, request: pb.TxnRequest) -> pb.TxnResponse:
        return await self._call("KV/Txn", request, pb.TxnResponse)

    async def compact(self, revision: int) -> None:
        request = pb.CompactionRequest(revision=revision, physical=True)
        await self._call("KV/Compact", request, pb.CompactionResponse)

    async def lease_grant(self, ttl_s: int) -> int:
        answer = await self._call("Lease/LeaseGrant", pb.LeaseGrantRequest(ttl=ttl_s), pb.LeaseGrantResponse)
        return answer.id

    async def lease_revoke(self, lease_id: int) -> None:
        await self._call("Lease/LeaseRevoke", pb.LeaseRevokeRequest(id=lease_id), pb.LeaseRevokeResponse)

    async def lease_keep_alive(self, lease_id: int, try_timeout_s: float = TRY_TIMEOUT_S) -> int:
        """Prolong a lease; returns the seconds it now lasts, 0 when it had ended."""
        request = pb.LeaseKeepAliveRequest(id=lease_id)
        answer = await self._call(
            "Lease/LeaseKeepAlive", request, pb.LeaseKeepAliveResponse, stream=True, try_timeout_s=try_timeout_s
        )
        return answer.ttl

    async def status(self) -> pb.StatusResponse:
        return await self._call("Maintenance/Status", pb.StatusRequest(), pb.StatusResponse)

    async def watch(self, prefix: bytes, start_revision: int) -> AsyncIterator[pb.WatchResponse]:
        """Changes of keys under `prefix` from `start_revision` on, for as long as the stream lives.

        Raises `Compacted`, or `MeshError` when the stream breaks; the caller goes on from the last revision.
        """
        create = pb.WatchCreateRequest(
            key=prefix, range_end=prefix_end(prefix), start_revision=start_revision, progress_notify=True
        )
        endpoint = self.endpoints[self._current]
        try:
            if self._user and not self._token:
                await self._authenticate(endpoint)
            call = self._stream(endpoint, "Watch/Watch", pb.WatchRequest, pb.WatchResponse)
            await call.write(pb.WatchRequest(create_request=create))
            try:
                async for response in call:
                    if response.compact_revision:
                        raise Compacted
                    if response.canceled:
                        self._token = ""  # a token that ran out is one of the causes
                        raise failed(f"watch cancelled: {response.cancel_reason}")
                    yield response
            finally:
                call.cancel()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            if isinstance(error, grpc.aio.AioRpcError):
                self._may_repeat(error)
            self._next_endpoint(endpoint)
            raise failed(f"watch on {endpoint} broke: {describe(error)}") from None
        raise failed(f"watch on {endpoint} ended")

    # ---------------------------------------------------------------------------------- plumbing

    async def _call(
        self,
        method: str,
        request: Any,
        answer: type[R],
        *,
        stream: bool = False,
        try_timeout_s: float = TRY_TIMEOUT_S,
    ) -> R:
        last = "no endpoint"
        try:
            async with asyncio.timeout(self._timeout_s):
                while True:
                    endpoint = self.endpoints[self._current]
                    try:
                        if self._user and not self._token:
                            await self._authenticate(endpoint)
                        return await self._once(endpoint, method, request, answer, stream, try_timeout_s)
                    except grpc.aio.AioRpcError as error:
                        last = f"{endpoint}: {describe(error)}"
                        if not self._may_repeat(error):
                            raise failed(f"{method}: {last}") from None
                        self._next_endpoint(endpoint)
                    await asyncio.sleep(PAUSE_S)
        except TimeoutError:
            raise failed(f"{method}: no answer within {self._timeout_s:g} s; last: {last}") from None

    async def _once(
        self,
        endpoint: str,
        method: str,
        request: Any,
        answer: type[R],
        stream: bool = False,
        timeout_s: float = TRY_TIMEOUT_S,
    ) -> R:
        if stream:
            call = self._stream(endpoint, method, type(request), answer, timeout_s)
            try:
                await call.write(request)
                response = await call.read()
            except asyncio.InvalidStateError:  # it broke before the write; reading tells why
                response = await call.read()
            finally:
                call.cancel()
            if response is grpc.aio.EOF:
                raise failed(f"{method} on {endpoint} ended without an answer")
            return response  # type: ignore[no-any-return]
        unary = self._channel(endpoint).unary_unary(
            f"/etcdserverpb.{method}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=answer.FromString,  # type: ignore[attr-defined]
        )
        return await unary(request, timeout=timeout_s, metadata=self._metadata())  # type: ignore[no-any-return]

    def _stream(self, endpoint: str, method: str, request: Any, answer: Any, timeout_s: float | None = None) -> Any:
        make = self._channel(endpoint).stream_stream(
            f"/etcdserverpb.{method}",
            request_serializer=request.SerializeToString,
            response_deserializer=answer.FromString,
        )
        return make(timeout=timeout_s, metadata=self._metadata())

    def _may_repeat(self, error: grpc.aio.AioRpcError) -> bool:
        stale = error.code() is grpc.StatusCode.UNAUTHENTICATED or OLD_AUTH in (error.details() or "")
        if stale and self._user and self._token:
            self._token = ""  # it ran out, or users have changed: log in again
            return True
        return error.code() in TRANSIENT

    async def _authenticate(self, endpoint: str) -> None:
        request = pb.AuthenticateRequest(name=self._user, password=self._password)
        answer = await self._once(endpoint, "Auth/Authenticate", request, pb.AuthenticateResponse)
        self._token = answer.token

    def _metadata(self) -> tuple[tuple[str, str], ...]:
        return (LEADER, ("token", self._token)) if self._token else (LEADER,)

    def _channel(self, endpoint: str) -> grpc.aio.Channel:
        if endpoint not in self._channels:
            self._channels[endpoint] = connect(endpoint, self._tls)
        return self._channels[endpoint]

    def _next_endpoint(self, bad: str) -> None:
        """Leave `bad`, unless another call did so already."""
        if self.endpoints[self._current] == bad:
            self._current = (self._current + 1) % len(self.endpoints)


def describe(error: BaseException) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name} {error.details() or ''}".strip()
    return str(error)
