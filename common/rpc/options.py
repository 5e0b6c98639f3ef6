"""gRPC settings that both ends of a channel share."""

from __future__ import annotations

Options = list[tuple[str, int | str]]

MAX_MESSAGE_BYTES = 64 << 20

COMMON: Options = [
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # A peer that vanished without a FIN is noticed within time + timeout, on idle streams too.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]

SERVER: Options = [
    *COMMON,
    # Lower than the clients' keepalive, or they are answered with too_many_pings.
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    # gRPC's default would let two servers share a port, and requests reach either.
    ("grpc.so_reuseport", 0),
]

CHANNEL: Options = [
    *COMMON,
    ("grpc.initial_reconnect_backoff_ms", 100),
    # In spite of its name the time that one attempt to connect may take.
    ("grpc.min_reconnect_backoff_ms", 2_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # Channels to one address share a connection by default; a session of its own is easier to reason about.
    ("grpc.use_local_subchannel_pool", 1),
]
