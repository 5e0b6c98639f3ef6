"""Settings that every service has."""

from __future__ import annotations

from dataclasses import dataclass

from common.config.flags import flag


@dataclass(frozen=True)
class LogConfig:
    """How a process logs."""

    log_level: str = flag("info", "Least severe level that is logged.", choices=("debug", "info", "warning", "error"))
    log_format: str = flag("text", "Text for people or JSON lines for machines.", choices=("text", "json"))
    log_requests: bool = flag(False, "Log every request with its parameters and prompt length.")


@dataclass(frozen=True)
class MetricsConfig:
    """Where a process shows its metrics to Prometheus; the router shows them on its HTTP port."""

    metrics_port: int = flag(0, "Port of the Prometheus metrics page, on --host; 0 picks a free one.")
