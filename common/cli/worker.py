"""What the commands that start a worker have in common."""

from __future__ import annotations

import argparse

from common.config.flags import bad

# SGLang starts every worker with one command and this flag; here the command says it, and the flag may agree.
MODES = {"prefill": "prefill", "decode": "decode", "unified": "null"}


def add_mode(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--disaggregation-mode",
        metavar="|".join(MODES.values()),
        help="accepted so that SGLang's commands read over; must agree with the command",
    )


def check_mode(parsed: argparse.Namespace, command: str) -> None:
    """Refuse a `--disaggregation-mode` that contradicts the command. Raises `MeshError` (BAD_CONFIG)."""
    mode = parsed.disaggregation_mode
    if mode not in (None, MODES[command]):
        raise bad(f"--disaggregation-mode: {mode!r} contradicts `pdmesh {command}`, which is {MODES[command]!r}")
