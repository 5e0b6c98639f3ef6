"""Far more work than decode can take: what is served, and how soon the rest is told that it is not.

    make bench BENCH=saturation ARGS="--seconds 60"

A pair of workers whose decode pool holds a few sequences. First its best load is looked for, with as many clients as
there are places and more; then 200 requests come at once, over sockets that stand already (burst.py); then requests
come at four times the best rate, whatever becomes of the earlier ones. Measured are the answers per second (goodput)
in each phase, and for what was refused the time from its sending to its refusal, less the queue time where it was
queued. At the end no page may be held, nothing may have been retracted, and the workers must be those of the
beginning.

The engine is emulated unless told otherwise: then decode takes 20 ms a step, so that the figures are those of the
control plane and not of the processor that all share.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
from burst import Answered, burst
from load import chat_request
from processes import ROOT, cpu_s, service

from common.errors.base import Reason
from common.rpc.announce import Listening
from common.rpc.status import error_from
from pdmesh.v1 import router_service_pb2 as pb
from pdmesh.v1 import router_service_pb2_grpc as pb_grpc
from pdmesh.v1 import types_pb2

TIMES = {
    "prefill": {"base_s": 0.002, "per_token_s": 0.00001, "per_token_squared_s": 0.0},
    "decode": {"base_s": 0.02, "per_sequence_s": 0.0, "per_kv_token_s": 0.0},
    "transfer": {"latency_s": 0.0001, "bytes_per_s": 1e10},
}
BURST = 200
AT_REST = re.compile('state="(free|cached)"')  # pages that nobody holds
OVERLOAD = 4


@dataclass
class Outcome:
    """One request: whether it was answered, or why not and when."""

    seconds: float
    reason: str = ""
    queued: bool = False


@dataclass
class Mesh:
    router: Listening
    workers: list[Listening]


@contextmanager
def mesh(arguments: argparse.Namespace) -> Iterator[Mesh]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (folder / "times.json").write_text(json.dumps(TIMES))
        bootstrap = stack.enter_context(service("bootstrap", "--port", "0", "--metrics-port", "0"))
        worker = [
            *("--bootstrap", str(bootstrap.grpc), "--port", "0", "--metrics-port", "0"),
            *("--model-path", str(ROOT / "examples" / "models" / "adder"), "--context-length", "256"),
            *("--max-running-requests", str(arguments.places), "--max-total-tokens", str(arguments.places * 256)),
        ]
        if arguments.engine == "emulated":
            worker += ["--engine", "emulated", "--emulated-profile", str(folder / "times.json")]
        workers = [stack.enter_context(service(role, *worker)) for role in ("prefill", "decode")]
        router = service(
            "router",
            *("--bootstrap", str(bootstrap.grpc), "--port", "0", "--grpc-port", "0"),
            *("--max-queued-requests", str(arguments.queue), "--queue-timeout", str(arguments.queue_timeout)),
        )
        yield Mesh(stack.enter_context(router), workers)


class Client:
    """Asks for answers of a fixed length over one channel."""

    def __init__(self, address: str, tokens: int, queue_timeout_s: float) -> None:
        self._channel = grpc.aio.insecure_channel(address)
        self._router: pb_grpc.RouterServiceAsyncStub = pb_grpc.RouterServiceStub(self._channel)
        self._tokens = tokens
        self._queue_timeout_s = queue_timeout_s

    async def ask(self, number: int) -> Outcome:
        sampling = types_pb2.SamplingParams(max_new_tokens=self._tokens, ignore_eos=True, temperature=0.0)
        request = pb.GenerateRequest(prompt=f"What is {number % 1000} + 1?", sampling=sampling)
        start = time.perf_counter()
        try:
            async for response in self._router.Generate(request, timeout=120):
                assert response.usage.completion_tokens == self._tokens
        except grpc.aio.AioRpcError as raw:
            seconds, error = time.perf_counter() - start, error_from(raw)
            return Outcome(seconds, str(error.reason), "within" in error.message)
        return Outcome(time.perf_counter() - start)

    async def ready(self) -> None:
        """Until an answer comes."""
        for _ in range(300):
            if not (await self.ask(0)).reason:
                return
            await asyncio.sleep(0.1)
        raise SystemExit("the mesh gives no answer")

    async def close(self) -> None:
        await self._channel.close()

    async def closed_loop(self, clients: int, seconds: float) -> float:
        """Answers per second with so many clients that ask again as soon as they have an answer."""
        end = time.perf_counter() + seconds

        async def again() -> int:
            done = 0
            while time.perf_counter() < end:
                done += not (await self.ask(done)).reason
            return done

        start = time.perf_counter()
        counts = await asyncio.gather(*(again() for _ in range(clients)))
        return sum(counts) / (time.perf_counter() - start)

    async def open_loop(self, per_second: float, seconds: float) -> tuple[list[Outcome], float]:
        """Requests at a rate, whatever becomes of them; the outcomes, and answers per second."""
        calls: list[asyncio.Task[Outcome]] = []
        start = time.perf_counter()
        while (now := time.perf_counter() - start) < seconds:
            while len(calls) < now * per_second:
                calls.append(asyncio.create_task(self.ask(len(calls))))
            await asyncio.sleep(0.002)
        outcomes = await asyncio.gather(*calls)
        return outcomes, sum(not outcome.reason for outcome in outcomes) / (time.perf_counter() - start)

    def refusals(self, outcomes: list[Outcome]) -> dict[str, object]:
        """How many were refused, and how late."""
        late_ms = [
            (outcome.seconds - (self._queue_timeout_s if outcome.queued else 0.0)) * 1e3
            for outcome in outcomes
            if outcome.reason
        ]
        others = sorted({outcome.reason for outcome in outcomes} - {"", Reason.OVERLOADED})
        figures: dict[str, object] = {"sent": len(outcomes), "refused": len(late_ms), "other_reasons": others}
        if late_ms:
            figures["refused_after_ms_p50"] = round(statistics.median(late_ms), 1)
            figures["refused_after_ms_p99"] = round(sorted(late_ms)[int(len(late_ms) * 0.99)], 1)
        return figures


async def measure(arguments: argparse.Namespace, running: Mesh) -> dict[str, object]:
    client = Client(str(running.router.grpc), arguments.tokens, arguments.queue_timeout)
    await client.ready()
    loads = (arguments.places, arguments.places * 3 // 2, arguments.places * 2)
    closed = {clients: await client.closed_loop(clients, arguments.best_seconds) for clients in loads}
    best = max(closed.values())
    url = f"http://{running.router.http}"
    requests = [chat_request(url, "adder", arguments.tokens, False)] * BURST
    before = cpu_s(running.router.pid)
    at_once = [outcome_of(answer) for answer in burst(url, requests)]
    router_cpu_s = cpu_s(running.router.pid) - before
    flood, goodput = await client.open_loop(best * OVERLOAD, arguments.seconds)
    await client.close()
    return {
        "best_per_s": {clients: round(rate, 2) for clients, rate in closed.items()},
        "burst": {"router_cpu_ms": round(router_cpu_s * 1e3), **client.refusals(at_once)},
        "overload": {"offered_per_s": round(best * OVERLOAD, 1), "served_per_s": round(goodput, 2)}
        | client.refusals(flood),
        "goodput_of_best": round(goodput / best, 3),
    }


def outcome_of(answer: Answered) -> Outcome:
    if answer.status == 200:
        return Outcome(answer.seconds)
    error = answer.body["error"]
    assert isinstance(error, dict)
    return Outcome(answer.seconds, str(error["code"]).upper(), "within" in str(error["message"]))


def figures_of(worker: Listening) -> dict[str, float]:
    """A worker's pages by state and its retractions."""
    with urllib.request.urlopen(f"http://{worker.metrics}/metrics", timeout=10) as response:
        lines = response.read().decode().splitlines()
    wanted = ("pdmesh_kv_pages", "pdmesh_retracted_sequences_total")
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(wanted)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="of overload")
    parser.add_argument("--best-seconds", type=float, default=8.0, help="of each load when the best is looked for")
    parser.add_argument("--places", type=int, default=8, help="sequences that decode's pool and batch hold")
    parser.add_argument("--tokens", type=int, default=32, help="of an answer")
    parser.add_argument("--queue", type=int, default=64)
    parser.add_argument("--queue-timeout", type=float, default=2.0)
    parser.add_argument("--engine", choices=("emulated", "torch"), default="emulated")
    arguments = parser.parse_args()
    with mesh(arguments) as running:
        figures = asyncio.run(measure(arguments, running))
        time.sleep(1.0)  # the last news of the workers
        for worker in running.workers:
            os.kill(worker.pid, 0)
            state = figures_of(worker)
            held = {name: value for name, value in state.items() if value and not AT_REST.search(name)}
            assert not {name for name in held if "created" not in name}, held
        figures["load_average"] = os.getloadavg()[0]
        print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
