"""What a worker's hand-overs took, on its metrics page; the histograms' sums and counts are the totals."""

from __future__ import annotations

from functools import cache

from common.obs import metrics
from common.worker.messages import Prefilled, RoomQuiet, RoomTransferred

SECONDS = (0.0001, 0.00025, 0.0005, *metrics.LATENCY_BUCKETS_S)
BYTES = tuple(float(4**power) for power in range(6, 18))  # 4 KiB to 16 GiB
BANDWIDTH = (1e6, 1e7, 1e8, 2.5e8, 5e8, 1e9, 2.5e9, 5e9, 1e10, 2.5e10, 5e10, 1e11)
DESCRIPTORS = tuple(float(4**power) for power in range(10))  # 1 to 262,144
LABELS = ("backend",)

ROOMS = metrics.counter("transfer_rooms_total", "Rooms whose transfers have ended.", (*LABELS, "outcome"))
ROOM_BYTES = metrics.histogram("transfer_bytes", "Bytes of a room that arrived.", LABELS, BYTES)
ROOM_DESCRIPTORS = metrics.histogram(
    "transfer_descriptors", "Pieces of a room that the engine was given.", LABELS, DESCRIPTORS
)
WRITING = metrics.histogram("transfer_seconds", "Time in which a room's pages were being written.", LABELS, SECONDS)
QUEUED = metrics.histogram(
    "transfer_queue_seconds", "Time that a room's chunks waited for their turn to be written.", LABELS, SECONDS
)
HIDDEN = metrics.histogram(
    "transfer_hidden_seconds", "Time of writing before the room's prompt was computed to its end.", LABELS, SECONDS
)
EXPOSED = metrics.histogram(
    "transfer_exposed_seconds", "Time from the end of a room's prompt to the end of its last write.", LABELS, SECONDS
)
RATE = metrics.histogram("transfer_bytes_per_second", "A room's bytes by the time of their writing.", LABELS, BANDWIDTH)
RECEIVED = metrics.counter("transfer_received_bytes_total", "Bytes of rooms that arrived here.", LABELS)


class _Backend:
    """The metrics of one backend: to look labels up costs more than to count."""

    def __init__(self, name: str) -> None:
        self.done, self.failed = (ROOMS.labels(name, outcome) for outcome in ("done", "failed"))
        self.nbytes, self.descriptors = ROOM_BYTES.labels(name), ROOM_DESCRIPTORS.labels(name)
        self.writing, self.queued = WRITING.labels(name), QUEUED.labels(name)
        self.hidden, self.exposed = HIDDEN.labels(name), EXPOSED.labels(name)
        self.rate, self.received = RATE.labels(name), RECEIVED.labels(name)


_backend = cache(_Backend)


def publish(message: Prefilled | RoomQuiet | RoomTransferred) -> None:
    """Count what a rank tells of a room's transfer, if it does."""
    if (stats := message.transfer) is None:
        return
    of = _backend(stats.backend)
    if isinstance(message, RoomTransferred):
        of.received.inc(stats.nbytes)
        return
    if isinstance(message, RoomQuiet):  # the room failed: its figures say nothing of the others'
        of.failed.inc()
        return
    of.done.inc()
    of.nbytes.observe(stats.nbytes)
    of.descriptors.observe(stats.descriptors)
    of.writing.observe(stats.seconds)
    of.queued.observe(stats.queued_s)
    of.hidden.observe(stats.hidden_s)
    of.exposed.observe(stats.exposed_s)
    if rate := stats.bytes_per_s:
        of.rate.observe(rate)
