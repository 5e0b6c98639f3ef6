"""What a transfer costs the model's step that runs beside it, on the side that writes and on the side written to.

    make bench BENCH=step_beside_transfer

Two processes, each with an engine whose pool belongs to a transfer backend, as ranks have. One computes steps on one
thread; meanwhile pages of the one's pool go to the other's, without a pause. The floor is memory bandwidth: the same
steps beside a third process that copies memory, as many bytes a second as the transfer moved, and does nothing else.
Times are medians; the three kinds take turns in every round, and the rounds' best counts. `processor` is the step's
own time on its core: memory bandwidth slows that too, but not threads that want the same core.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

COPY_BYTES = 64 << 20
PAGES_AT_ONCE = 64
CHUNK, BATCH, CONTEXT, PAGE = 256, 8, 512, 16
MOST_UNDER_WAY = 64  # transfers that are submitted and not done


# ---------------------------------------------------------------------------------------- in a child


class Side:
    """One rank's engine and transfer endpoint, driven by commands."""

    def __init__(self, backend: str, model: str, copy_threads: int) -> None:
        from common.engine.config import EngineConfig
        from common.engine.runner import ModelRunner
        from common.transfer.base import TransferConfig
        from common.transfer.registry import create
        from common.worker.rank import build_engine

        self.backend = create(backend, TransferConfig(threads=copy_threads), lambda: None)
        config = EngineConfig(model_path=model, dtype="bfloat16", max_total_tokens=16384, page_size=PAGE)
        engine = build_engine(config, self.backend.allocate)
        assert isinstance(engine.runner, ModelRunner)
        self.runner = engine.runner
        self.pages = engine.allocator.num_pages
        self.peer: Any = None
        self.handles: set[Any] = set()
        self.moved = self.turn = 0
        self.under_way = 2

    def export(self) -> str:
        return self.backend.export().hex()

    def connect(self, descriptor: str) -> None:
        self.peer = self.backend.connect(bytes.fromhex(descriptor))

    def chunks(self, kind: str) -> list[Any]:
        """A step: `BATCH` sequences that decode, or a prompt's chunk; in the pool's first pages."""
        from common.engine.batch import Chunk

        span = CONTEXT // PAGE
        if kind == "prefill":
            return [Chunk(CONTEXT - CHUNK, [7] * CHUNK, list(range(span)), True)]
        return [Chunk(CONTEXT - 1, [7], list(range(row * span, (row + 1) * span)), True) for row in range(BATCH)]

    def steps(self, kind: str, seconds: float, sending: bool) -> dict[str, float]:
        """Compute for a while, and keep pages on their way meanwhile if `sending`."""
        chunks, times, own = self.chunks(kind), [], []
        self.moved, began = 0, time.monotonic()
        while time.monotonic() - began < seconds:
            if sending:
                self.pump()
            start, start_own = time.monotonic(), time.thread_time()
            self.runner.run(chunks)
            times.append(time.monotonic() - start)
            own.append(time.thread_time() - start_own)
        rate = self.moved / (time.monotonic() - began)
        return {"step_s": statistics.median(times), "own_s": statistics.median(own), "bytes_per_s": rate}

    def send(self, seconds: float) -> dict[str, float]:
        """Keep pages on their way for a while, and do nothing else."""
        self.moved, began = 0, time.monotonic()
        while time.monotonic() - began < seconds:
            self.pump()
            time.sleep(0.001)
        return {"bytes_per_s": self.moved / (time.monotonic() - began)}

    def pump(self) -> None:
        """Take note of what was done; submit until enough is under way, in pages that no step uses.

        More is under way than is done in a step: the transfer never pauses.
        """
        from common.transfer.base import HandleState
        from common.transfer.runs import coalesce

        page_bytes = self.runner.layout.page_bytes
        for completion in self.backend.poll():
            if completion.state is not HandleState.DONE:
                raise SystemExit(completion.error)
            self.handles.discard(completion.handle)
            self.moved += PAGES_AT_ONCE * page_bytes
        if len(self.handles) <= self.under_way // 4:
            self.under_way = min(2 * self.under_way, MOST_UNDER_WAY)
        first = BATCH * CONTEXT // PAGE
        while len(self.handles) < self.under_way:
            at = first + self.turn * PAGES_AT_ONCE % (self.pages - first - PAGES_AT_ONCE)
            self.turn += 1
            pages = range(at, at + PAGES_AT_ONCE)
            if not self.backend.accepts(self.peer, self.turn):
                break
            self.handles.add(self.backend.submit(self.peer, coalesce(pages, pages, page_bytes), 30.0, self.turn))

    def fill(self) -> None:
        """Send the whole pool once, so that the kernel has given memory to all of it on both sides."""
        while self.turn * PAGES_AT_ONCE < self.pages:
            self.pump()
            time.sleep(0.001)
        self.rest()

    def rest(self) -> None:
        """Wait until nothing is under way."""
        while self.handles:
            for completion in self.backend.poll():
                self.handles.discard(completion.handle)
            time.sleep(0.001)


class Copier:
    """Copies memory at a given rate, in one thread, and does nothing else."""

    def __init__(self) -> None:
        self.source, self.target = (ctypes.create_string_buffer(b"x" * COPY_BYTES, COPY_BYTES) for _ in range(2))

    def copy(self, bytes_per_s: float, seconds: float) -> dict[str, float]:
        if not bytes_per_s:
            raise SystemExit("nothing was transferred")
        piece, copied, began = 1 << 20, 0, time.monotonic()
        while (now := time.monotonic() - began) < seconds:
            if copied > now * bytes_per_s:
                time.sleep(copied / bytes_per_s - now)
                continue
            at = copied % COPY_BYTES
            ctypes.memmove(ctypes.byref(self.target, at), ctypes.byref(self.source, at), piece)
            copied += piece
        return {"bytes_per_s": copied / (time.monotonic() - began)}


def child() -> None:
    """Answer commands: a line `[method, arguments…]` each, and a line of JSON back."""
    name, *arguments = json.loads(sys.stdin.readline())
    what: Any = Side(*arguments) if name == "side" else Copier()
    print("null", flush=True)
    for line in sys.stdin:
        method, *arguments = json.loads(line)
        print(json.dumps(getattr(what, method)(*arguments)), flush=True)


# --------------------------------------------------------------------------------------- the parent

Call = Callable[..., Callable[[], Any]]


@contextmanager
def started(*what: Any) -> Iterator[Call]:
    """A child. Yields a function that calls a method there and returns how to wait for its result."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--child"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdin
    assert process.stdout
    commands, answers = process.stdin, process.stdout

    def call(*command: Any) -> Callable[[], Any]:
        print(json.dumps(command), file=commands, flush=True)

        def result() -> Any:
            select.select([answers], [], [])
            return json.loads(answers.readline())

        return result

    try:
        call(*what)()
        yield call
    finally:
        commands.close()
        process.wait()


def measure(backend: str, kind: str, arguments: argparse.Namespace) -> list[dict[str, float]]:
    """Rows for a step on the writer's side and on the target's: alone, beside the transfer, beside the copier."""
    seconds = arguments.seconds
    rows = []
    with ExitStack() as stack:
        side = ("side", backend, arguments.model, arguments.copy_threads)
        writer, target, copier = (stack.enter_context(started(*what)) for what in (side, side, ("copier",)))
        writer("connect", target("export")())()
        writer("fill")()
        for where, steps in (("writer", writer), ("target", target)):
            best: dict[str, float] = {}
            for _ in range(arguments.rounds + 1):  # the first warms up, and its copy finds its rate
                alone = steps("steps", kind, seconds, False)()
                if where == "writer":
                    beside = steps("steps", kind, seconds, True)()
                else:
                    sending = writer("send", seconds)
                    beside = steps("steps", kind, seconds, False)() | sending()
                writer("rest")()
                copying = copier("copy", beside["bytes_per_s"], seconds)
                floor = steps("steps", kind, seconds, False)()
                copying()
                kinds = {"alone": alone, "beside": beside, "floor": floor}
                times = {f"{name} {what}": row[what] for name, row in kinds.items() for what in ("step_s", "own_s")}
                if best:
                    best = {name: min(best[name], value) for name, value in times.items()} | {"rate": best["rate"]}
                    best["rate"] = max(best["rate"], beside["bytes_per_s"])
                else:
                    best = dict.fromkeys(times, float("inf")) | {"rate": 0.0}
            rows.append(best)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", nargs="+", default=["local", "mooncake", "nixl"])
    parser.add_argument("--kinds", nargs="+", default=["decode", "prefill"])
    parser.add_argument("--model", default="", help="checkpoint folder (default: one of 125 million parameters)")
    parser.add_argument("--seconds", type=float, default=0.8, help="of one measurement")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--copy-threads", type=int, default=0, help="of the local backend (default: the workers')")
    arguments = parser.parse_args()
    if not arguments.model:
        from checkpoint import llama

        arguments.model = str(llama())
    if not arguments.copy_threads:
        from common.worker.config import HandoverConfig

        arguments.copy_threads = HandoverConfig().copy_threads
    print(
        f"load {os.getloadavg()[0]:.2f}, {os.cpu_count()} cores, {arguments.copy_threads} threads of the local backend"
    )
    print(f"decode: {BATCH} sequences of {CONTEXT} tokens; prefill: {CHUNK} tokens after {CONTEXT - CHUNK}\n")
    columns = "step | backend | side | transfer | alone | beside it | beside a copy"
    print(f"| {columns} | slowed by | floor | processor | floor |\n|---|---|---|---|---|---|---|---|---|---|---|")
    for kind in arguments.kinds:
        for backend in arguments.backends:
            for side, row in zip(("writer", "target"), measure(backend, kind, arguments), strict=True):
                show(f"{kind} | {backend} | {side}", row)


def show(name: str, row: dict[str, float]) -> None:
    times = " | ".join(f"{row[f'{key} step_s'] * 1e3:.1f} ms" for key in ("alone", "beside", "floor"))
    slowed = " | ".join(
        f"{row[f'{key} {what}'] / row[f'alone {what}']:.2f} x"
        for what in ("step_s", "own_s")
        for key in ("beside", "floor")
    )
    print(f"| {name} | {row['rate'] / 1e9:.1f} GB/s | {times} | {slowed} |", flush=True)


if __name__ == "__main__":
    child() if "--child" in sys.argv else main()
