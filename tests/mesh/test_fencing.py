"""A prefill worker that is lost may still write: what bootstrap tells decode, and whom it believes afterwards."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest

from common.errors.base import Reason
from common.mesh.router_session import RouterSession
from common.mesh.ticket import Ticket
from common.mesh.wire import ticket_to
from pdmesh.v1 import bootstrap_service_pb2 as pb
from pdmesh.v1 import types_pb2 as types
from tests.mesh.test_bootstrap import PATIENCE_S, Mesh, Worker, reserved, until, wanted

pytestmark = pytest.mark.mesh


class Scene:
    """A room whose prefill worker was given its pages."""

    def __init__(self, mesh: Mesh, prefill: Worker, decode: Worker, router: RouterSession, ticket: Ticket) -> None:
        self.mesh, self.prefill, self.decode, self.router, self.ticket = mesh, prefill, decode, router, ticket

    async def lose_prefill(self) -> pb.RoomReleased:
        """Its session ends; returns what decode is told to wait for."""
        await self.prefill.session.close()
        await self.decode.told.kind("ended")
        released: pb.RoomReleased = await self.decode.told.kind("released")
        return released

    async def quarantined(self) -> bool:
        return (await self.mesh.room(self.ticket)).quarantined

    async def released(self) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while await self.quarantined():  # noqa: ASYNC110  bootstrap is asked, it tells nobody
                await asyncio.sleep(0.01)


async def prefill_worker(mesh: Mesh, process: bytes, held: list[pb.HeldRoom] | None = None) -> Worker:
    """The prefill worker "p", as the process with this transfer endpoint, which holds these rooms."""
    worker = Worker(mesh.bootstrap.address, types.WORKER_ROLE_PREFILL, "p")
    worker.record.endpoints.add(backend="local", descriptor=process)
    worker.session.held = lambda: held or []
    worker.session.start()
    mesh.stack.push_async_callback(worker.session.close)
    await until(worker.session.registered)
    return worker


@pytest.fixture
async def scene() -> AsyncIterator[Scene]:
    async with AsyncExitStack() as stack:
        mesh = Mesh(stack)
        await mesh.start()
        prefill = await prefill_worker(mesh, b"first process")
        decode = await mesh.worker("DECODE", "d")
        router, _, _ = await mesh.router()
        ticket = await router.open_room(wanted(), 5)
        decode.say(reserved=reserved(ticket))
        await prefill.told.kind("reserved")
        yield Scene(mesh, prefill, decode, router, ticket)


async def test_decode_is_told_whom_to_fence_off(scene: Scene) -> None:
    epoch = scene.prefill.session.epoch
    told = await scene.lose_prefill()
    assert [endpoint.descriptor for endpoint in told.when_gone] == [b"first process"]
    assert told.epoch == epoch
    assert await scene.quarantined()
    scene.decode.say(fenced=pb.RoomFenced(ticket=ticket_to(scene.ticket)))
    await scene.released()


async def test_another_process_under_its_name_does_not_speak_for_it(scene: Scene) -> None:
    """The one that may still write is stopped, for all anybody knows; its successor has nothing to say about that."""
    told = await scene.lose_prefill()
    successor = await prefill_worker(scene.mesh, b"second process")
    assert successor.session.epoch > told.epoch
    for event in ("transferring", "quiet"):
        message = {"transferring": pb.RoomTransferring, "quiet": pb.RoomQuiet}[event](ticket=ticket_to(scene.ticket))
        successor.say(**{event: message})
        refused = await successor.told.kind("refused")
        assert refused.reason in (Reason.WRONG_STATE, Reason.STALE_TICKET)
    assert await scene.quarantined()
    assert scene.decode.told.items.empty()


async def test_a_stale_ticket_is_refused(scene: Scene) -> None:
    for stale in (
        Ticket(scene.ticket.room_id, scene.ticket.attempt, scene.ticket.epoch - 1),
        Ticket(scene.ticket.room_id, scene.ticket.attempt + 1, scene.ticket.epoch),
    ):
        scene.decode.say(transferred=pb.RoomTransferred(ticket=ticket_to(stale)))
        assert (await scene.decode.told.kind("refused")).reason == Reason.STALE_TICKET
    assert (await scene.mesh.room(scene.ticket)).state == types.ROOM_STATE_WAITING_FOR_INPUT


async def test_the_same_process_comes_back_is_told_the_end_and_is_believed(scene: Scene) -> None:
    told = await scene.lose_prefill()
    held = pb.HeldRoom(ticket=ticket_to(scene.ticket), phase=pb.HELD_PHASE_RESERVED)
    again = await prefill_worker(scene.mesh, b"first process", [held])
    assert again.session.epoch > told.epoch
    assert (await again.told.kind("ended")).ticket == ticket_to(scene.ticket)
    assert await scene.quarantined()
    again.say(quiet=pb.RoomQuiet(ticket=ticket_to(scene.ticket)))
    released = await scene.decode.told.kind("released")
    assert not released.when_gone
    await scene.released()


async def test_the_same_process_comes_back_and_holds_nothing_any_more(scene: Scene) -> None:
    """It had written all, or never heard of the room: nothing more comes of it."""
    await scene.lose_prefill()
    await prefill_worker(scene.mesh, b"first process")
    assert not (await scene.decode.told.kind("released")).when_gone
    await scene.released()
