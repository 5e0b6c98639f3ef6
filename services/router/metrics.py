"""What a router counts."""

from __future__ import annotations

from common.obs import metrics

REQUESTS = metrics.counter("requests_total", "Requests that ended, by API and outcome.", ("api", "outcome"))
REQUEST_SECONDS = metrics.histogram("request_seconds", "From arrival to the last token.")
TTFT_SECONDS = metrics.histogram("time_to_first_token_seconds", "From arrival to the first token.")
ITL_SECONDS = metrics.histogram("inter_token_latency_seconds", "Between a sequence's tokens, as the router sees them.")
PROMPT_TOKENS = metrics.counter("prompt_tokens_total", "Tokens of admitted prompts.")
GENERATION_TOKENS = metrics.counter("generation_tokens_total", "Tokens sent to clients.")
RETRACTED = metrics.counter("retractions_total", "Sequences that decode retracted and that went on in a new attempt.")
RETRIES = metrics.counter("retries_total", "Attempts made anew before a first token, by the reason.", ("reason",))
RUNNING = metrics.gauge("running_requests", "Requests that run.")
QUEUED = metrics.gauge("queued_requests", "Requests that wait for a place, or for decode's credit.")
READY = metrics.gauge("ready", "1 while this router can serve.")
