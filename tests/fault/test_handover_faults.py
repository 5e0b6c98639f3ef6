"""Thousands of random hand-overs while everything goes wrong that may: no wrong byte is accepted, no page is lost.

Aborts, time-outs, broken sessions, workers taken for lost, workers killed and replaced (also under the same address),
messages lost, late and said twice, writes that fail and land later. The control gives all attempts of a request one
ticket, and fails. PDMESH_SEED repeats a run, as far as the threads of the backends let it.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
import structlog

from common.transfer import registry
from common.worker.waker import Waker
from tests.fault.cluster import SOAK
from tests.handover_parties import Child, Here, Rates, Setting
from tests.handover_world import FAULTS, Member, World

# A wrong byte in one of a hundred runs is a wrong byte: nothing here is tried again.
pytestmark = [
    pytest.mark.fault,
    pytest.mark.slow,
    pytest.mark.flaky(reruns=0),
    pytest.mark.timeout(3600 if SOAK else 300),
]

RATES = Rates(refuse=0.01, fail=0.02, slow=0.05, mute=0.01, drop=0.02, hold=0.1, repeat=0.1)
BACKENDS = [name for name in registry.NAMES if name != "emulated"]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Thousands of rooms fail here, and each would be logged."""
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    yield
    structlog.configure(**before)


@pytest.fixture
def waker() -> Iterator[Waker]:
    made = Waker()
    yield made
    made.close()


@dataclass
class Run:
    """One world's way from its start to its end."""

    waker: Waker
    backend: str
    count: int
    children: bool = False
    checksum: str = "off"
    rates: Rates = RATES
    rate: float = 0.5
    faults: dict[str, int] = field(default_factory=lambda: FAULTS)
    idle_step_s: float = 0.2
    tickets: bool = True
    seed: int = field(default_factory=lambda: int(os.environ.get("PDMESH_SEED", 0)) or secrets.randbelow(1 << 30))

    def world(self) -> World:
        """A world of two prefill and two decode workers."""
        print(f"PDMESH_SEED={self.seed}")
        make: Callable[[Setting], Member] = Child if self.children else lambda setting: Here(setting, self.waker)
        prefill, decode = (
            Setting(role, self.backend, 0, checksum=self.checksum, rates=self.rates) for role in ("prefill", "decode")
        )
        return World(
            self.seed,
            make,
            prefill,
            decode,
            self.waker,
            rate=self.rate,
            faults=self.faults,
            tickets=self.tickets,
            idle_step_s=self.idle_step_s,
        )

    def through(self) -> World:
        """Let `count` hand-overs happen, and all parties end in order. Raises whatever a party or its audit raised."""
        world = self.world()
        try:
            world.run(self.count)
        finally:
            world.close()
            print(f"{world.attempts} hand-overs: {dict(sorted(world.did.items()))}; wrong: {world.wrong[:5]}")
        return world


def check(world: World, *wanted: str) -> None:
    """Nothing was accepted that is wrong; `World.run` has waited until all pages were back."""
    assert world.wrong == []
    assert [name for name in ("success", "finished", *wanted) if not world.did[name]] == []


def test_no_wrong_byte_and_no_page_lost(waker: Waker) -> None:
    world = Run(waker, "local", 10_000 if SOAK else 2_500).through()
    twice = ("said twice to a worker", "said twice to bootstrap")
    rates = (name for name in Rates.__struct_fields__ if name != "corrupt")
    check(world, *FAULTS, *rates, *twice, "start lost", "abort on one side", "same address again")


@pytest.mark.parametrize("backend", BACKENDS)
def test_with_processes_that_are_killed(waker: Waker, backend: str) -> None:
    if reason := registry.available()[backend]:
        pytest.skip(reason)
    count = {"local": 2_000, "nixl": 1_000, "mooncake": 500} if SOAK else {"local": 300, "nixl": 40, "mooncake": 40}
    idle_step_s = 0.2 if backend == "local" else 0.01  # of an engine the first write takes up to a second
    faults = FAULTS | {"prefill killed": 30, "decode killed": 30}
    run = Run(waker, backend, count[backend], children=True, rate=0.12, faults=faults, idle_step_s=idle_step_s)
    check(run.through())


def test_checksums_find_every_byte_that_flipped(waker: Waker) -> None:
    """Between arrival and the notice, one in ten times; other faults go on."""
    rates = Rates(corrupt=0.1, drop=0.02, hold=0.1)
    world = Run(waker, "local", 2_000 if SOAK else 500, checksum="full", rates=rates).through()
    check(world, "corrupt", "failed: CHECKSUM_MISMATCH")
    assert world.did["failed: CHECKSUM_MISMATCH"] <= world.did["corrupt"], "no false alarm"


def test_control_without_checksums_a_flipped_byte_is_accepted(waker: Waker) -> None:
    assert Run(waker, "local", 300, rates=Rates(corrupt=0.1), rate=0.0).through().wrong


def test_control_without_tickets_wrong_bytes_are_accepted(waker: Waker) -> None:
    """What one attempt left behind is taken for the next one's. No run ends well, be it by lost pages or a crash."""
    for seed in range(1, 11):
        world, error = Run(waker, "local", 500, tickets=False, seed=seed).world(), ""
        try:
            world.run(500)
        except Exception as caught:
            error = f"{caught!r:.200}"
        finally:
            for member in world.members:
                member.kill()
        print(f"wrong: {world.wrong[:3]}; {error}")
        assert world.wrong or error
        if world.wrong:
            return
    raise AssertionError("all crashed before a wrong byte was read")
