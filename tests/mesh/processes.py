"""A mesh for tests whose processes are started one by one, so that each may be stopped, let go on, and killed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from common.rpc.announce import READY_FD, Listening, parse
from tests.mesh.harness import ROOT, STOP_TIMEOUT_S

ADDER = ROOT / "examples" / "models" / "adder"


S = TypeVar("S", bound="Services")


class Service:
    """A `pdmesh` process and all that it started, in a process group of its own."""

    def __init__(self, folder: Path, role: str, name: str, *flags: str) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        reader, writer = os.pipe()
        with self.log.open("ab") as sink:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "common.cli.main", role, *flags],
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                env=os.environ | {READY_FD: str(writer), "PYTHONUNBUFFERED": "1"},
                pass_fds=(writer,),
                start_new_session=True,
            )
        os.close(writer)
        self._ready = os.fdopen(reader)
        self._listening: Listening | None = None

    @property
    def listening(self) -> Listening:
        """Where it listens; waits for it to say so."""
        if self._listening is None:
            with self._ready:
                line = self._ready.readline()
            assert line, f"{self.name} ended before it listened"
            self._listening = parse(line)
        return self._listening

    @property
    def grpc(self) -> str:
        return str(self.listening.grpc)

    def signal(self, number: signal.Signals) -> None:
        """To the process and all that it started, unless it has ended."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.process.wait()

    def end(self) -> None:
        """SIGTERM, and SIGKILL to what has not stopped in time; also for one that is stopped."""
        self.signal(signal.SIGCONT)
        if self.process.poll() is None:
            self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_TIMEOUT_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._ready.close()


class Services:
    """Processes by name. Workers run the emulated engine on the model in the box, unless flags say otherwise."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.by_name: dict[str, Service] = {}

    def __getitem__(self, name: str) -> Service:
        return self.by_name[name]

    def start(self, role: str, name: str, *flags: str) -> Service:
        service = self.by_name[name] = Service(self.folder, role, name, *flags)
        return service

    def bootstrap(self, *flags: str) -> Service:
        return self.start("bootstrap", "bootstrap", "--port", "0", *flags)

    def worker(self, role: str, name: str, *flags: str) -> Service:
        engine = ("--engine", "emulated", "--emulated-preset", "zero", "--model-path", str(ADDER))
        own = ("--port", "0", "--worker-id", name, "--bootstrap", self["bootstrap"].grpc, "--drain-timeout", "1")
        return self.start(role, name, *engine, *own, *flags)

    def router(self, *flags: str) -> Service:
        own = ("--port", "0", "--grpc-port", "0", "--bootstrap", self["bootstrap"].grpc, "--drain-timeout", "0.5")
        return self.start("router", "router", *own, *flags)


@contextlib.contextmanager
def services(folder: Path, kind: type[S]) -> Iterator[S]:
    """Started by the test, ended here; their logs are shown when something fails."""
    mesh = kind(folder)
    try:
        yield mesh
    except BaseException:
        for service in mesh.by_name.values():
            print(f"--- {service.name}\n{service.log.read_text(errors='replace')[-5_000:]}")
        raise
    finally:
        for service in reversed(mesh.by_name.values()):
            service.end()
