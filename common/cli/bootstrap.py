"""Starts the control plane: the registry of workers and the one authority over rooms."""

from __future__ import annotations

import argparse

from common.config.flags import add_flags, resolve


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from services.bootstrap.main import BootstrapProcessConfig

    add_flags(parser, BootstrapProcessConfig)


def run(parsed: argparse.Namespace) -> int:
    from services.bootstrap.main import BootstrapProcessConfig, run

    run(resolve(BootstrapProcessConfig, parsed))
    return 0
