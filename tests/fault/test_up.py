"""`pdmesh up` when things end that should not: nothing is left running, and it says what happened."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mesh.harness import STOP_TIMEOUT_S, Mesh, running, wait_until

pytestmark = [pytest.mark.fault, pytest.mark.slow]

UP = (sys.executable, "-m", "common.cli.main", "up", "--port", "0", "--grpc-port", "0", "--bootstrap-port", "0")


def running_in_session(leader: int) -> set[int]:
    """The processes of the session that `leader` leads: a service and all that it started."""
    members = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            state, _, _, session, *_ = path.read_text().rpartition(") ")[2].split()
            if int(session) == leader and state not in "ZX":
                members.add(int(path.parent.name))
    return members


def left(mesh: Mesh) -> set[int]:
    return set().union(*(running_in_session(process["pid"]) for process in mesh.processes))


@contextlib.contextmanager
def doomed(*arguments: str) -> Iterator[Mesh]:
    """A mesh whose supervisor is not expected to end with exit code 0."""
    context = running(*arguments)
    mesh = context.__enter__()
    try:
        yield mesh
    finally:
        with contextlib.suppress(AssertionError):
            context.__exit__(None, None, None)


def test_all_of_it_ends_when_the_supervisor_is_killed() -> None:
    with doomed("--store", "etcd") as mesh:
        assert len(left(mesh)) > len(mesh.processes), "ranks and etcd are in their service's session"
        mesh.supervisor.kill()
        mesh.supervisor.wait()
    wait_until(lambda: not left(mesh), 20, "nothing is left")


@pytest.mark.parametrize("role", ["bootstrap", "prefill", "decode", "router"])
def test_all_of_it_ends_with_a_reason_when_a_service_is_killed(role: str) -> None:
    with doomed() as mesh:
        (victim,) = mesh.of(role)
        subprocess.run(["kill", "-KILL", str(victim["pid"])], check=True)
        code = mesh.supervisor.wait(2 * STOP_TIMEOUT_S)
        said = mesh.log.read_text()
    assert code == 1
    assert f"{victim['name']} (pid {victim['pid']}) was ended by SIGKILL" in said
    assert not left(mesh)


def test_ctrl_c_before_it_is_up(tmp_path: Path) -> None:
    status = tmp_path / "status.json"
    with subprocess.Popen(
        [*UP, "--status-file", str(status)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as supervisor:
        assert supervisor.stdout is not None
        supervisor.stdout.readline()  # the first process is at work
        supervisor.send_signal(signal.SIGINT)
        said, _ = supervisor.communicate(timeout=2 * STOP_TIMEOUT_S)
    assert supervisor.returncode == 0, said
    assert not status.exists()


def test_a_second_ctrl_c_ends_it_at_once() -> None:
    with doomed() as mesh:
        mesh.supervisor.send_signal(signal.SIGINT)
        wait_until(lambda: "pdmesh: stopping" in mesh.log.read_text(), 20, "it stops")
        mesh.supervisor.send_signal(signal.SIGINT)
        mesh.supervisor.wait(2 * STOP_TIMEOUT_S)
    wait_until(lambda: not left(mesh), 20, "nothing is left")


def test_a_checkpoint_that_is_not_there_is_named(tmp_path: Path) -> None:
    ended = subprocess.run([*UP, "--model-path", str(tmp_path / "none")], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1
    (reason,) = [line for line in ended.stderr.splitlines() if "ended with exit code" in line]
    assert str(tmp_path / "none") in reason


def test_a_worker_that_is_drained_leaves_and_the_mesh_goes_on() -> None:
    with running("--engine", "emulated", "--emulated-preset", "zero", "--decode", "2") as mesh:
        bootstrap = ("--bootstrap", mesh.of("bootstrap")[0]["grpc"])
        command = [sys.executable, "-m", "common.cli.main", "drain", "decode-1", *bootstrap]
        said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
        assert "decode-1 has left" in said
        wait_until(lambda: "decode-1 (pid" in mesh.log.read_text(), 20, "the supervisor has seen it")
        assert "has left" in mesh.log.read_text()
        assert mesh.supervisor.poll() is None
