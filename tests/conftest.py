"""What holds for every test."""

from __future__ import annotations

import os

# Before torch is imported: several ranks and test processes share the cores, and an OpenMP team of two threads on
# a busy machine waits for its slower one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nothing is downloaded at run time; a test that tries shall fail at once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
