"""Wakes a rank's loop from any thread."""

from __future__ import annotations

import os


class Waker:
    """An eventfd that the loop polls beside its socket. `wake` may be called from any thread, also after `close`."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def wake(self) -> None:
        """Make the loop's current or next wait return; many calls before that count as one."""
        if self.fd >= 0:
            os.eventfd_write(self.fd, 1)

    def drain(self) -> None:
        """Forget earlier calls of `wake`."""
        try:
            os.eventfd_read(self.fd)
        except BlockingIOError:
            return

    def close(self) -> None:
        """Close the descriptor. Whoever calls `wake` has ended by then. Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
