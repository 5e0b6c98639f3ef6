"""`--kv-checksum` with every transfer backend: bytes that change on their way fail the room, and no page is lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from common.transfer import registry
from common.worker.waker import Waker
from tests.handover_parties import Here, Rates, Setting
from tests.handover_world import World

pytestmark = [pytest.mark.contract, pytest.mark.slow]

ROOMS = 20
MakeWorld = Callable[[str, Rates], World]


@pytest.fixture(params=[name for name in registry.NAMES if name != "emulated"])
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if reason := registry.available()[name]:
        pytest.skip(reason)
    return name


@pytest.fixture
def make_world(backend: str) -> Iterator[MakeWorld]:
    waker = Waker()
    worlds: list[World] = []

    def make(checksum: str, rates: Rates) -> World:
        prefill, decode = (Setting(role, backend, 5, checksum=checksum, rates=rates) for role in ("prefill", "decode"))
        make_party = lambda setting: Here(setting, waker)  # noqa: E731
        worlds.append(World(5, make_party, prefill, decode, waker, parties=1, rate=0.0, idle_step_s=0.0))
        return worlds[-1]

    yield make
    for world in worlds:
        world.close()
    waker.close()


def figures(world: World) -> tuple[int, int]:
    """Pages verified and mismatches, as decode tells its front."""
    arrivals = next(member.load.arrivals for member in world.members if member.role == "decode")
    assert arrivals
    return arrivals.pages_verified, arrivals.checksum_mismatches


@pytest.mark.parametrize("checksum", ["sample", "full"])
def test_what_arrives_as_it_was_sent_is_accepted(make_world: MakeWorld, checksum: str) -> None:
    world = make_world(checksum, Rates())
    world.run(ROOMS)
    assert world.did["success"] == world.did["finished"] == ROOMS
    pages, mismatches = figures(world)
    assert mismatches == 0
    # one of a room's first sixteen pages; few prompts are longer
    assert ROOMS <= pages < 2 * ROOMS if checksum == "sample" else pages > 2 * ROOMS


def test_a_flipped_byte_fails_its_room(make_world: MakeWorld) -> None:
    """All pages come back, by way of quarantine: `World.run` waits for that."""
    world = make_world("full", Rates(corrupt=1.0))
    world.run(ROOMS)
    assert world.did["failed: CHECKSUM_MISMATCH"] == ROOMS
    assert not world.did["success"]
    assert figures(world)[1] == ROOMS
    assert world.wrong == []
