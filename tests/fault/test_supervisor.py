"""The supervisor of `pdmesh up`, over small processes that behave well and badly."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from common.cli import supervisor as supervision
from common.cli.supervisor import LEASH, Child, Supervisor
from tests.mesh.harness import wait_until

pytestmark = pytest.mark.fault

ANNOUNCE = "from common.rpc.announce import announce; announce('test', grpc='127.0.0.1:1', metrics='127.0.0.1:2')\n"
WAIT = "import signal; signal.sigwait([signal.SIGTERM])\n"
# Blocked before the announcement, so that no SIGTERM can come too early.
BLOCK = "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])\n"
GOOD = BLOCK + ANNOUNCE + "signal.sigwait([signal.SIGTERM])\n"
DEAF = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + ANNOUNCE + "while True: signal.pause()\n"


@pytest.fixture
async def supervisor() -> AsyncIterator[Supervisor]:
    supervisor = Supervisor()
    yield supervisor
    await supervisor.stop([(supervisor.children, 0)])


async def start(supervisor: Supervisor, name: str, code: str) -> Child:
    return await supervisor.start(name, [sys.executable, "-c", code], os.environ)


def exists(pid: int) -> bool:
    """Whether a process runs; a zombie that nobody has reaped yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


async def test_a_child_tells_where_it_listens(supervisor: Supervisor) -> None:
    child = await start(supervisor, "a", GOOD)
    listening = await supervisor.listening(child)
    assert listening == child.listening
    assert (listening.role, listening.pid, listening.grpc, listening.http) == ("test", child.pid, "127.0.0.1:1", None)


async def test_stops_in_order_and_cleanly(supervisor: Supervisor, tmp_path: Path) -> None:
    log = tmp_path / "order"
    children = [
        await start(supervisor, name, GOOD + f"with open({str(log)!r}, 'a') as file: file.write({name!r})")
        for name in "abc"
    ]
    await asyncio.gather(*map(supervisor.listening, children))
    await supervisor.stop([([child], 20) for child in reversed(children)])
    assert log.read_text() == "cba"
    assert [child.process.returncode for child in children] == [0, 0, 0]


async def test_a_child_that_ends_is_told_with_its_last_words(supervisor: Supervisor) -> None:
    good = await start(supervisor, "good", GOOD)
    await supervisor.listening(good)
    bad = await start(supervisor, "bad", "import sys; print('first'); sys.exit('the reason')")
    assert str(await supervisor.failure()) == f"bad (pid {bad.pid}) ended with exit code 1: first\nthe reason"


async def test_the_reason_that_a_command_gave_is_told_alone(supervisor: Supervisor) -> None:
    code = "import sys; print('noise'); print('pdmesh: BAD_CONFIG: no such folder'); print('more'); sys.exit(2)"
    bad = await start(supervisor, "bad", code)
    want = f"bad (pid {bad.pid}) ended with exit code 2: BAD_CONFIG: no such folder"
    assert str(await supervisor.failure()) == want


async def test_a_child_that_is_killed_is_told_by_signal(supervisor: Supervisor) -> None:
    child = await start(supervisor, "victim", GOOD)
    await supervisor.listening(child)
    child.process.send_signal(signal.SIGKILL)
    assert "was ended by SIGKILL" in str(await supervisor.failure())


async def test_a_child_that_does_not_stop_is_killed(supervisor: Supervisor, capfd: pytest.CaptureFixture[str]) -> None:
    child = await start(supervisor, "deaf", DEAF)
    await supervisor.listening(child)
    await supervisor.stop([([child], 0.1)])
    assert child.process.returncode == -signal.SIGKILL
    assert "deaf" in capfd.readouterr().err


async def test_what_a_child_left_behind_goes_with_it(supervisor: Supervisor, tmp_path: Path) -> None:
    number = tmp_path / "pid"
    orphan = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {DEAF!r}])\n"
    child = await start(supervisor, "parent", orphan + f"open({str(number)!r}, 'w').write(str(p.pid))\n" + GOOD)
    await supervisor.listening(child)
    child.process.send_signal(signal.SIGKILL)
    await supervisor.failure()
    wait_until(lambda: not exists(int(number.read_text())), 20, "it is gone")


async def test_output_is_passed_on(supervisor: Supervisor, capfd: pytest.CaptureFixture[str]) -> None:
    child = await start(supervisor, "talker", "print('x' * 100_000, flush=True); print('done')")
    await supervisor.failure()
    assert "x" * 100_000 + "\ndone\n" in capfd.readouterr().err
    assert child.last_words().endswith("done")


async def replicas(supervisor: Supervisor, again: str, count: int = 2) -> list[Child]:
    """Children that listen, and what starts each anew."""
    children = [await start(supervisor, f"replica-{index}", GOOD) for index in range(count)]
    await asyncio.gather(*map(supervisor.listening, children))
    for child in children:
        child.again = [sys.executable, "-c", again]
    return children


async def test_a_replica_that_is_killed_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervision, "FIRST_RESTART_S", 0.01)
    restarted: asyncio.Queue[Child] = asyncio.Queue()
    supervisor = Supervisor(restarted.put_nowait)
    try:
        first, second = await replicas(supervisor, GOOD)
        for victim in (first, second):
            victim.process.send_signal(signal.SIGKILL)
            after = await asyncio.wait_for(restarted.get(), 20)
            assert (after.name, after.ended.is_set()) == (victim.name, False)
            assert after.listening is not None
            assert after.listening.pid == after.pid != victim.pid
    finally:
        await supervisor.stop([(supervisor.children, 20)])
    assert [child.process.returncode for child in supervisor.children] == [-signal.SIGKILL, -signal.SIGKILL, 0, 0]


async def test_a_replica_that_does_not_come_up_is_tried_again(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(supervision, "FIRST_RESTART_S", 0.01)
    tries = tmp_path / "tries"
    twice_broken = f"""
from pathlib import Path
tries = Path({str(tries)!r})
tries.open("a").write("x")
assert tries.stat().st_size == 3
"""
    first, _ = await replicas(supervisor, twice_broken + GOOD)
    first.process.send_signal(signal.SIGKILL)
    await asyncio.to_thread(wait_until, lambda: tries.exists() and tries.read_text() == "xxx", 30, "the third works")
    waits = [child.restart_s for child in supervisor.children if child.name == first.name]
    assert waits == sorted(waits)


async def test_the_end_of_all_replicas_is_the_end(supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervision, "FIRST_RESTART_S", 60.0)
    first, second = await replicas(supervisor, GOOD)
    first.restart_s = 60.0
    first.process.send_signal(signal.SIGKILL)
    await first.ended.wait()
    second.process.send_signal(signal.SIGKILL)
    assert "replica-1" in str(await supervisor.failure())


def test_children_end_when_the_supervisor_is_killed(tmp_path: Path) -> None:
    number = tmp_path / "pid"
    child = f"import os; open({str(number)!r}, 'w').write(str(os.getpid())); {WAIT}"
    parent = f"""
import os, subprocess, sys
subprocess.Popen([sys.executable, {str(LEASH)!r}, str(os.getpid()), sys.executable, "-c", {child!r}])
{WAIT}"""
    process = subprocess.Popen([sys.executable, "-c", parent], start_new_session=True)
    try:
        wait_until(lambda: number.exists() and bool(number.read_text()), 20, "the child runs")
        assert exists(int(number.read_text()))
    finally:
        process.kill()
        process.wait()
    wait_until(lambda: not exists(int(number.read_text())), 20, "it is gone")


def test_the_leash_refuses_a_parent_that_is_gone() -> None:
    done = subprocess.run([sys.executable, str(LEASH), "1", "true"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "is gone" in done.stderr
