"""The ticket that fences a room."""

from __future__ import annotations

import msgspec


class Ticket(msgspec.Struct, frozen=True, array_like=True):
    """`(room_id, attempt, epoch)`: every message about a room carries it; a stale one is refused.

    `attempt` counts a request's tries from 1; `epoch` is the control plane's when the room was opened.
    """

    room_id: str
    attempt: int
    epoch: int

    def __str__(self) -> str:
        return f"{self.room_id}/{self.attempt}@{self.epoch}"
