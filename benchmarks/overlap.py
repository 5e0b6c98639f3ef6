"""How much of a hand-over hides behind compute: from the end of the last chunk to the first decode step.

    make bench BENCH=overlap

The real ranks of a prefill and a decode worker, each a process with one thread; this process is their fronts and
their bootstrap. A prompt is computed in chunks, and a chunk's pages travel while the next one computes, so that
after the last chunk nothing should be waited for but its own pages. Beside it the control, which sends everything at
the end. Medians of the requests; the first of a pair of workers warms up.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from checkpoint import llama
from timed_rank import AT_THE_END, ROLE, TIMES

from common.config.listen import LogConfig
from common.engine.config import EngineConfig
from common.engine.messages import Sampling, Tokens
from common.mesh.ticket import Ticket
from common.worker.config import HandoverConfig, WorkerConfig
from common.worker.messages import RoomReserved, StartSequence
from common.worker.ranks import RankProcess

# The KV cache of Llama 8B, 128 KiB a token, under a model that two cores can compute.
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 32,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 1024,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
Event = dict[str, Any]


@dataclass(frozen=True)
class Handed:
    """One hand-over; seconds from the end of the last chunk's compute, `transfer_s` those of its own transfer."""

    transfer_s: float
    nbytes: int
    submitted_s: float
    done_s: float
    decode_s: float


@dataclass
class Worker:
    """A rank whose front this process is."""

    process: RankProcess
    times: Path

    async def until(self, kind: type) -> Any:
        """The next message of that kind; a sequence's tokens only when they are its last."""
        async for batch in self.process.batches():
            for message in batch.messages:
                if isinstance(message, kind) and getattr(message, "finish", True):
                    return message
        raise AssertionError("the rank ended")

    def events(self) -> list[Event]:
        return [json.loads(line) for line in self.times.read_text().splitlines()]


@asynccontextmanager
async def worker(role: str, config: WorkerConfig, folder: Path, at_the_end: bool) -> AsyncIterator[Worker]:
    times = folder / role
    os.environ |= {ROLE: role, TIMES: str(times), AT_THE_END: "1" if at_the_end else ""}
    process = await RankProcess.spawn("timed_rank", msgspec.msgpack.encode(config), cpu_threads=1)
    try:
        yield Worker(process, times)
    finally:
        await process.stop()


async def hand_over(prefill: Worker, decode: Worker, number: int, prompt: list[int]) -> None:
    """One request from start to end."""
    ticket = Ticket(f"room-{number}", 1, 1)
    sampling = Sampling(temperature=0.0, max_new_tokens=4, ignore_eos=True)
    start = StartSequence(number, f"request-{number}", ticket, prompt, sampling)
    decode.process.send(start)
    reserved = await decode.until(RoomReserved)
    prefill.process.send(start)
    prefill.process.send(reserved)
    await decode.until(Tokens)


def evaluate(prefill: list[Event], decode: list[Event], number: int, tokens: int) -> Handed:
    """What the two ranks wrote down of a request."""

    def steps(events: list[Event]) -> list[Event]:
        return [e for e in events if e["kind"] == "step" and any(part[0] == number for part in e["parts"])]

    (last,) = (step for step in steps(prefill) if [number, tokens] in ([part[0], part[2]] for part in step["parts"]))
    submit = next(e for e in prefill if e["kind"] == "submit" and e["began"] >= last["ended"])
    done = next(e for e in prefill if e["kind"] == "done" and e["handle"] == submit["handle"])
    ended = last["ended"]
    first = steps(decode)[0]["began"]
    return Handed(done["seconds"], submit["nbytes"], submit["began"] - ended, done["seen"] - ended, first - ended)


async def measure(backend: str, at_the_end: bool, arguments: argparse.Namespace) -> list[Handed]:
    """The hand-overs of one pair of workers."""
    engine = EngineConfig(
        model_path=arguments.model or str(llama(SHAPE)),
        dtype="bfloat16",
        chunked_prefill_size=arguments.chunk,
        max_total_tokens=2 * arguments.prompt,
    )
    handover = HandoverConfig(disaggregation_transfer_backend=backend)
    config = WorkerConfig(engine=engine, handover=handover, log=LogConfig(log_level="warning"))
    rng = random.Random(arguments.seed)
    requests = range(1, arguments.requests + 2)
    with tempfile.TemporaryDirectory() as folder:
        async with (
            worker("decode", config, Path(folder), at_the_end) as decode,
            worker("prefill", config, Path(folder), at_the_end) as prefill,
        ):
            for number in requests:
                prompt = [rng.randrange(3, 1000) for _ in range(arguments.prompt)]
                await hand_over(prefill, decode, number, prompt)
            told = prefill.events(), decode.events()
    return [evaluate(*told, number, arguments.prompt) for number in requests][1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", nargs="+", default=["local", "mooncake", "nixl"])
    parser.add_argument("--model", help="checkpoint folder (default: one with 128 KiB of KV a token, made here)")
    parser.add_argument("--prompt", type=int, default=2048, help="tokens of a prompt")
    parser.add_argument("--chunk", type=int, default=512, help="tokens of a chunk")
    parser.add_argument("--requests", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    print(f"load {os.getloadavg()[0]:.2f}, seed {arguments.seed}, prompts of {arguments.prompt} tokens")
    print("\n| | sent last | its transfer | last compute → submit | → done | → first decode step | / transfer |")
    print("|---|---|---|---|---|---|---|")
    for backend in arguments.backends:
        for at_the_end in (False, True):
            show(backend, at_the_end, asyncio.run(measure(backend, at_the_end, arguments)))
    sys.stdout.flush()


def show(backend: str, at_the_end: bool, handed: list[Handed]) -> None:
    def median_ms(name: str) -> float:
        return statistics.median(getattr(one, name) for one in handed) * 1e3

    name = f"{backend}, control: all at the end" if at_the_end else f"{backend}, chunk by chunk"
    times = " | ".join(f"{median_ms(name):.2f} ms" for name in ("transfer_s", "submitted_s", "done_s", "decode_s"))
    ratio = statistics.median(one.decode_s / one.transfer_s for one in handed)
    print(f"| {name} | {handed[0].nbytes / 2**20:.1f} MiB | {times} | {ratio:.2f} x |", flush=True)


if __name__ == "__main__":
    main()
