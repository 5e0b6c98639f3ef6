"""What bootstrap shows to Prometheus."""

from __future__ import annotations

from common.obs import metrics

ROOMS_OPENED = metrics.counter("rooms_opened_total", "Rooms opened.")
ROOMS_REFUSED = metrics.counter("rooms_refused_total", "Rooms that could not be opened.", ("reason",))
ROOMS_ENDED = metrics.counter("rooms_ended_total", "Rooms that ended; the reason of a success is SUCCESS.", ("reason",))
ROOMS = metrics.gauge("rooms", "Rooms by state; ended ones until they are closed.", ("state",))
ROOM_STATE_SECONDS = metrics.histogram("room_state_seconds", "Time that rooms spent in a state.", ("state",))
EVENTS_REFUSED = metrics.counter("room_events_refused_total", "Events that were not applied.", ("event", "reason"))
EVENTS_EARLY = metrics.counter("room_events_early_total", "Workers' events that came before their room was opened.")
EVENTS_EARLY_DROPPED = metrics.counter(
    "room_events_early_dropped_total", "Early events whose room was not opened soon."
)
ROOMS_QUARANTINED = metrics.gauge("rooms_quarantined", "Failed rooms that prefill may still write to.")
WORKERS = metrics.gauge("workers", "Workers by role and state.", ("role", "state"))
ROUTERS = metrics.gauge("routers", "Routers with a session.")
STORE_COMMIT_SECONDS = metrics.histogram("store_commit_seconds", "Time of one group commit to the store.")
STORE_WRITES = metrics.counter("store_writes_total", "Records written to the store.")
STORE_FAILURES = metrics.counter("store_failures_total", "Commits that failed and are repeated.")
STORE_PENDING = metrics.gauge("store_pending", "Records that wait to be written.")
SHARDS_OWNED = metrics.gauge("shards_owned", "Shards that this replica owns.")
