"""A mesh whose faults are injected one by one, and what `Explain` says of them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import httpx

from common.mesh.router_session import RouterSession
from common.mesh.ticket import Ticket
from common.rpc.channel import connect
from pdmesh.v1 import bootstrap_service_pb2 as pb
from pdmesh.v1 import router_service_pb2 as router_pb
from pdmesh.v1 import types_pb2 as types
from tests.mesh.harness import Client
from tests.mesh.processes import Services
from tests.mesh.reflect import Refused, ask

PATIENCE_S = 30.0
PROMPT = list(range(3, 43))  # 40 tokens, 3 pages
BEATS = ("--disaggregation-heartbeat-interval", "0.3", "--disaggregation-heartbeat-max-failure", "60")
SLOW_DECODE = "[decode]\nbase_s = 0.05\n"
TINY_POOL = ("--max-total-tokens", "512")  # 32 pages


class Mesh(Services):
    """A mesh of emulated workers, what bootstrap says of it, and requests of long life."""

    def call(self, method: str, **request: Any) -> dict[str, Any]:
        """Ask bootstrap. Raises `Refused`."""
        return ask(self["bootstrap"].grpc, method, **request)

    def pdmesh(self, *arguments: str) -> str:
        """What one of the operator's commands prints."""
        command = [sys.executable, "-m", "common.cli.main", *arguments, "--bootstrap", self["bootstrap"].grpc]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout

    def whole(
        self, *flags: str, prefill: Sequence[str] = (), decode: Sequence[str] = (), router: Sequence[str] = ()
    ) -> None:
        """A bootstrap with `flags`, a worker of each kind, and a router; not ready yet."""
        self.bootstrap(*BEATS, *flags)
        self.worker("prefill", "prefill-0", *prefill)
        self.worker("decode", "decode-0", *decode)
        self.router(*router)

    def profile(self, name: str, text: str) -> tuple[str, str]:
        path = self.folder / f"{name}.toml"
        path.write_text(text)
        return "--emulated-profile", str(path)

    def ask(self, request_id: str, *, timeout_s: float = 60, **sampling: Any) -> Asked:
        """Send a request of long life through the router."""
        return Asked(self["router"].grpc, request_id, timeout_s, sampling)

    async def room(self, request_id: str, *states: str) -> dict[str, Any]:
        """The request's room, once it is in one of `states`."""

        def found() -> dict[str, Any] | None:
            rooms = self.call("ListRooms", requestId=request_id).get("rooms", [])
            return next((room for room in rooms if room["state"].removeprefix("ROOM_STATE_") in states), None)

        return await until(found)

    async def explained(self, request_id: str, *words: str) -> tuple[str, str]:
        """The sentence and the reason, once the room has ended and the sentence has all `words` in it."""
        said: dict[str, Any] = {}

        def has_them() -> bool:
            try:
                said.update(self.call("Explain", requestId=request_id))
            except Refused:  # the router's word is still on its way
                return False
            return not said["summary"].startswith("Under way") and all(word in said["summary"] for word in words)

        try:
            await until(has_them, 10)
        except TimeoutError:
            raise AssertionError(f"{words} are not in: {json.dumps(said, indent=1)[:4000]}") from None
        return said["summary"], said.get("reason", "")


class Asked:
    """A running request. Leave it as a context to give it up."""

    def __init__(self, address: str, request_id: str, timeout_s: float, sampling: dict[str, Any]) -> None:
        given = types.SamplingParams(max_new_tokens=1500, ignore_eos=True)
        given.MergeFrom(types.SamplingParams(**sampling))
        request = router_pb.GenerateRequest(request_id=request_id, sampling=given, stream=True)
        request.token_ids.ids.extend(PROMPT)
        self.client = Client(address)
        self.call: Any = self.client.router.Generate(request, timeout=timeout_s, wait_for_ready=True)

    async def __aenter__(self) -> Asked:
        return self

    async def __aexit__(self, *error: object) -> None:
        self.call.cancel()
        await self.client.channel.close()

    async def first_token(self) -> None:
        assert (await self.call.read()).token_ids

    async def rest(self) -> list[router_pb.GenerateResponse]:
        """What is still to come."""
        answers = []
        while (answer := await self.call.read()) is not grpc.aio.EOF:
            answers.append(answer)
        return answers

    async def failure(self) -> grpc.StatusCode:
        """How it ends; whatever comes before is passed over."""
        async with asyncio.timeout(PATIENCE_S):
            with contextlib.suppress(grpc.aio.AioRpcError):
                await self.rest()
            code: grpc.StatusCode = await self.call.code()
        assert code is not grpc.StatusCode.OK, "it did not fail"
        return code


async def until(find: Any, patience_s: float = PATIENCE_S) -> Any:
    """What `find` finds, which may block for a moment."""
    async with asyncio.timeout(patience_s):
        while True:
            if found := await asyncio.to_thread(find):
                return found
            await asyncio.sleep(0.05)


async def ready(mesh: Mesh, *workers: str) -> None:
    """Wait until the workers have registered and the router, if there is one, can serve."""

    def is_ready() -> bool:
        try:
            known = {worker["workerId"] for worker in mesh.call("ListWorkers").get("workers", [])}
        except Refused:  # bootstrap has not reached its store yet
            return False
        if not known >= set(workers or ("prefill-0", "decode-0")):
            return False
        return "router" not in mesh.by_name or httpx.get(f"http://{mesh['router'].listening.http}/ready").is_success

    await until(is_ready)


# ------------------------------------------------------------------------------------------ past the router


@asynccontextmanager
async def channel_to(address: str) -> AsyncIterator[grpc.aio.Channel]:
    async with connect(address) as channel:
        yield channel


@asynccontextmanager
async def opened(mesh: Mesh, request_id: str, prompt_tokens: int, decode: str = "decode-0") -> AsyncIterator[Ticket]:
    """A room, opened as a router does."""
    session = RouterSession(mesh["bootstrap"].grpc)
    session.start()
    try:
        async with asyncio.timeout(PATIENCE_S):
            await session.ready.wait()
        wanted = pb.OpenRoom(request_id=request_id, attempt=1, prompt_tokens=prompt_tokens)
        wanted.prefill_worker_id, wanted.decode_worker_id = "prefill-0", decode
        yield await session.open_room(wanted, 5)
    finally:
        await session.close()
