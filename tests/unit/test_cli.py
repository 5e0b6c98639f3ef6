"""The `pdmesh` command: its parsers, its errors and exit codes, and the commands that need no mesh."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import pytest

from common.cli import generate
from common.cli.default_model import default_model_path
from common.cli.main import COMMANDS, main
from common.config.flags import resolve
from common.errors.base import MeshError, Reason
from common.rpc.server import Service, make_server
from pdmesh.v1 import router_service_pb2 as pb
from pdmesh.v1 import router_service_pb2_grpc as pb_grpc

pytestmark = pytest.mark.unit


def python(code: str) -> str:
    """What `code` prints in a fresh interpreter."""
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_help_lists_all_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in COMMANDS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("pdmesh ")


@pytest.mark.parametrize("arguments", [[], ["serve"], ["up", "--no-such-flag"], ["router", "--portt", "1"]])
def test_wrong_usage_ends_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: pdmesh" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_no_front_loads_torch(name: str) -> None:
    code = f"""
import argparse, importlib, sys
command = importlib.import_module("common.cli.{name}")
parser = argparse.ArgumentParser(description=command.__doc__)
command.add_arguments(parser)
parser.format_help()
if "{name}" in ("bootstrap", "prefill", "decode", "router"):
    importlib.import_module("services.{name}.main")
print([module for module in ("torch", "transformers") if module in sys.modules])
"""
    assert python(code) == "[]\n"


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["prefill"], "--model-path"),
        (["prefill", "--model-path", "x", "--disaggregation-mode", "decode"], "--disaggregation-mode"),
        (["decode", "--model-path", "x", "--disaggregation-mode", "null"], "--disaggregation-mode"),
        (["unified", "--model-path", "x", "--disaggregation-mode", "prefill"], "--disaggregation-mode"),
        (["prefill", "--model-path", "x", "--page-size", "7"], "--page-size"),
        (["router", "--port", "high"], "--port"),
        (["up", "--prefill", "0"], "--prefill"),
        (["up", "--page-size", "7"], "--page-size"),
        (["up", "--status-file", "/nowhere/status.json"], "--status-file"),
        (["up", "--config", "/nowhere/settings.toml"], "--config"),
    ],
)
def test_settings_that_cannot_work_give_one_line_and_2(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    line = one_line(capsys)
    assert line.startswith("pdmesh: BAD_CONFIG: ")
    assert words in line


def test_the_model_in_the_box_is_a_checkpoint_folder() -> None:
    folder = default_model_path()
    for name in ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json"):
        assert (folder / name).is_file(), name
    assert (folder / "model.safetensors").stat().st_size <= 4 << 20


def test_no_router_gives_one_line_and_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(generate, "CONNECT_TIMEOUT_S", 0.1)
    assert main(["generate", "hello", "--router", "127.0.0.1:1"]) == 1
    assert "no router answers at 127.0.0.1:1" in one_line(capsys)


class Echo(pb_grpc.RouterServiceServicer):
    """Answers with the prompt's words, in two pieces; refuses the prompt "bad"."""

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        self.request = request
        if request.prompt == "bad":
            raise MeshError(Reason.CONTEXT_TOO_LONG, "the prompt is too long")
        for piece in request.prompt.partition(" ")[::2]:
            yield pb.GenerateResponse(text=f"<{piece}>")


@pytest.fixture
async def echo() -> AsyncIterator[tuple[str, Echo]]:
    servicer = Echo()
    service = Service("pdmesh.v1.RouterService", pb_grpc.add_RouterServiceServicer_to_server, servicer)
    server = make_server("127.0.0.1", 0, [service])
    await server.start()
    yield server.address, servicer
    await server.stop()


async def ask(address: str, prompt: str, **settings: Any) -> None:
    config = resolve(generate.GenerateConfig, None, {"PDMESH_ROUTER": address} | settings)
    await generate.generate(config, generate.make_request(config, prompt))


async def test_generate_streams_the_text(echo: tuple[str, Echo], capsys: pytest.CaptureFixture[str]) -> None:
    address, servicer = echo
    await ask(address, "one two", PDMESH_TEMPERATURE="0", PDMESH_MAX_NEW_TOKENS="7", PDMESH_STOP="a,b")
    assert capsys.readouterr().out == "<one><two>\n"
    sampling = servicer.request.sampling
    assert (sampling.temperature, sampling.max_new_tokens, list(sampling.stop)) == (0.0, 7, ["a", "b"])
    assert sampling.HasField("temperature")
    assert not sampling.HasField("top_p")
    assert servicer.request.stream


async def test_generate_raises_what_the_router_says(echo: tuple[str, Echo]) -> None:
    with pytest.raises(MeshError) as caught:
        await ask(echo[0], "bad")
    assert caught.value.reason is Reason.CONTEXT_TOO_LONG


def test_generate_refuses_numbers_that_the_call_cannot_carry() -> None:
    config = resolve(generate.GenerateConfig, None, {"PDMESH_TOP_K": "-1"})
    with pytest.raises(MeshError, match="INVALID_PARAMETER"):
        generate.make_request(config, "x")


def test_doctor_tells_programs_what_this_machine_has() -> None:
    report = subprocess.run(
        [sys.executable, "-m", "common.cli.main", "doctor", "--json"], check=True, capture_output=True, text=True
    ).stdout
    found = json.loads(report)
    assert {"system", "processor", "devices", "RDMA", "transfer", "store", "packages", "ports"} == found.keys()
    assert found["transfer"]["local"] == "loads"
