"""Starts the front door: OpenAI HTTP and gRPC in, one prefill and one decode worker chosen for each request."""

from __future__ import annotations

import argparse

from common.config.flags import add_flags, resolve


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from services.router.main import RouterProcessConfig

    add_flags(parser, RouterProcessConfig)


def run(parsed: argparse.Namespace) -> int:
    from services.router.main import RouterProcessConfig, run

    run(resolve(RouterProcessConfig, parsed))
    return 0
