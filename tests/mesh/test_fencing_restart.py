"""Bootstrap loses its memory while a prefill worker is stopped: decode's word of who writes is what is left.

The prefill worker does not come back in time, for all bootstrap knows it may still write, and decode is told whom to
fence off: whether the room's router brings the room back or is gone as well.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace

import pytest

from common.mesh.router_session import RouterSession
from common.mesh.ticket import Ticket
from common.mesh.wire import ticket_from, ticket_to
from pdmesh.v1 import bootstrap_service_pb2 as pb
from pdmesh.v1 import types_pb2 as types
from services.bootstrap.config import BootstrapConfig
from services.router.attempt import writer_of
from tests.mesh.test_bootstrap import PATIENCE_S, Mesh, Worker, reserved, until, wanted

pytestmark = pytest.mark.mesh

# The time for everybody to come back is two seconds, of which nothing is spent in waiting for who is there.
CONFIG = BootstrapConfig(port=0, disaggregation_heartbeat_interval=0.4, disaggregation_heartbeat_max_failure=4)
FIRST, SECOND = b"first process", b"second process"


async def prefill_process(mesh: Mesh, process: bytes, held: list[pb.HeldRoom], epoch: int = 0) -> Worker:
    """The prefill worker "p" as a process with this endpoint, which holds these rooms."""
    worker = Worker(mesh.bootstrap.address, types.WORKER_ROLE_PREFILL, "p")
    worker.record.endpoints.add(backend="local", descriptor=process)
    worker.session.held = lambda: held
    worker.session.epoch = epoch
    worker.session.start()
    mesh.stack.push_async_callback(worker.session.close)
    await until(worker.session.registered)
    return worker


class Scene:
    """A room whose prefill worker was given its pages, and has stopped."""

    def __init__(self, mesh: Mesh, prefill: Worker, decode: Worker, router: RouterSession, ticket: Ticket) -> None:
        self.mesh, self.prefill, self.decode, self.router, self.ticket = mesh, prefill, decode, router, ticket
        self.epoch = prefill.session.epoch

    async def lose_memory(self) -> None:
        """Bootstrap is replaced by one that knows nothing; decode is back when this returns."""
        port = self.mesh.bootstrap.server.port
        await self.mesh.bootstrap.stop()
        await self.prefill.session.close()
        async with asyncio.timeout(PATIENCE_S):
            await self.decode.lost.get()
        await self.mesh.start(replace(CONFIG, port=port))
        await until(self.decode.session.registered)

    async def told_of_the_end(self) -> pb.RoomReleased:
        """What decode is told once everybody has had the time to come back."""
        ended = await self.decode.told.kind("ended")
        assert ticket_from(ended.ticket) == self.ticket
        released: pb.RoomReleased = await self.decode.told.kind("released")
        return released

    def held_by_prefill(self) -> list[pb.HeldRoom]:
        return [pb.HeldRoom(ticket=ticket_to(self.ticket), phase=pb.HELD_PHASE_RESERVED)]


@pytest.fixture
async def scene() -> AsyncIterator[Scene]:
    async with AsyncExitStack() as stack:
        mesh = Mesh(stack)
        await mesh.start(CONFIG)
        prefill = await prefill_process(mesh, FIRST, [])
        decode = await mesh.worker("DECODE", "d")
        router, _, _ = await mesh.router()
        ticket = await router.open_room(wanted(), 5)
        decode.say(reserved=reserved(ticket))
        await prefill.told.kind("reserved")
        held = pb.HeldRoom(
            ticket=ticket_to(ticket),
            phase=pb.HELD_PHASE_RESERVED,
            reservation=reserved(ticket).reservation,
            writer=writer_of(router.workers["p"]),
        )
        decode.session.held = lambda: [held]
        yield Scene(mesh, prefill, decode, router, ticket)


@pytest.mark.parametrize("router", ["comes back", "is gone"])
async def test_a_writer_that_does_not_come_back_is_fenced_off(scene: Scene, router: str) -> None:
    if router == "is gone":
        await scene.router.close()
        assert (await scene.decode.told.kind("ended")).reason == "ABORTED"
    await scene.lose_memory()
    released = await scene.told_of_the_end()
    assert [endpoint.descriptor for endpoint in released.when_gone] == [FIRST]
    assert released.epoch >= scene.epoch

    # It was stopped alone, and goes on: in a life that is not barred, and its word that it is quiet frees the pages.
    back = await prefill_process(scene.mesh, FIRST, scene.held_by_prefill(), scene.epoch)
    assert back.session.epoch > released.epoch
    assert ticket_from((await back.told.kind("ended")).ticket) == scene.ticket
    back.say(quiet=pb.RoomQuiet(ticket=ticket_to(scene.ticket)))
    released = await scene.decode.told.kind("released")
    while released.when_gone:  # it may have been told again, beside the end
        released = await scene.decode.told.kind("released")


async def test_a_successor_does_not_speak_for_it(scene: Scene) -> None:
    await scene.lose_memory()
    successor = await prefill_process(scene.mesh, SECOND, [])
    released = await scene.told_of_the_end()
    assert [endpoint.descriptor for endpoint in released.when_gone] == [FIRST]
    successor.say(quiet=pb.RoomQuiet(ticket=ticket_to(scene.ticket)))
    assert (await scene.mesh.room(scene.ticket)).quarantined


@pytest.mark.parametrize("router", ["comes back", "is gone"])
async def test_one_that_comes_back_in_time_is_believed(scene: Scene, router: str) -> None:
    if router == "is gone":
        await scene.router.close()
        await scene.decode.told.kind("ended")
    await scene.lose_memory()
    back = await prefill_process(scene.mesh, FIRST, scene.held_by_prefill(), scene.epoch)
    assert back.session.epoch == scene.epoch, "its life goes on"
    if router == "comes back":
        assert ticket_from((await back.told.kind("reserved")).ticket) == scene.ticket
        back.say(failed=pb.RoomFailed(ticket=ticket_to(scene.ticket), reason="ABORTED", message="as a test wants it"))
    while (event := await back.told.next()).HasField("reserved"):  # it may have been told again, as both brought it
        pass
    assert ticket_from(event.ended.ticket) == scene.ticket
    assert ticket_from((await scene.decode.told.kind("ended")).ticket) == scene.ticket
    back.say(quiet=pb.RoomQuiet(ticket=ticket_to(scene.ticket)))
    assert not (await scene.decode.told.kind("released")).when_gone
