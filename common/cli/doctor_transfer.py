"""Measures the transfer backends between two processes of this machine, and says which one to use.

Each backend that loads moves 64 MiB in one piece and as 4,096 scattered pages of 16 KiB, and 4 KiB with a notice after
it; every byte is compared. The same copies within one process, by memcpy, are the floor.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from typing import IO, Any

import msgspec

from common.cli.supervisor import LEASH
from common.config.flags import flag, resolve
from common.config.transfer import rdma_devices
from common.engine.config import EngineConfig
from common.errors.base import MeshError
from common.worker.config import BACKENDS, HandoverConfig, WorkerConfig

SAME_HOST_ONLY = ("local",)
SHAPES = ("piece", "pages")
NBYTES = 64 << 20
WARM_UPS, TIMES, NOTICES = 1, 3, 50
LIMIT_S = 60.0  # for one backend; then its processes are killed


@dataclass(frozen=True)
class ProbeConfig:
    """The settings of a worker that matter for its transfers."""

    host: str = flag("127.0.0.1", "Address that the two processes reach each other by.")
    handover: HandoverConfig = field(default_factory=HandoverConfig)


@dataclass(frozen=True)
class Found:
    """What became of one backend. Bandwidths are in GiB/s, the best of a few; `problem` is empty if it works."""

    problem: str = ""
    piece_gib_s: float = 0.0
    pages_gib_s: float = 0.0
    memcpy_piece_gib_s: float = 0.0
    memcpy_pages_gib_s: float = 0.0
    notice_us: float = 0.0  # median, from the submission of 4 KiB until its notice is there


@dataclass(frozen=True)
class Advice:
    """Which backend to use, and why; no name if none will do."""

    use: str
    why: str


class ProbeFailed(Exception):
    """The two processes did not get on; the message says what happened."""


# ---------------------------------------------------------------------------------------- the two processes


class ProbeProcess:
    """A running `transfer_probe`."""

    def __init__(self, said: IO[bytes]) -> None:
        probe = [sys.executable, "-P", "-m", "common.cli.transfer_probe"]
        self.said = said
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-E", str(LEASH), str(os.getpid()), *probe],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
        )

    def ask(self, *command: Any) -> Any:
        """Raises `ProbeFailed`."""
        assert self.process.stdin
        assert self.process.stdout
        try:
            self.process.stdin.write(json.dumps(command) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise ProbeFailed(self._last_words())
        outcome, value = json.loads(line)
        if outcome == "error":
            raise ProbeFailed(value)
        return value

    def close(self) -> None:
        """End the process, whatever it does."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe
            with suppress(BrokenPipeError):  # what was asked last may not have been read
                pipe.close()

    def _last_words(self) -> str:
        code = self.process.wait()
        self.said.seek(0)
        lines = self.said.read().decode(errors="replace").strip().splitlines()
        how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return f"its process {how}: {lines[-1]}" if lines else f"its process {how}"


@contextmanager
def two_processes() -> Iterator[tuple[ProbeProcess, ProbeProcess]]:
    """A writer and a target; both are gone afterwards, and after `LIMIT_S` at the latest."""
    with ExitStack() as stack:
        ends: list[ProbeProcess] = []
        for _ in range(2):
            ends.append(ProbeProcess(stack.enter_context(tempfile.TemporaryFile())))
            stack.callback(ends[-1].close)
        limit = threading.Timer(LIMIT_S, lambda: kill_all(ends))
        limit.daemon = True
        limit.start()
        stack.callback(limit.cancel)
        yield ends[0], ends[1]


def kill_all(ends: Sequence[ProbeProcess]) -> None:
    for end in ends:
        end.process.kill()


# ---------------------------------------------------------------------------------------- measuring


def measure(config: WorkerConfig) -> Found:
    """Two processes, one backend."""
    encoded = msgspec.json.encode(config).decode()
    try:
        with two_processes() as (writer, target), ThreadPoolExecutor(1) as beside:
            opening = beside.submit(target.ask, "open", encoded, False)
            writer.ask("open", encoded, True)
            writer.ask("connect", opening.result())
            best = {shape: bandwidth(writer, target, shape) for shape in SHAPES}
            floor = {shape: gib_s(writer.ask("memcpy", shape, TIMES + WARM_UPS)) for shape in SHAPES}
            receiving = beside.submit(target.ask, "receive", NOTICES)
            began = writer.ask("send", NOTICES)
            took = [came - start for start, came in zip(began, receiving.result(), strict=True)]
            for end in (writer, target):
                end.ask("close")
    except ProbeFailed as error:
        return Found(str(error))
    return Found(
        "", best["piece"], best["pages"], floor["piece"], floor["pages"], round(statistics.median(took) * 1e6, 1)
    )


def bandwidth(writer: ProbeProcess, target: ProbeProcess, shape: str) -> float:
    """GiB/s of the best write. Raises `ProbeFailed` if other bytes arrived."""
    seconds = writer.ask("write", shape, TIMES + WARM_UPS)
    if not target.ask("verify", shape):
        raise ProbeFailed(f"wrong bytes arrived ({shape}): do not use it")
    return gib_s(seconds)


def gib_s(seconds: list[float]) -> float:
    return round(NBYTES / 2**30 / min(seconds[WARM_UPS:]), 3)


def measure_all(config: ProbeConfig) -> dict[str, Found]:
    """Every backend, one after the other."""
    found = {}
    for name in BACKENDS:
        try:
            worker = WorkerConfig(
                host=config.host,
                handover=replace(config.handover, disaggregation_transfer_backend=name),
                engine=EngineConfig(model_path="none", device="cpu"),
            )
        except MeshError as error:
            found[name] = Found(error.message)
        else:
            found[name] = measure(worker)
    return found


# ---------------------------------------------------------------------------------------- the advice


def advise(found: Mapping[str, Found], *, rdma: bool, gpus: bool) -> dict[str, Advice]:
    """Which backend to use within this machine, and between machines. KV pages are scattered: those figures decide."""
    works = {name: result for name, result in found.items() if not result.problem}
    within = {name: result for name, result in works.items() if not (gpus and name in SAME_HOST_ONLY)}
    between = {name: result for name, result in works.items() if name not in SAME_HOST_ONLY}
    by = "by RDMA" if rdma else "over TCP, for want of an RDMA device"
    return {
        "within_machine": fastest(within, "; measured in host memory, and local moves no GPU's" if gpus else ""),
        "between_machines": fastest(between, f"; the network, {by}, was not measured"),
    }


def fastest(found: Mapping[str, Found], remark: str) -> Advice:
    if not found:
        return Advice("", "no backend that works here does that")
    first, *others = sorted(found, key=lambda name: -found[name].pages_gib_s)
    why = f"scattered pages at {found[first].pages_gib_s:.2f} GiB/s"
    if others:
        ratio = found[first].pages_gib_s / found[others[0]].pages_gib_s
        why += f", {ratio:.1f} times {others[0]}"
    return Advice(first, why + remark)


# ---------------------------------------------------------------------------------------- the command


def run(parsed: Namespace) -> int:
    """1 if no backend works."""
    found = measure_all(resolve(ProbeConfig, parsed))
    advice = advise(found, rdma=bool(rdma_devices()), gpus=has_gpus())
    if parsed.json:
        backends = {name: asdict(result) for name, result in found.items()}
        print(json.dumps({"backends": backends, "use": {where: asdict(a) for where, a in advice.items()}}, indent=2))
    else:
        show(found, advice)
    return 1 if all(result.problem for result in found.values()) else 0


def has_gpus() -> bool:
    return os.path.exists("/dev/nvidia0")


def show(found: Mapping[str, Found], advice: Mapping[str, Advice]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="64 MiB between two processes of this machine, every byte compared")
    table.add_column("BACKEND")
    for name in ("ONE PIECE\nGiB/s", "OF\nMEMCPY", "PAGES\nGiB/s", "OF\nMEMCPY", "4 KiB, NOTICE\nµs"):
        table.add_column(name, justify="right")
    for name, result in found.items():
        if not result.problem:
            table.add_row(
                name,
                f"{result.piece_gib_s:.2f}",
                f"{result.piece_gib_s / result.memcpy_piece_gib_s:.0%}",
                f"{result.pages_gib_s:.2f}",
                f"{result.pages_gib_s / result.memcpy_pages_gib_s:.0%}",
                f"{result.notice_us:.0f}",
            )
    console = Console()
    console.print(table)
    for name, result in found.items():
        if result.problem:
            console.print(f"[red]{name} does not work[/]: {escape(result.problem)}", highlight=False)
    for where, what in advice.items():
        name = f"[bold]--disaggregation-transfer-backend {what.use}[/]: " if what.use else ""
        console.print(f"{where.replace('_', ' ')}: {name}{escape(what.why)}", highlight=False)
