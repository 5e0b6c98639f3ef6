"""Both ends of a transfer that is measured: ours, and the bare engine on the same pools.

The target is a process that owns a pool (`python benchmarks/transfer_ends.py BACKEND POOL_BYTES`). The writer is the
process that asks. Through our interface a write is `submit` until its completion has come by `wake` and `poll`; the
bare engine is called as its own documentation does, with the same addresses, in one thread. Both use the same memory.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from common.transfer import mooncake, nixl  # noqa: E402
from common.transfer.base import HandleState, Pieces, TransferBackend, TransferConfig  # noqa: E402
from common.transfer.memory import address_of, map_memory  # noqa: E402
from common.transfer.registry import available, create  # noqa: E402

TIMEOUT_S = 60.0
BACKENDS = ("local", "nixl", "mooncake")
_POLL_S = 0.0005  # of a bare NIXL target, as often as ours


class Ours:
    """A backend with its pool."""

    def __init__(self, backend: str, pool_bytes: int, threads: int = 1) -> None:
        self.news = threading.Event()
        self.endpoint: TransferBackend = create(backend, TransferConfig(threads=threads), self.news.set)
        self.view = self.endpoint.allocate(pool_bytes)
        self.pool: NDArray[np.uint8] = np.frombuffer(self.view, dtype=np.uint8)
        self.address = address_of(self.view)

    def connect(self, descriptor: str) -> None:
        self.peer = self.endpoint.connect(bytes.fromhex(descriptor))

    def write(self, *chunks: Pieces) -> None:
        """Submit them all, and wait until all are there."""
        handles = {self.endpoint.submit(self.peer, pieces, TIMEOUT_S) for pieces in chunks}
        while handles:
            self.news.wait()
            self.news.clear()
            for completion in self.endpoint.poll():
                if completion.state is not HandleState.DONE:
                    raise SystemExit(completion.error)
                handles.discard(completion.handle)

    def notice(self) -> float:
        """Wait for the next payload; when it was here, by the machine's monotonic clock."""
        while not self.endpoint.received():
            self.news.wait()
            self.news.clear()
        return time.monotonic()


class BareMemcpy:
    """The floor of `local`: the same copies within this process."""

    def __init__(self, source: Ours, reach: Any) -> None:
        self.source = source.address
        self.view = map_memory(source.pool.nbytes)
        self.target = address_of(self.view)
        np.frombuffer(self.view, dtype=np.uint8)[:] = 0  # the kernel gives its pages now

    def write(self, *chunks: Pieces) -> None:
        copy = ctypes.memmove
        for pieces in chunks:
            for source, target, nbytes in pieces.tolist():
                copy(self.target + target, self.source + source, nbytes)

    def close(self) -> None:
        self.view.release()


class BareMooncake:
    """Mooncake's engine over TCP, a blocking batch for each chunk."""

    def __init__(self, source: Ours, reach: Any) -> None:
        self.engine, self.source = mooncake_engine(source), source.address
        self.session, self.target = reach

    def write(self, *chunks: Pieces) -> None:
        for pieces in chunks:
            sources, targets = (pieces[:, 0] + self.source).tolist(), (pieces[:, 1] + self.target).tolist()
            if self.engine.batch_transfer_sync_write(self.session, sources, targets, pieces[:, 2].tolist()):
                raise SystemExit("mooncake: a write failed")

    def close(self) -> None:
        self.engine = None


class BareNixl:
    """A NIXL agent; all chunks are posted, then polled."""

    def __init__(self, source: Ours, reach: Any) -> None:
        self.agent, self.source = nixl_agent("writer", source), source.address
        metadata, self.target = reach
        self.peer = self.agent.add_remote_agent(bytes.fromhex(metadata))

    def write(self, *chunks: Pieces) -> None:
        handles = []
        for pieces in chunks:
            lists = []
            for column, base in ((0, self.source), (1, self.target)):
                table = np.zeros((len(pieces), 3), dtype=np.uint64)
                table[:, 0], table[:, 1] = pieces[:, column] + base, pieces[:, 2]
                lists.append(self.agent.get_xfer_descs(table, "DRAM"))
            handles.append(self.agent.initialize_xfer("WRITE", *lists, self.peer))
            if self.agent.transfer(handles[-1]) == "ERR":
                raise SystemExit("nixl: a write failed")
        for handle in handles:
            while (state := self.agent.check_xfer_state(handle)) == "PROC":
                time.sleep(0.0001)
            if state != "DONE":
                raise SystemExit("nixl: a write failed")
            self.agent.release_xfer_handle(handle)

    def close(self) -> None:
        self.agent = None


BARE: dict[str, Any] = {"local": BareMemcpy, "mooncake": BareMooncake, "nixl": BareNixl}


def mooncake_engine(pool: Ours) -> Any:
    engine = mooncake.load()()
    if engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") or engine.register_memory(
        pool.address, pool.pool.nbytes
    ):
        raise SystemExit("mooncake does not start")
    return engine


def nixl_agent(name: str, pool: Ours) -> Any:
    api = nixl.load()
    agent = api.nixl_agent(name, api.nixl_agent_config(enable_prog_thread=False, backends=["UCX"]))
    agent.register_memory([(pool.address, pool.pool.nbytes, 0, "")], "DRAM")
    return agent


class Target:
    """The other process."""

    def __init__(self, backend: str, pool_bytes: int) -> None:
        command = [sys.executable, str(Path(__file__).resolve()), backend, str(pool_bytes)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.descriptor, self.reach = self._answer()

    def tell(self, *command: Any) -> None:
        assert self.process.stdin
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()

    def ask(self, *command: Any) -> Any:
        self.tell(*command)
        return self._answer()

    def answer(self) -> Any:
        return self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith("@"):
                return json.loads(line[1:])
        raise SystemExit("the target process ended")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def quiet_engines() -> None:
    """Before any engine is loaded, here and in targets."""
    os.environ.setdefault("UCX_NET_DEVICES", "lo")
    os.environ.setdefault("MC_FORCE_TCP", "1")
    # A bare batch of 4,096 pieces would otherwise be refused.
    os.environ.setdefault("MC_TCP_MAX_QUEUED_TRANSFERS_PER_PEER", "65535")


def usable() -> dict[str, str | None]:
    """The backends to measure, with the reason why not."""
    found = available()
    return {name: found[name] for name in BACKENDS}


def main(
    parser: argparse.ArgumentParser,
    measure: Callable[[str, argparse.Namespace], dict[str, object]],
    table: Callable[[list[dict[str, object]]], str],
) -> int:
    """A benchmark of all backends: `measure` each in a process of its own, for engines share libraries badly."""
    parser.add_argument("--threads", type=int, default=1, help="workers of our sender pool")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    quiet_engines()
    if options.only:
        print("@" + json.dumps(measure(options.only, options)), flush=True)
        os._exit(0)
    print(f"load {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores, best of {options.rounds} rounds", flush=True)
    rows = []
    for name, reason in usable().items():
        if reason:
            print(f"{name}: not measured: {reason}")
            continue
        command = [sys.executable, *sys.argv, "--only", name]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=300, check=True)
        rows += [json.loads(line[1:]) for line in done.stdout.splitlines() if line.startswith("@")]
    print(table(rows))
    return 0


def seconds_of(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def serve(backend: str, pool_bytes: int) -> None:
    ours = Ours(backend, pool_bytes)
    ours.pool[:] = 0
    reach: Any = None
    if backend == "mooncake":
        engine = mooncake_engine(ours)
        reach = f"127.0.0.1:{engine.get_rpc_port()}", ours.address
    polling = threading.Event()
    if backend == "nixl":
        agent = nixl_agent("target", ours)
        reach = agent.get_agent_metadata().hex(), ours.address

        def poll() -> None:
            while polling.wait():
                agent.get_new_notifs()
                time.sleep(_POLL_S)

        threading.Thread(target=poll, daemon=True).start()
    answer((ours.endpoint.export().hex(), reach))
    for line in sys.stdin:
        match json.loads(line):
            case ["bare", begins]:
                polling.set() if begins else polling.clear()
                answer(None)
            case ["sum"]:
                answer(int(ours.pool.view(np.uint64).sum()))
            case ["zero"]:
                ours.pool[:] = 0
                answer(None)
            case ["notice"]:
                answer(ours.notice())
            case ["cpu"]:
                answer(time.process_time())


def answer(value: Any) -> None:
    print("@" + json.dumps(value), flush=True)


if __name__ == "__main__":
    quiet_engines()
    serve(sys.argv[1], int(sys.argv[2]))
