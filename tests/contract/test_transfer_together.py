"""All engines in one process: each brings libraries that others bring as well."""

from __future__ import annotations

import subprocess
import sys

import pytest

from common.transfer import registry

pytestmark = [pytest.mark.contract, pytest.mark.slow]

PROGRAM = """
import sys
from common.transfer.base import TransferConfig, no_wake
from common.transfer.registry import create

for name in sys.argv[1:]:
    endpoint = create(name, TransferConfig(), no_wake)
    endpoint.allocate(1 << 20)
    endpoint.close()
"""


@pytest.mark.parametrize("turned", [False, True], ids=["in order", "turned"])
def test_a_process_that_used_them_all_ends_well(turned: bool) -> None:
    """Two copies of one library that share their symbols take each other down when the process exits."""
    names = [name for name, reason in registry.available().items() if not reason]
    ended = subprocess.run([sys.executable, "-c", PROGRAM, *(names[::-1] if turned else names)], timeout=120)
    assert ended.returncode == 0
