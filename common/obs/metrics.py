"""Prometheus metrics: one registry a process, names that begin with `pdmesh_`, base units (seconds, bytes).

A module makes its metrics when it is imported:

    ROOMS_ENDED = metrics.counter("rooms_ended_total", "Rooms that ended.", ("reason",))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
    start_http_server,
)

from common.errors.base import MeshError, Reason

REGISTRY = CollectorRegistry()
ProcessCollector(registry=REGISTRY)
PlatformCollector(registry=REGISTRY)
GCCollector(registry=REGISTRY)

PREFIX = "pdmesh_"
LATENCY_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


def counter(name: str, help: str, labels: Sequence[str] = ()) -> Counter:
    """A count that only grows; `name` ends in `_total`."""
    return Counter(PREFIX + name, help, labels, registry=REGISTRY)


def gauge(name: str, help: str, labels: Sequence[str] = ()) -> Gauge:
    """A value that goes up and down."""
    return Gauge(PREFIX + name, help, labels, registry=REGISTRY)


def histogram(
    name: str, help: str, labels: Sequence[str] = (), buckets: Sequence[float] = LATENCY_BUCKETS_S
) -> Histogram:
    """A distribution; `buckets` are upper bounds in the unit that `name` ends in."""
    return Histogram(PREFIX + name, help, labels, registry=REGISTRY, buckets=buckets)


def page() -> bytes:
    """The metrics of this process in Prometheus's text format, for a service that has an HTTP port anyway."""
    return generate_latest(REGISTRY)


def serve(host: str, port: int) -> tuple[int, Callable[[], None]]:
    """Show the metrics on `http://host:port/metrics` from a thread; port 0 picks a free one.

    Returns the port and a function that stops the page. Raises `MeshError` (BAD_CONFIG) when the port is taken.
    """
    try:
        server, thread = start_http_server(port, addr=host, registry=REGISTRY)
    except OSError as error:
        raise MeshError(Reason.BAD_CONFIG, f"cannot serve metrics on {host}:{port}: {error.strerror}") from None

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return int(server.server_port), stop
