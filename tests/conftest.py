"""What holds for every test."""

from __future__ import annotations

import os

import pytest

# Before torch is imported: several ranks and test processes share the cores, and an OpenMP team of two threads on
# a busy machine waits for its slower one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nothing is downloaded at run time; a test that tries shall fail at once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test that starts or kills real processes may be repeated once; the summary names it as rerun.

    It waits for time-outs of real processes, which a machine that is busy elsewhere can stretch beyond any bound.
    What compares contents is never repeated: it says so with `flaky(reruns=0)`.
    """
    for item in items:
        starts_processes = item.get_closest_marker("fault") or item.get_closest_marker("mesh")
        if starts_processes and not item.get_closest_marker("flaky"):
            item.add_marker(pytest.mark.flaky(reruns=1))
