"""How the pages of one room travelled, as its writer measured it: told to the fronts, to decode and to bootstrap."""

from __future__ import annotations

import msgspec


class TransferStats(msgspec.Struct, frozen=True, array_like=True):
    """One room's transfers, all chunks together; times are seconds.

    Attributes:
        backend: Name of the transfer backend.
        nbytes: Bytes that arrived.
        descriptors: Pieces that were handed to the backend's engine.
        seconds: While its pages were being written.
        queued_s: That its chunks waited for their turn before that.
        hidden_s: Of `seconds`, before the last chunk of the prompt was computed: it cost the request nothing.
        exposed_s: From then until the last write had ended, the wait for its turn included.
    """

    backend: str
    nbytes: int = 0
    descriptors: int = 0
    seconds: float = 0.0
    queued_s: float = 0.0
    hidden_s: float = 0.0
    exposed_s: float = 0.0

    @property
    def bytes_per_s(self) -> float:
        """Effective bandwidth; 0 where nothing was written, or in no time."""
        return self.nbytes / self.seconds if self.seconds > 0 else 0.0
