"""SIGTERM and SIGINT for a runner that owns its process."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Protocol


class Stoppable(Protocol):
    """What a signal is told to."""

    def stop(self, reason: str = ...) -> None:
        """Stop; called again, at once."""
        ...


@contextmanager
def on_signals(
    numbers: Sequence[signal.Signals], runner: Stoppable, noted: Callable[[int], None] = lambda _count: None
) -> Generator[None, None, None]:
    """The first signal stops the runner, the second cancels its handlers, the third exits the process.

    They are counted as soon as the main thread runs any Python code, and not by the event loop, which a handler may
    block.

    Args:
        numbers: which signals.
        runner: what to stop.
        noted: called at once with how many there were; in the middle of whatever the main thread does.

    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread can; somebody else handles them
        return
    loop = asyncio.get_running_loop()
    seen = 0

    def handle(number: int, _frame: Any) -> None:
        nonlocal seen
        seen += 1
        if seen > 2:
            os._exit(128 + number)
        noted(seen)
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(runner.stop, signal.Signals(number).name)

    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        # wakes a loop that waits, whichever thread was given the signal; then Python calls our own
        loop.add_signal_handler(number, lambda: None)
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
            signal.signal(number, before[number])
