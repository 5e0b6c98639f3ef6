"""The seam of routing policies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

from pdmesh.v1 import types_pb2
from services.router.request import GenerationRequest


class Candidate(Protocol):
    """A worker that may be chosen: ready, connected, and fit for the request."""

    @property
    def worker_id(self) -> str: ...

    @property
    def record(self) -> types_pb2.Worker:
        """Bootstrap's record; its load is as old as the last heartbeat."""
        ...

    @property
    def in_flight(self) -> int:
        """Sequences that this router has on the worker at this moment."""
        ...


C = TypeVar("C", bound=Candidate)


class Policy(Protocol):
    """Chooses one worker of several for one sequence.

    One instance per leg (prefill, decode) and router. `choose` is called in the event loop for every sequence:
    no I/O, and no more than linear in the number of workers.
    """

    def choose(self, workers: Sequence[C], request: GenerationRequest) -> C:
        """One of `workers`, which is never empty."""
        ...
