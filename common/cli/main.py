"""The `pdmesh` command: picks a command and turns its errors into one line and an exit code."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from common.errors.base import MeshError, Reason

# name -> help; common.cli.<name> has add_arguments(parser) and run(parsed) -> exit code
COMMANDS = {
    "up": "start a whole mesh on this machine",
    "bootstrap": "start the control plane",
    "prefill": "start a prefill worker",
    "decode": "start a decode worker",
    "unified": "start a worker that does both phases",
    "router": "start the front door: OpenAI HTTP and gRPC",
    "emulate": "start many emulated workers in one process",
    "generate": "ask a running mesh",
    "workers": "list a running mesh's workers",
    "rooms": "list its hand-overs",
    "explain": "tell what became of a request or a room, and why",
    "top": "show it live",
    "drain": "take a worker out of service",
    "abort": "end a hand-over",
    "doctor": "show what this machine has",
}
FAILED, BAD_USAGE, INTERRUPTED = 1, 2, 130

# For gRPC's core, which reads them once. Its INFO lines are about every connection that ends. Its event engine polls
# in a thread of its own and hands each message on to that of Python's completion queue; without it the latter polls
# by itself, and a message on a stream takes two thirds of the time and of the CPU.
GRPC_SETTINGS = {"GRPC_VERBOSITY": "ERROR", "GRPC_EXPERIMENTS": "-event_engine_client,-event_engine_listener"}


def own_version() -> str:
    try:
        return version("pdmesh")
    except PackageNotFoundError:  # a source tree that is not installed
        return "not installed"


def overview() -> argparse.ArgumentParser:
    """The parser of `pdmesh --help`; it knows the commands' names only, so that it starts at once."""
    commands = "\n".join(f"  {name:<11}{help}" for name, help in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="pdmesh",
        usage="pdmesh COMMAND [flags]",
        description="Serves large language models with prefill and decode on separate workers.",
        epilog=f"commands:\n{commands}\n\n`pdmesh COMMAND --help` shows the command's flags.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="what to do")
    parser.add_argument("--version", action="version", version=f"pdmesh {own_version()}")
    return parser


def dispatch(arguments: Sequence[str]) -> int:
    name = overview().parse_args(arguments[:1]).command
    command = importlib.import_module(f"common.cli.{name}")
    parser = argparse.ArgumentParser(prog=f"pdmesh {name}", description=command.__doc__, allow_abbrev=False)
    command.add_arguments(parser)
    code: int = command.run(parser.parse_args(arguments[1:]))
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 2 for settings that cannot work, 1 for any other failure."""
    for name, value in GRPC_SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        return dispatch(sys.argv[1:] if arguments is None else arguments)
    except MeshError as error:
        print(f"pdmesh: {error}", file=sys.stderr)
        return BAD_USAGE if error.reason is Reason.BAD_CONFIG else FAILED
    except KeyboardInterrupt:
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
