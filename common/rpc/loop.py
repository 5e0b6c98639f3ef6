"""Running a service: one event loop a process, and a stop that SIGTERM and SIGINT set."""

from __future__ import annotations

import asyncio
import gc
import signal
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")

# Python's own (700, 10, 10) make a service that holds thousands of requests spend a tenth of its time on looking
# through them; what a service lets go of is nearly all freed by reference counts.
GC_THRESHOLDS = (20_000, 50, 100)


def run(main: Callable[[asyncio.Event], Awaitable[T]]) -> T:
    """Run `main(stop)` under uvloop, where there is one, until it returns.

    `stop` is set by the first SIGTERM or SIGINT; the second one of either has its usual effect, so that a
    shutdown that hangs can be cut short.
    """

    async def with_signals() -> T:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()

        def on_signal(number: signal.Signals) -> None:
            loop.remove_signal_handler(number)
            stop.set()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, on_signal, number)
        return await main(stop)

    gc.set_threshold(*GC_THRESHOLDS)
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(with_signals())


def new_event_loop() -> asyncio.AbstractEventLoop:
    """A uvloop loop; asyncio's own on platforms that uvloop does not support."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop
