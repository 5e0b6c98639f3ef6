"""The audit's figures on a worker's metrics page."""

from __future__ import annotations

from common.kvcache.ledger import Audit
from common.obs import metrics

RUNS = metrics.counter("kv_audits_total", "Audits of the page ledger.")
LEAKED = metrics.gauge("kv_leaked_pages", "Pages that no sequence, room or cache claims. More than 0 is a defect.")
DISPUTED = metrics.gauge(
    "kv_disputed_pages", "Pages claimed twice, or in another state than their owner believes. More than 0 is a defect."
)
OLDEST = metrics.gauge("kv_quarantine_oldest_seconds", "Age of the oldest quarantine.")
QUARANTINE = metrics.counter("kv_quarantine_page_seconds_total", "Pages in quarantine, summed over seconds.")


def publish(audit: Audit, before: Audit) -> None:
    """Show an audit that followed `before`."""
    RUNS.inc(audit.runs - before.runs)
    LEAKED.set(audit.leaked_pages)
    DISPUTED.set(audit.disputed_pages)
    OLDEST.set(audit.oldest_quarantine_s)
    QUARANTINE.inc(audit.quarantine_page_seconds - before.quarantine_page_seconds)
