"""Pool memory."""

from __future__ import annotations

import os

import numpy as np
import pytest

from common.transfer.base import TransferError
from common.transfer.memory import HUGE_PAGE_BYTES, address_of, check_memfd, create_memfd, map_memory

pytestmark = pytest.mark.unit

SIZE = 3 << 20


def test_private_memory_is_aligned_zeroed_and_writable() -> None:
    view = map_memory(SIZE)
    assert (len(view), address_of(view) % HUGE_PAGE_BYTES) == (SIZE, 0)
    array = np.frombuffer(view, dtype=np.uint8)
    assert not array.any()
    array[:] = 7
    assert view[SIZE - 1] == 7


def test_two_mappings_of_a_file_share_it() -> None:
    fd = create_memfd(SIZE)
    try:
        check_memfd(fd, SIZE)
        first, second = map_memory(SIZE, fd), map_memory(SIZE, fd)
    finally:
        os.close(fd)
    first[5] = 9
    assert second[5] == 9


def test_size_is_sealed() -> None:
    fd = create_memfd(SIZE)
    try:
        for size in (SIZE - 4096, SIZE + 4096):
            with pytest.raises(PermissionError):
                os.ftruncate(fd, size)
        with pytest.raises(TransferError, match="another size"):
            check_memfd(fd, SIZE + 1)
    finally:
        os.close(fd)


def test_files_that_could_shrink_are_refused() -> None:
    fd = os.memfd_create("pool", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, SIZE)
        with pytest.raises(TransferError, match="not sealed"):
            check_memfd(fd, SIZE)
    finally:
        os.close(fd)


def test_memory_that_is_not_there_is_an_error() -> None:
    with pytest.raises(TransferError, match="cannot map a pool"):
        map_memory(1 << 60)
