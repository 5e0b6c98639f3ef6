"""Beside another system's front door: latency with one client, and answers per second with 128, in one run.

    make bench BENCH=dynamo_compare ARGS="--target dynamo=http://127.0.0.1:8001=MODEL"

Starts our mesh with emulated workers that take no time (one prefill, one decode), so that what is measured is the
router, the control plane and the hand-over's protocol. A peer runs already: `--target NAME=URL`, or
`NAME=URL=MODEL` where the model's name is not what its `/v1/models` lists first. For NVIDIA Dynamo, with its mocker
in prefill/decode mode, on one machine and without etcd or NATS:

    export DYN_FILE_KV=$(mktemp -d) HF_HUB_OFFLINE=1
    plane="--discovery-backend file --request-plane tcp --event-plane zmq"
    mock="python -m dynamo.mocker --model-path MODEL --model-name tiny --speedup-ratio 1000 $plane"
    python -m dynamo.frontend --http-host 127.0.0.1 --http-port 8001 --router-mode round-robin $plane &
    $mock --disaggregation-mode prefill & $mock --disaggregation-mode decode &

All are asked the same. Rounds take turns, and the best of each counts: whatever else runs here slows, nothing speeds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from load import Load, chat_request, run
from rich.console import Console
from rich.table import Table

START_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Target:
    """A front door."""

    name: str
    url: str
    model: str

    @classmethod
    def parse(cls, text: str) -> Target:
        name, url, *model = text.split("=", 2)
        return cls(name, url.rstrip("/"), model[0] if model else first_model(url))


def first_model(url: str) -> str:
    with urllib.request.urlopen(f"{url.rstrip('/')}/v1/models", timeout=10) as answer:
        return str(json.load(answer)["data"][0]["id"])


@contextlib.contextmanager
def our_mesh(flags: list[str]) -> Iterator[Target]:
    """`pdmesh up` with emulated workers, on free ports."""
    with tempfile.TemporaryDirectory() as folder:
        status = Path(folder, "status.json")
        emulated = ["--engine", "emulated", "--emulated-preset", "zero", "--log-level", "warning"]
        emulated += ["--max-running-requests", "256"]  # as many as Dynamo's mocker runs at once by default
        ports = ["--port", "0", "--grpc-port", "0", "--bootstrap-port", "0", "--status-file", str(status)]
        command = [sys.executable, "-m", "common.cli.main", "up", *ports, *emulated, *flags]
        mesh = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
        try:
            deadline = time.monotonic() + START_TIMEOUT_S
            while not status.exists():
                if mesh.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit("the mesh did not come up")
                time.sleep(0.05)
            (router,) = (entry for entry in json.loads(status.read_text()) if entry["role"] == "router")
            url = f"http://{router['http']}"
            yield Target("pdmesh", url, first_model(url))
        finally:
            mesh.send_signal(signal.SIGINT)
            mesh.wait()


def check(target: Target, tokens: int) -> None:
    """Ask once: the answer must have as many tokens as were asked for."""
    head, _, body = chat_request(target.url, target.model, tokens, False).partition(b"\r\n\r\n")
    assert head
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{target.url}/v1/chat/completions", body, headers)
    with urllib.request.urlopen(request, timeout=30) as answer:
        got = json.load(answer)["usage"]["completion_tokens"]
    if got != tokens:
        raise SystemExit(f"{target.name} answered with {got} tokens instead of {tokens}")


def measure(targets: list[Target], arguments: argparse.Namespace) -> dict[tuple[str, int], Load]:
    """The best run of each target and number of clients."""
    best: dict[tuple[str, int], Load] = {}
    for _ in range(arguments.rounds):
        for clients in (1, arguments.clients):
            for target in targets:
                request = chat_request(target.url, target.model, arguments.tokens, arguments.stream)
                load = run(target.url, request, clients, arguments.seconds)
                known = best.get((target.name, clients))
                if known is None or load.per_second > known.per_second:
                    best[target.name, clients] = load
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", action="append", default=[], metavar="NAME=URL[=MODEL]")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--clients", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--stream", action="store_true", help="streamed answers")
    parser.add_argument("--json", action="store_true")
    arguments, flags = parser.parse_known_args()
    with our_mesh(flags) as ours:
        targets = [ours, *map(Target.parse, arguments.target)]
        for target in targets:
            check(target, arguments.tokens)
        best = measure(targets, arguments)
    show(targets, best, arguments)


def show(targets: list[Target], best: dict[tuple[str, int], Load], arguments: argparse.Namespace) -> None:
    rows = []
    for target in targets:
        one, many = best[target.name, 1], best[target.name, arguments.clients]
        figures = {"p50_ms": one.p50_ms, "p99_ms": one.p99_ms, "per_s": many.per_second, "loaded_p50_ms": many.p50_ms}
        rows.append({"name": target.name, **{name: round(value, 3) for name, value in figures.items()}})
    if arguments.json:
        print(
            json.dumps(
                {"tokens": arguments.tokens, "clients": arguments.clients, "load": os.getloadavg()[0], "rows": rows}
            )
        )
        return
    kind = "streamed" if arguments.stream else "plain"
    table = Table("", "p50, 1 client", "p99", f"answers/s, {arguments.clients} clients", "p50 there")
    table.title = f"{kind} chat completions of {arguments.tokens} tokens"
    for row in rows:
        table.add_row(row["name"], *(f"{row[name]:.2f}" for name in ("p50_ms", "p99_ms", "per_s", "loaded_p50_ms")))
    Console().print(table)


if __name__ == "__main__":
    main()
