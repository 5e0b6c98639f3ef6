"""How a service tells whoever started it where it listens: one line of JSON on an inherited file descriptor."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass

# Names the descriptor; whoever starts a service sets it. Not a setting: it holds for one process only.
READY_FD = "PDMESH_READY_FD"


@dataclass(frozen=True)
class Listening:
    """A process and its addresses as `host:port`; None where it has no such port."""

    role: str
    pid: int
    grpc: str | None = None
    http: str | None = None
    metrics: str | None = None


def announce(role: str, *, grpc: str | None = None, http: str | None = None, metrics: str | None = None) -> None:
    """Tell what is bound now, if anybody asked, and close the descriptor. Call once all ports are bound."""
    number = os.environ.pop(READY_FD, None)
    if number is None:
        return
    line = json.dumps(asdict(Listening(role, os.getpid(), grpc, http, metrics))) + "\n"
    with os.fdopen(int(number), "w") as file:
        file.write(line)


def parse(line: str | bytes) -> Listening:
    """Read what `announce` wrote. Raises ValueError for anything else."""
    try:
        return Listening(**json.loads(line))
    except TypeError as error:
        raise ValueError(f"not an announcement: {line!r}") from error
