"""Starts a prefill worker: computes prompts and sends their KV pages to decode workers."""

from __future__ import annotations

import argparse

from common.cli.worker import add_mode, check_mode
from common.config.flags import add_flags, resolve
from common.worker.config import WorkerConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, WorkerConfig)
    add_mode(parser)


def run(parsed: argparse.Namespace) -> int:
    from services.prefill.main import run

    check_mode(parsed, "prefill")
    run(resolve(WorkerConfig, parsed))
    return 0
