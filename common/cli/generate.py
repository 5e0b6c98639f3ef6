"""Asks a running mesh over gRPC and streams the answer's text to stdout. The prompt is taken as it stands."""

from __future__ import annotations

import argparse
import asyncio
import sys
from dataclasses import dataclass, field

import grpc

from common.config.flags import add_flags, flag, resolve
from common.config.tls import TlsConfig, load
from common.errors.base import MeshError, Reason
from common.rpc.channel import connect, error_from
from pdmesh.v1 import router_service_pb2 as pb
from pdmesh.v1 import router_service_pb2_grpc as pb_grpc
from pdmesh.v1 import types_pb2

SAMPLING = ("max_new_tokens", "min_new_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")

CONNECT_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class GenerateConfig:
    """Where to ask, and how tokens are chosen; what is not given is the router's to default."""

    router: str = flag("127.0.0.1:50051", "gRPC address of a router.", metavar="HOST:PORT")
    model: str = flag("", "Served model name; needed only where several are served.")
    timeout: float = flag(600.0, "Seconds that the answer may take.")
    max_new_tokens: int | None = flag(None, "Most tokens to generate.")
    min_new_tokens: int | None = flag(None, "Fewest tokens to generate.")
    temperature: float | None = flag(None, "Divides the logits; 0 is greedy.")
    top_p: float | None = flag(None, "Keeps the smallest set of tokens that reaches this share.")
    top_k: int | None = flag(None, "Keeps the k most likely tokens.")
    min_p: float | None = flag(None, "Drops tokens below this share of the most likely one's probability.")
    repetition_penalty: float | None = flag(None, "Makes tokens that were seen less likely, above 1.")
    seed: int | None = flag(None, "Makes a sampled answer repeatable.")
    stop: tuple[str, ...] = flag((), "Strings that end the answer.")
    ignore_eos: bool = flag(False, "Go on after the model's end-of-sequence token.")
    tls: TlsConfig = field(default_factory=TlsConfig)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", metavar="PROMPT", help="the prompt; - reads it from stdin")
    add_flags(parser, GenerateConfig)


def run(parsed: argparse.Namespace) -> int:
    config = resolve(GenerateConfig, parsed)
    prompt = sys.stdin.read() if parsed.prompt == "-" else parsed.prompt
    asyncio.run(generate(config, make_request(config, prompt)))
    return 0


def make_request(config: GenerateConfig, prompt: str) -> pb.GenerateRequest:
    given = {name: getattr(config, name) for name in SAMPLING}
    try:
        sampling = types_pb2.SamplingParams(
            stop=config.stop, ignore_eos=config.ignore_eos, **{k: v for k, v in given.items() if v is not None}
        )
    except ValueError as error:  # a negative number in an unsigned field
        raise MeshError(Reason.INVALID_PARAMETER, str(error)) from None
    return pb.GenerateRequest(model=config.model, prompt=prompt, sampling=sampling, stream=True)


async def generate(config: GenerateConfig, request: pb.GenerateRequest) -> None:
    """Print the text as it comes. Raises the router's `MeshError`."""
    tls = load(config.tls, serves=False)
    async with connect(config.router, tls) as channel:
        try:
            await asyncio.wait_for(channel.channel_ready(), CONNECT_TIMEOUT_S)
        except TimeoutError:
            how = "over TLS" if tls else "in plain text"
            raise MeshError(Reason.NO_WORKER, f"no router answers at {config.router} {how}") from None
        router: pb_grpc.RouterServiceAsyncStub = pb_grpc.RouterServiceStub(channel)
        try:
            async for response in router.Generate(request, timeout=config.timeout):
                print(response.text, end="", flush=True)
        except grpc.aio.AioRpcError as error:
            raise error_from(error) from None
    print()
