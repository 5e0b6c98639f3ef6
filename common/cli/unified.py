"""Starts a unified worker: both phases in one place, without a hand-over."""

from __future__ import annotations

import argparse

from common.cli.worker import add_mode, check_mode
from common.config.flags import add_flags, resolve
from common.worker.config import WorkerConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, WorkerConfig)
    add_mode(parser)


def run(parsed: argparse.Namespace) -> int:
    from services.decode.main import run

    check_mode(parsed, "unified")
    run(resolve(WorkerConfig, parsed), unified=True)
    return 0
