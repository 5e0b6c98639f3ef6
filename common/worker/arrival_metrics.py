"""What a decode worker found in what arrived, on its metrics page."""

from __future__ import annotations

from common.engine.messages import Arrivals
from common.obs import metrics

STALE = metrics.counter(
    "stale_notices_total",
    "Completions that were dropped: of another attempt, of a room that had ended, repeated.",
)
VERIFIED = metrics.counter("kv_checksum_pages_total", "Pages that were compared with their checksums.")
MISMATCHES = metrics.counter(
    "kv_checksum_mismatches_total", "Rooms that failed because a page was not what prefill had sent."
)


def publish(arrivals: Arrivals, before: Arrivals) -> None:
    """Add what came after `before`."""
    STALE.inc(arrivals.stale_notices - before.stale_notices)
    VERIFIED.inc(arrivals.pages_verified - before.pages_verified)
    MISMATCHES.inc(arrivals.checksum_mismatches - before.checksum_mismatches)
