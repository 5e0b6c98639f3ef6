"""Runs the processes of one mesh: starts them, learns where they listen, notices an end, stops them in order.

The end of one is the end of all, but for a replica, which is started again while another one runs.

Every child is in a session of its own, so that Ctrl-C reaches the supervisor alone, and on a leash: it gets SIGTERM
when the supervisor is gone, however that came about.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from common.rpc.announce import READY_FD, Listening, parse

LEASH = Path(__file__).with_name("leash.py")
TAIL_LINES = 12
OWN_WORDS = "pdmesh: "
DRAIN_OUTPUT_S = 0.5
# A replica that ends is started again after this time, which doubles each time, unless it has run for a while.
FIRST_RESTART_S, LAST_RESTART_S = 0.5, 30.0


class ChildEnded(Exception):
    """A child ended that should be running; the message says which, how, and what it last said."""


@dataclass(frozen=True)
class Pipe:
    """What a child writes to `write_fd` is read from `reader`."""

    reader: asyncio.StreamReader
    transport: asyncio.ReadTransport
    write_fd: int

    @classmethod
    async def open(cls) -> Pipe:
        read_fd, write_fd = os.pipe()
        reader = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(read_fd, "rb", buffering=0)
        )
        return cls(reader, transport, write_fd)


class Child:
    """One supervised process. `listening` is known once it has announced itself."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        env: Mapping[str, str],
        process: subprocess.Popen[bytes],
        ready: Pipe,
        output: Pipe,
    ) -> None:
        self.name = name
        self.command = command
        self.env = env
        self.process = process
        self.ready = ready
        self.output = output
        self.listening: Listening | None = None
        self.ended = asyncio.Event()
        self.may_leave = False  # once it listens, it may end with exit code 0
        self.again: Sequence[str] | None = None  # a replica: what starts it where it listened, while another one runs
        self.restart_s = FIRST_RESTART_S
        self.started_at = time.monotonic()
        self.tail = b""
        self.following = asyncio.create_task(self.follow())

    async def follow(self) -> None:
        """Pass on what the child writes, and remember the end of it."""
        while chunk := await self.output.reader.read(1 << 16):
            self.tail = (self.tail + chunk)[-8192:]
            with suppress(OSError):  # a terminal that is gone is no reason to stop the mesh
                sys.stderr.buffer.write(chunk)
                sys.stderr.flush()

    @property
    def pid(self) -> int:
        return self.process.pid

    def last_words(self) -> str:
        """What the `pdmesh` command gave as the reason; without one, the last lines."""
        lines = self.tail.decode(errors="replace").splitlines()
        reasons = [line.removeprefix(OWN_WORDS) for line in lines if line.startswith(OWN_WORDS)]
        return reasons[-1] if reasons else "\n".join(lines[-TAIL_LINES:])

    def kill(self) -> None:
        """SIGKILL to the child and to all that it started. Only while it has not been reaped."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)


def spawn(command: Sequence[str], env: Mapping[str, str], ready_fd: int, output_fd: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-S", "-E", str(LEASH), str(os.getpid()), *command],
        env={**env, READY_FD: str(ready_fd)},
        stdin=subprocess.DEVNULL,
        stdout=output_fd,
        stderr=subprocess.STDOUT,
        pass_fds=(ready_fd,),
        start_new_session=True,
    )


class Supervisor:
    """The children of this process, in the order in which they were started."""

    def __init__(self, on_restarted: Callable[[Child], None] = lambda child: None) -> None:
        """`on_restarted` is told of a replica that listens again, as a new child."""
        self.children: list[Child] = []
        self.stopping = False
        self.on_restarted = on_restarted
        self._restarting: set[asyncio.Task[None]] = set()
        self._first_end: asyncio.Future[Child] = asyncio.get_running_loop().create_future()

    async def start(self, name: str, command: Sequence[str], env: Mapping[str, str]) -> Child:
        """Start a process; what it writes appears on stderr. Call in the main thread: the leash is tied to it."""
        ready, output = await Pipe.open(), await Pipe.open()
        try:
            process = spawn(command, env, ready.write_fd, output.write_fd)
        finally:
            os.close(ready.write_fd)
            os.close(output.write_fd)
        child = Child(name, command, env, process, ready, output)
        self.children.append(child)
        pidfd = os.pidfd_open(process.pid)
        asyncio.get_running_loop().add_reader(pidfd, self._on_end, child, pidfd)
        return child

    def _on_end(self, child: Child, pidfd: int) -> None:
        asyncio.get_running_loop().remove_reader(pidfd)
        os.close(pidfd)
        child.kill()  # what it left behind; its pid is its group's until it is reaped
        child.process.wait()
        child.ended.set()
        if child.may_leave and child.listening and not child.process.returncode:
            if not self.stopping:
                print(f"pdmesh: {child.name} (pid {child.pid}) has left", file=sys.stderr, flush=True)
        elif child.again and any(other.again and not other.ended.is_set() for other in self.children):
            if not self.stopping:
                print(f"pdmesh: {child.name} (pid {child.pid}) has ended; others go on", file=sys.stderr, flush=True)
                task = asyncio.create_task(self._restart(child), name=f"restart of {child.name}")
                self._restarting.add(task)
                task.add_done_callback(self._restarting.discard)
        elif not self.stopping and not self._first_end.done():
            self._first_end.set_result(child)

    async def _restart(self, before: Child) -> None:
        """Try once to start a replica anew; should it end before it listens, its end makes for the next try."""
        assert before.again is not None
        ran_s = time.monotonic() - before.started_at
        wait_s = before.restart_s if ran_s < LAST_RESTART_S else FIRST_RESTART_S
        await asyncio.sleep(wait_s)
        after = await self.start(before.name, before.again, before.env)
        after.again, after.restart_s = before.again, min(2 * wait_s, LAST_RESTART_S)
        if line := await after.ready.reader.readline():
            after.listening = parse(line)
            print(f"pdmesh: {after.name} (pid {after.pid}) listens again", file=sys.stderr, flush=True)
            self.on_restarted(after)

    async def listening(self, child: Child) -> Listening:
        """Where the child listens, once it says so. Waits for ever if it ends before: see `failure`."""
        line = await child.ready.reader.readline()
        if not line:
            await asyncio.Event().wait()
        child.listening = parse(line)
        return child.listening

    async def failure(self) -> ChildEnded:
        """Waits until any child ends by itself, and tells why."""
        child = await asyncio.shield(self._first_end)
        await asyncio.wait([child.following], timeout=DRAIN_OUTPUT_S)
        code = child.process.returncode
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        words = child.last_words()
        return ChildEnded(f"{child.name} (pid {child.pid}) {how}: {words or 'it said nothing'}")

    async def stop(self, stages: Sequence[tuple[Sequence[Child], float]]) -> None:
        """SIGTERM to one stage after the other. A stage has until so many seconds from now; then it is killed."""
        self.stopping = True
        for task in self._restarting:
            task.cancel()
        started = time.monotonic()
        try:
            for children, until_s in stages:
                running = [child for child in children if not child.ended.is_set()]
                for child in running:
                    child.process.send_signal(signal.SIGTERM)
                await self._wait_or_kill(running, started + until_s - time.monotonic())
            await self._wait_or_kill(self.children, 0)
        finally:
            for child in self.children:
                if not child.ended.is_set():  # somebody lost patience with us
                    child.kill()
                child.following.cancel()
                child.ready.transport.close()
                child.output.transport.close()
        await asyncio.gather(*(child.following for child in self.children), return_exceptions=True)

    async def _wait_or_kill(self, children: Sequence[Child], limit_s: float) -> None:
        ends = [asyncio.create_task(child.ended.wait()) for child in children]
        if not ends:
            return
        await asyncio.wait(ends, timeout=max(0.0, limit_s))
        for child in children:
            if not child.ended.is_set():
                print(f"pdmesh: {child.name} (pid {child.pid}) does not stop: killed", file=sys.stderr, flush=True)
                child.kill()
        await asyncio.wait(ends)
