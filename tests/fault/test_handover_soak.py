"""Many hand-overs between two rank processes: memory, descriptors, threads and shared memory stay as they are.

And what is in the file systems afterwards: nothing after an end in order; and what a killed process left is gone
once the next one has started.
"""

from __future__ import annotations

import contextlib
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from common.transfer import registry
from common.worker.ranks import PREFIX
from common.worker.waker import Waker
from tests.contract.transfer_ends import wait_until
from tests.fault.cluster import SOAK
from tests.handover_parties import Child, Rates, Setting
from tests.handover_world import World

pytestmark = [
    pytest.mark.fault,
    pytest.mark.slow,
    pytest.mark.flaky(reruns=0),
    pytest.mark.timeout(3600 if SOAK else 300),
]

BACKENDS = [name for name in registry.NAMES if name != "emulated"]
COUNT = {"local": 20_000, "mooncake": 4_000, "nixl": 4_000} if SOAK else {"local": 1_000, "mooncake": 0, "nixl": 0}
SAMPLES = 20
# Of memory between the middle of a run and its end: the allocators' own ups and downs, and less than what a leak
# of a few hundred bytes in each hand-over of a full run would make.
GROWTH_BYTES = 2 << 20
# Aborts alone: whoever loses its session says again what it said, which the test's own tables would grow by.
FAULTS = {"abort at the router": 1, "abort by an operator": 1}


@dataclass(frozen=True)
class Held:
    """What a process holds now. `segments` are its mappings of shared memory, whatever their kind."""

    memory_bytes: int
    descriptors: int
    threads: int
    segments: int


def held(pid: int) -> Held:
    process = Path("/proc") / str(pid)
    status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    maps = (process / "maps").read_text()
    return Held(
        memory_bytes=int(status["RssAnon"].split()[0]) * 1024,
        descriptors=len(list((process / "fd").iterdir())),
        threads=len(list((process / "task").iterdir())),
        segments=len(re.findall(r"/memfd:|/dev/shm/|/SYSV", maps)),
    )


def named(pid: int) -> set[str]:
    """Names in /dev/shm and /tmp of what a process has open or mapped: what would be left if it ended now."""
    process = Path("/proc") / str(pid)
    names = {line.split(maxsplit=5)[5] for line in (process / "maps").read_text().splitlines() if "/" in line}
    for link in (process / "fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            names.add(os.readlink(link))
    return {name for name in names if name.startswith(("/dev/shm", "/tmp")) and not name.endswith("(deleted)")}


def segments_of(pids: set[int]) -> list[str]:
    """System V segments that these processes made."""
    lines = Path("/proc/sysvipc/shm").read_text().splitlines()[1:]
    return [line for line in lines if int(line.split()[4]) in pids]


def pids_of(world: World) -> set[int]:
    return {member.process.pid for member in world.members if isinstance(member, Child)}


@pytest.fixture
def waker() -> Iterator[Waker]:
    made = Waker()
    yield made
    made.close()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_grows(backend: str, waker: Waker) -> None:
    if (reason := registry.available()[backend]) or not COUNT[backend]:
        pytest.skip(reason or "only in the soak")
    prefill, decode = (
        Setting(role, backend, 0, checksum="sample", rates=Rates(repeat=0.05)) for role in ("prefill", "decode")
    )
    world = World(1, Child, prefill, decode, waker, parties=1, rate=0.1, faults=FAULTS, idle_step_s=0.05)
    pids = pids_of(world)
    samples: list[dict[str, Held]] = []
    try:
        for part in range(1, SAMPLES + 1):
            world.run(part * COUNT[backend] // SAMPLES)
            samples.append({member.role: held(member.process.pid) for member in world.members})  # type: ignore[union-attr]
        assert world.wrong == []
        assert set().union(*map(named, pids)) <= named(os.getpid()), "but for what they inherited"
    finally:
        world.close()
    for role in ("prefill", "decode"):
        memory = [sample[role].memory_bytes for sample in samples]
        middle = statistics.median(memory[SAMPLES // 4 : SAMPLES // 2])
        end = statistics.median(memory[-SAMPLES // 4 :])
        first, last = samples[SAMPLES // 4][role], samples[-1][role]
        print(f"{backend}, {role}: {COUNT[backend]} hand-overs, {middle / 2**20:.1f} to {end / 2**20:.1f} MiB; {last}")
        assert end - middle < GROWTH_BYTES, memory
        assert last.descriptors <= first.descriptors
        assert last.threads <= first.threads
        assert last.segments <= first.segments
    wait_until(lambda: segments_of(pids) == [])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_killed_process_leaves_nothing(backend: str, waker: Waker) -> None:
    """Pools are anonymous, and what engines share is unlinked before it is used: the kernel takes all of it back."""
    if reason := registry.available()[backend]:
        pytest.skip(reason)
    settings = (Setting(role, backend, 0) for role in ("prefill", "decode"))
    world = World(1, Child, *settings, waker, parties=1, rate=0.0, idle_step_s=0.0)
    world.run(3)
    pids = pids_of(world)
    assert set().union(*map(named, pids)) <= named(os.getpid()), "but for what they inherited"
    for member in world.members:
        member.kill()
    wait_until(lambda: segments_of(pids) == [])


FRONT = """
import asyncio, sys, msgspec
from common.worker.ranks import RankProcess

async def main():
    rank = await RankProcess.spawn("tests.toy_rank", msgspec.msgpack.encode({"stuck": sys.argv[1] == "stuck"}))
    await rank.stop()

asyncio.run(main())
"""


def test_what_a_killed_front_leaves_is_swept_by_the_next() -> None:
    """Killed while its rank loads, a front leaves the folder in which the two were to meet."""
    with tempfile.TemporaryDirectory(prefix="pdmesh-test-", dir="/tmp") as name:
        folder = Path(name)

        def front(rank: str) -> subprocess.Popen[bytes]:
            return subprocess.Popen([sys.executable, "-c", FRONT, rank], env=os.environ | {"TMPDIR": name})

        killed = front("stuck")
        wait_until(lambda: bool(list(folder.glob(f"{PREFIX}*/rank"))))
        killed.kill()
        killed.wait()
        assert list(folder.glob(f"{PREFIX}*"))
        assert front("quick").wait() == 0
        assert list(folder.iterdir()) == []
