"""SIGTERM and SIGINT for a runner that owns its process."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Protocol


class Stoppable(Protocol):
    """What a signal is told to."""

    def stop(self, reason: str = ...) -> None:
        """Stop; called again, at once."""
        ...


@contextmanager
def on_signals(numbers: Sequence[signal.Signals], runner: Stoppable) -> Generator[None, None, None]:
    """The first signal stops the runner, the second cancels its handlers, the third exits the process."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread can; somebody else handles them
        return
    loop = asyncio.get_running_loop()
    seen = 0

    def handle(number: signal.Signals) -> None:
        nonlocal seen
        seen += 1
        if seen > 2:
            os._exit(128 + number)
        runner.stop(number.name)

    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        loop.add_signal_handler(number, handle, number)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
            signal.signal(number, before[number])
