"""SIGKILL of either side in the middle of a large transfer, with every backend: who is left goes on.

It has an error soon, all its pages back soon after, and uses the process that comes in the place of the dead one,
also under the same address, without being started anew. The bounds of time are generous, and the figures printed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from msgspec import structs

from common.engine.messages import SequenceFailed
from common.mesh.room import State
from common.transfer import registry
from common.worker.messages import RoomFailed
from common.worker.waker import Waker
from tests.handover_parties import Child, Here, Setting
from tests.handover_world import Entry, Member, Request, World, is_free
from tests.paged_toy import PAGE_SIZE, outputs_of

pytestmark = [pytest.mark.fault, pytest.mark.slow, pytest.mark.flaky(reruns=0)]

PAGE_BYTES = 1 << 20
PAGES = 256
FEW = 32
PATIENCE_S = 60.0  # what is awaited takes well under 5 and 10 s: only a defect, or a very busy machine, gets near
TRIES = 10  # to hit the middle
BACKENDS = [name for name in registry.NAMES if name != "emulated"]


class Watched(World):
    """Notes when the survivor had an error."""

    error_at: float | None = None

    def said(self, member: Member, message: Any) -> None:
        if isinstance(member, Here) and isinstance(message, RoomFailed | SequenceFailed) and self.error_at is None:
            self.error_at = time.monotonic()
        super().said(member, message)


@dataclass
class Scene:
    """The side that is to be killed is a child, the other one is here."""

    world: Watched
    victim: str
    requests: int = 0

    def member(self, role: str) -> Any:
        return next(member for member in self.world.members if member.role == role)

    @property
    def survivor(self) -> Here:
        return self.member("decode" if self.victim == "prefill" else "prefill")

    def begin(self, pages: int) -> Entry:
        """A hand-over of so many pages."""
        self.requests += 1
        prompt = [self.requests + position % 1000 for position in range(pages * PAGE_SIZE)]
        self.world.attempt(Request(f"r{self.requests}", prompt, 2, outputs_of(prompt, 2)))
        return next(reversed(self.world.entries.values()))

    def until(self, condition: Callable[[], bool]) -> float:
        """Let the world turn; the seconds that it took."""
        began = time.monotonic()
        while not condition():
            assert time.monotonic() < began + PATIENCE_S, self.world.story()
            self.world.turn()
        return time.monotonic() - began

    def kill_in_the_middle(self) -> Entry:
        """Kill the child when some pages have arrived, or are on their way, and not all of them."""
        for _ in range(TRIES):
            entry = self.begin(PAGES)
            if self.comes_to_the_middle(entry):
                self.member(self.victim).kill()
                return entry
            self.until(lambda entry=entry: entry.over and self.survivor.at_rest)  # type: ignore[misc]
        raise AssertionError("the middle of a transfer was never hit")

    def comes_to_the_middle(self, entry: Entry) -> bool:
        """False if it went by."""
        handover, engine = self.survivor.turns.handover, self.survivor.turns._engine
        if self.victim == "decode":
            self.until(lambda: bool(handover._by_handle) or entry.over)
            return bool(handover._by_handle)
        self.until(lambda: entry.room.reservation is not None)
        pages, slots = handover._rooms[entry.room.ticket].pages, engine.runner.slots
        self.until(lambda: slots[pages[4], 0, 0] != 0 or entry.over)
        return not entry.over and slots[pages[-1], 0, 0] == 0


@pytest.fixture
def waker() -> Iterator[Waker]:
    made = Waker()
    yield made
    made.close()


@pytest.fixture(params=["prefill", "decode"])
def scene(request: pytest.FixtureRequest, backend: str, waker: Waker) -> Iterator[Scene]:
    victim = request.param

    def make(setting: Setting) -> Member:
        return Child(setting) if setting.role == victim else Here(setting, waker)

    settings = (
        Setting(
            role, backend, 0, num_pages=PAGES + 8, slot_bytes=PAGE_BYTES // PAGE_SIZE, context_length=8192, chunk=8192
        )
        for role in ("prefill", "decode")
    )
    world = Watched(0, make, *settings, waker, parties=1, rate=0.0, idle_step_s=0.0)
    try:
        yield Scene(world, victim)
    finally:
        for member in world.members:
            if member.alive:
                member.close()


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if reason := registry.available()[name]:
        pytest.skip(reason)
    return name


def test_the_survivor_goes_on(scene: Scene, backend: str) -> None:
    world, survivor = scene.world, scene.survivor
    first = scene.begin(FEW)
    scene.until(lambda: first.over and survivor.at_rest)
    assert first.room.state is State.SUCCESS

    entry = scene.kill_in_the_middle()
    dead = scene.member(scene.victim)
    world.members.remove(dead)
    killed_at = time.monotonic()
    if scene.victim == "decode":  # the writer learns it from its engine, before anybody tells it
        scene.until(lambda: world.error_at is not None)
        world.lose(dead)
    else:  # the reader cannot tell a slow writer from a dead one; bootstrap sees the session end
        world.lose(dead)
        scene.until(lambda: world.error_at is not None)
    assert world.error_at
    error_s = world.error_at - killed_at
    scene.until(lambda: entry.over and survivor.at_rest)
    rest_s = time.monotonic() - killed_at
    assert entry.room.state is State.FAILED

    assert is_free(dead.address)
    again = world.join(structs.replace(dead.setting, control=dead.address))
    assert again.address == dead.address
    retry = scene.begin(FEW)
    retry_s = scene.until(lambda: retry.over and survivor.at_rest)
    assert retry.room.state is State.SUCCESS
    assert retry.tokens == retry.request.expected
    assert world.wrong == []
    print(
        f"{backend}, {scene.victim} killed: error after {error_s:.3f} s, all pages back after {rest_s:.3f} s, "
        f"the next hand-over with the new process took {retry_s:.3f} s"
    )
    scene.until(lambda: all(member.at_rest for member in world.members))
