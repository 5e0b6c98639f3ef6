"""What the suites of the transfer backends share; `backend` is each suite's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.contract.transfer_ends import Peer


@pytest.fixture
def start_peer(backend: str, tmp_path: Path) -> Iterator[Callable[[], Peer]]:
    """Starts processes at the other end, and ends them."""
    started: list[Peer] = []

    def start() -> Peer:
        started.append(Peer(backend, tmp_path))
        return started[-1]

    yield start
    for peer in started:
        peer.cleanup()
