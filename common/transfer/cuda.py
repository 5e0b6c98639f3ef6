"""What engines need of CUDA in each of their threads: a context. Without torch, by the driver's own library.

A new thread has none, and UCX, which asks the driver about memory, then fails or takes a slower way.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from typing import Any

from common.transfer.base import TransferError

_thread = threading.local()


def make_current(gpu: int) -> None:
    """Make the context of CUDA device `gpu` current in this thread: the primary one, which torch uses too.

    Costs nothing when it is. Raises `TransferError`.
    """
    if getattr(_thread, "gpu", None) != gpu:
        _check("cuCtxSetCurrent", _library().cuCtxSetCurrent(_primary_context(gpu)))
        _thread.gpu = gpu


@functools.cache
def _primary_context(gpu: int) -> ctypes.c_void_p:
    """Held until the process ends, as is the pool."""
    library, device, context = _library(), ctypes.c_int(), ctypes.c_void_p()
    _check("cuInit", library.cuInit(0))
    _check("cuDeviceGet", library.cuDeviceGet(ctypes.byref(device), gpu))
    _check("cuDevicePrimaryCtxRetain", library.cuDevicePrimaryCtxRetain(ctypes.byref(context), device))
    return context


@functools.cache
def _library() -> Any:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise TransferError(f"a pool on a GPU needs the driver's library: {error}") from None


def _check(call: str, code: int) -> None:
    if code != 0:
        raise TransferError(f"CUDA refused {call} (code {code})")
