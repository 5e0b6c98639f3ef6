"""A real mesh for tests: `pdmesh up` as a child process, its addresses, its pages, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from pdmesh.v1 import router_service_pb2 as router_pb
from pdmesh.v1 import router_service_pb2_grpc as router_grpc
from pdmesh.v1 import types_pb2 as pb

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 10.0
ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass
class Mesh:
    """A mesh that is up. `processes` is what `--status-file` holds."""

    supervisor: subprocess.Popen[bytes]
    processes: list[dict[str, Any]]
    log: Path

    def of(self, role: str) -> list[dict[str, Any]]:
        return [process for process in self.processes if process["role"] == role]

    @property
    def http(self) -> str:
        return f"http://{self.of('router')[0]['http']}"

    @property
    def grpc(self) -> str:
        return str(self.of("router")[0]["grpc"])

    @property
    def workers(self) -> list[dict[str, Any]]:
        return [process for process in self.processes if process["role"] in ("prefill", "decode", "unified")]

    def pages(self) -> list[dict[str, int]]:
        """Each worker's pages by ledger state, from its metrics page."""
        return [pages_of(worker) for worker in self.workers]

    def at_rest(self) -> bool:
        """Whether no page of any worker is reserved, in use or quarantined."""
        return all(pages["reserved"] == pages["in_use"] == pages["quarantined"] == 0 for pages in self.pages())


def pages_of(worker: dict[str, Any]) -> dict[str, int]:
    prefix = "pdmesh_kv_pages{"
    pages: dict[str, int] = {}
    for line in scrape(worker["metrics"]).splitlines():
        if line.startswith(prefix):
            labels, value = line[len(prefix) :].split("} ")
            pages[labels.split('"')[1]] = int(float(value))
    return pages


def scrape(address: str) -> str:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as response:
        return str(response.read().decode())


def wait_until(condition: Callable[[], bool], timeout_s: float, what: str) -> float:
    """Poll until `condition` holds; returns the seconds it took. Fails the test after `timeout_s`."""
    start = time.monotonic()
    while not condition():
        if time.monotonic() - start > timeout_s:
            raise AssertionError(f"not within {timeout_s} s: {what}")
        time.sleep(0.02)
    return time.monotonic() - start


@contextlib.contextmanager
def running(*arguments: str, command: Sequence[str] = ()) -> Iterator[Mesh]:
    """`pdmesh up` with `arguments` on free ports. Its log is shown when something fails."""
    command = command or (sys.executable, "-m", "common.cli.main")
    with tempfile.TemporaryDirectory(prefix="pdmesh-test-") as folder:
        status, log = Path(folder) / "status.json", Path(folder) / "log"
        ports = ("--port", "0", "--grpc-port", "0", "--bootstrap-port", "0")
        with log.open("wb") as sink:
            supervisor = subprocess.Popen(
                [*command, "up", *ports, "--status-file", str(status), *arguments],
                stdout=sink,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=os.environ | {"PYTHONUNBUFFERED": "1"},
                start_new_session=True,
            )
        try:
            wait_until(lambda: status.exists() or supervisor.poll() is not None, START_TIMEOUT_S, "the mesh is up")
            if not status.exists():
                raise AssertionError(f"pdmesh up ended with {supervisor.returncode}")
            yield Mesh(supervisor, json.loads(status.read_text()), log)
        except BaseException:
            print(log.read_text(errors="replace")[-20_000:])
            raise
        finally:
            stop(supervisor)


def stop(supervisor: subprocess.Popen[bytes]) -> None:
    """Ctrl-C; a mesh that does not end in time is killed and fails the test."""
    if supervisor.poll() is None:
        supervisor.send_signal(signal.SIGINT)
    try:
        code = supervisor.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        supervisor.kill()
        supervisor.wait()
        raise AssertionError(f"the mesh did not stop within {STOP_TIMEOUT_S} s") from None
    assert code == 0, f"pdmesh up ended with {code}"


@dataclass
class Result:
    """The joined answer of one sequence."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[float] = field(default_factory=list)
    finish: str = ""
    usage: pb.Usage | None = None


class Client:
    """A gRPC client of the router."""

    def __init__(self, address: str) -> None:
        self.channel = grpc.aio.insecure_channel(address)
        self.router: router_grpc.RouterServiceAsyncStub = router_grpc.RouterServiceStub(self.channel)

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.channel.close()

    def stream(self, prompt: str | Sequence[int], **sampling: Any) -> AsyncIterator[router_pb.GenerateResponse]:
        request = request_of(prompt, **sampling)
        call: AsyncIterator[router_pb.GenerateResponse] = self.router.Generate(request, timeout=240)
        return call

    async def generate(self, prompt: str | Sequence[int], **sampling: Any) -> Result:
        """One sequence, joined from its deltas; checks that offsets are gapless."""
        result = Result()
        async for response in self.stream(prompt, **sampling):
            assert response.index == 0
            if response.token_ids:
                assert response.token_offset == len(result.token_ids)
            result.token_ids += response.token_ids
            result.text += response.text
            result.logprobs += [entry.chosen.logprob for entry in response.logprobs]
            if response.finish_reason:
                result.finish = pb.FinishReason.Name(response.finish_reason).removeprefix("FINISH_REASON_").lower()
            if response.HasField("usage"):
                result.usage = response.usage
        return result

    async def generate_all(self, prompts: Sequence[str | Sequence[int]], **sampling: Any) -> list[Result]:
        """All at once, in order."""
        return list(await asyncio.gather(*(self.generate(prompt, **sampling) for prompt in prompts)))


def request_of(prompt: str | Sequence[int], *, stream: bool = True, **sampling: Any) -> router_pb.GenerateRequest:
    request = router_pb.GenerateRequest(sampling=pb.SamplingParams(**sampling), stream=stream)
    if isinstance(prompt, str):
        request.prompt = prompt
    else:
        request.token_ids.ids.extend(prompt)
    return request
