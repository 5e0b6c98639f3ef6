"""A prefill worker is stopped in the middle of its writes, and bootstrap, which has no store, dies and begins anew.

The new one has never heard of that worker: decode tells it who writes, and is told whom to fence off.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fault.cluster import SOAK, cluster
from tests.fault.test_kill_worker import HEARTBEAT_S, SLOW_TRANSFER, Mesh, until

pytestmark = [pytest.mark.fault, pytest.mark.slow]


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[Mesh]:
    times = tmp_path / "times.toml"
    times.write_text(SLOW_TRANSFER)
    with cluster(tmp_path) as started:
        yield Mesh(started, "--engine", "emulated", "--emulated-profile", str(times))


# That it goes on is in the suite with sessions in place of processes: tests/mesh/test_fencing_restart.py
SOAK_ALONE = pytest.mark.skipif(not SOAK, reason="PDMESH_SOAK is not set")


@pytest.mark.parametrize("ending", ["is killed", pytest.param("goes on", marks=SOAK_ALONE)])
def test_a_writer_that_only_decode_remembers(slow: Mesh, ending: str) -> None:
    writer = slow.cluster.services["prefill-0"]
    epoch = slow.record("prefill-0").epoch

    def writes() -> bool:
        return bool(slow.cluster.rooms(workerId="prefill-0", state="ROOM_STATE_TRANSFERRING"))

    def restart_bootstrap() -> None:
        slow.cluster.services["bootstrap-0"].kill()
        flags = ("--metrics-port", "0", "--disaggregation-heartbeat-interval", str(HEARTBEAT_S))
        slow.cluster.start("bootstrap-0", "--port", slow.address.rpartition(":")[2], *flags)

    async def stop() -> None:
        await until(writes, "it writes")
        os.killpg(writer.pid, signal.SIGSTOP)
        await asyncio.to_thread(restart_bootstrap)
        await until(lambda: slow.quarantined() > 0, "what it was granted is in quarantine")
        for _ in range(4):  # it stays there while others work
            await asyncio.sleep(HEARTBEAT_S)
            assert slow.quarantined() > 0
        if ending == "goes on":
            os.killpg(writer.pid, signal.SIGCONT)
        else:
            writer.kill()
        await until(lambda: slow.quarantined() == 0, "the quarantine ends")

    load = slow.load(24, fault=stop)
    assert all(error.retryable for error in load.failures().values()), load.failures()
    if ending == "is killed":
        fenced = [name for name in ("decode-0", "decode-1") if "failed room is gone" in slow.cluster.log(name)]
        assert fenced, "a dead process says nothing: decode's endpoint has seen its end"
        slow.start("prefill-0")
    slow.wait_for_all()
    assert slow.record("prefill-0").epoch > epoch
    assert not slow.load(16).failures(), "it serves again, also towards who had fenced it off"
    slow.check_ledgers()
