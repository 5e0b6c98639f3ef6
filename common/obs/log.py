"""Structured logs to stderr, the same for every process, gRPC or not.

`set_up` once a process; `get_logger` at the head of a module; ids travel in context variables:

    with log_context(request_id=request.request_id, room_id=ticket.room_id):
        log.info("room opened", prefill=..., decode=...)
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, MutableMapping
from contextlib import AbstractContextManager
from typing import Any, cast

import structlog

from common.config.listen import LogConfig

Logger = structlog.typing.FilteringBoundLogger
EventDict = MutableMapping[str, Any]


def set_up(config: LogConfig, service: str, **constant: Any) -> None:
    """Make this process log as `config` says. `service` and `constant` stand in every line.

    Lines of libraries that use `logging` take the same form. May be called again.
    """
    level = logging.getLevelNamesMapping()[config.log_level.upper()]
    always = {"service": service, **constant}

    def add_constant(_logger: Any, _method: str, event: EventDict) -> EventDict:
        for key, value in always.items():
            event.setdefault(key, value)
        return event

    as_json = config.log_format == "json"
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        add_constant,
    ]
    tail: list[structlog.typing.Processor] = [structlog.processors.StackInfoRenderer()]
    if as_json:
        tail += [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    else:
        tail += [
            structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback)
        ]
    structlog.configure(
        processors=[*shared, *tail],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
    send_logging_here(max(level, logging.WARNING), shared, tail)


def send_logging_here(
    level: int, shared: list[structlog.typing.Processor], tail: list[structlog.typing.Processor]
) -> None:
    """Give the root logger of `logging` one handler that writes as structlog does."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *tail],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)


def get_logger(name: str) -> Logger:
    """The logger of a module; `name` is its import path."""
    return cast(Logger, structlog.get_logger(module=name))


def log_context(**ids: Any) -> AbstractContextManager[Mapping[str, Any]]:
    """Put `request_id`, `room_id` and the like into every line that is logged within."""
    return cast(AbstractContextManager[Mapping[str, Any]], structlog.contextvars.bound_contextvars(**ids))
