"""What the commands for operators have in common: where bootstrap is, how it is asked, how answers are shown."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import grpc
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from rich.console import Console as Terminal

from common.config.bootstrap import BootstrapAddressConfig
from common.config.flags import bad, flag
from common.config.tls import Credentials, TlsConfig, load
from common.errors.base import MeshError, Reason
from common.rpc.channel import connect, error_from
from pdmesh.v1 import bootstrap_service_pb2 as pb
from pdmesh.v1 import bootstrap_service_pb2_grpc as pb_grpc

T = TypeVar("T")
CONNECT_TIMEOUT_S = 5.0
PAGE = 1000


@dataclass(frozen=True)
class ConsoleConfig:
    """Where to ask, and how to show the answer."""

    json: bool = flag(False, "Print JSON, for scripts.")
    timeout: float = flag(10.0, "Seconds that an answer may take.")
    bootstrap: BootstrapAddressConfig = field(default_factory=BootstrapAddressConfig)
    tls: TlsConfig = field(default_factory=TlsConfig)

    def __post_init__(self) -> None:
        if not self.timeout > 0:
            raise bad("--timeout: must be above 0")


class Bootstraps:
    """All replicas of bootstrap. Every call raises `MeshError` with what the service says."""

    def __init__(self, stubs: list[pb_grpc.BootstrapServiceAsyncStub], timeout_s: float) -> None:
        self._stubs = stubs
        self._timeout_s = timeout_s

    async def all(self, method: str, request: Message) -> list[Any]:
        """The answers of all replicas that answer; at least one."""
        answers = await asyncio.gather(*(self._call(stub, method, request) for stub in self._stubs))
        good = [answer for answer in answers if not isinstance(answer, MeshError)]
        if not good:
            raise next(error for error in answers if isinstance(error, MeshError))
        return good

    async def one(self, method: str, request: Message) -> Any:
        """The answer of the first replica that knows what is asked about."""
        refused: MeshError | None = None
        for stub in self._stubs:
            answer = await self._call(stub, method, request)
            if not isinstance(answer, MeshError):
                return answer
            if refused is None or answer.reason is not Reason.NOT_FOUND:
                refused = answer
        assert refused
        raise refused

    async def rooms(self, request: pb.ListRoomsRequest, limit: int) -> list[Any]:
        """Rooms of all replicas, newest first, at most `limit`."""
        found: list[Any] = []
        for stub in self._stubs:
            wanted = pb.ListRoomsRequest()
            wanted.CopyFrom(request)
            left = limit
            while left > 0:
                wanted.page_size = min(left, PAGE)
                answer = await self._call(stub, "ListRooms", wanted)
                if isinstance(answer, MeshError):
                    raise answer
                found += answer.rooms
                left -= len(answer.rooms)
                wanted.page_token = answer.next_page_token
                if not answer.next_page_token:
                    break
        return sorted(found, key=lambda room: room.opened_at.ToNanoseconds(), reverse=True)[:limit]

    async def _call(self, stub: Any, method: str, request: Message) -> Any:
        try:
            return await getattr(stub, method)(request, timeout=self._timeout_s)
        except grpc.aio.AioRpcError as error:
            return error_from(error)


@asynccontextmanager
async def bootstraps(config: ConsoleConfig) -> AsyncIterator[Bootstraps]:
    """Connect to bootstrap, and to its other replicas. Raises `MeshError` (BOOTSTRAP_UNREACHABLE)."""
    tls = load(config.tls, serves=False)
    async with AsyncExitStack() as stack:
        addresses = config.bootstrap.address.split(",")
        first, address = await first_that_answers(stack, addresses, tls)
        others = await replicas(first, config.timeout)
        stubs = [first]
        for other in others - {address}:
            channel = await stack.enter_async_context(connect(other, tls))
            stubs.append(pb_grpc.BootstrapServiceStub(channel))
        yield Bootstraps(stubs, config.timeout)


async def first_that_answers(
    stack: AsyncExitStack, addresses: Iterable[str], tls: Credentials | None
) -> tuple[pb_grpc.BootstrapServiceAsyncStub, str]:
    """A stub to the first address that can be connected to."""
    tried = []
    for address in addresses:
        channel = connect(address, tls)
        try:
            await asyncio.wait_for(channel.channel_ready(), CONNECT_TIMEOUT_S)
        except TimeoutError:
            await channel.close()
            tried.append(address)
            continue
        stack.push_async_callback(channel.close)
        return pb_grpc.BootstrapServiceStub(channel), address
    raise MeshError(Reason.BOOTSTRAP_UNREACHABLE, f"no bootstrap answers at {', '.join(tried)}; see --bootstrap")


async def replicas(stub: Any, timeout_s: float) -> set[str]:
    """The addresses of all replicas, as one of them tells."""
    try:
        answer = await stub.ListReplicas(pb.ListReplicasRequest(), timeout=timeout_s)
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.UNIMPLEMENTED:
            return set()
        raise error_from(error) from None
    own = answer.replica_id
    return {s.replica.address for s in answer.replicas if s.replica.address and s.replica.replica_id != own}


def run(config: ConsoleConfig, ask: Callable[[Bootstraps], Awaitable[T]]) -> T:
    """Connect, ask, and close."""

    async def main() -> T:
        async with bootstraps(config) as mesh:
            return await ask(mesh)

    return asyncio.run(main())


def to_json(message: Message) -> dict[str, Any]:
    """As server reflection shows it, with fields that have their default."""
    shown: dict[str, Any] = MessageToDict(message, always_print_fields_with_no_presence=True)
    return shown


def print_json(content: Any) -> None:
    print(json.dumps(content, indent=2))


def terminal() -> Terminal:
    """Standard output; wide enough for tables when it is no terminal."""
    out = Terminal(highlight=False)
    return out if out.is_terminal else Terminal(highlight=False, width=200)
