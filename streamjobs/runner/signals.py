"""SIGTERM and SIGINT for a runner that owns its process."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol


class Stoppable(Protocol):
    """What a signal is told to."""

    def stop(self, reason: str = ...) -> None:
        """Stop; called again, at once."""
        ...


@dataclass(eq=False)
class _Told:
    """A runner that signals are told to, and how many it has seen of them."""

    runner: Stoppable
    numbers: Sequence[signal.Signals]
    noted: Callable[[int], None]
    loop: asyncio.AbstractEventLoop
    seen: int = 0


#: Those of this process; a signal is for all that asked for it.
_told: list[_Told] = []
_before: dict[signal.Signals, Any] = {}


@contextmanager
def on_signals(
    numbers: Sequence[signal.Signals], runner: Stoppable, noted: Callable[[int], None] = lambda _count: None
) -> Generator[None, None, None]:
    """The first signal stops the runner, the second cancels its handlers, the third exits the process.

    They are counted as soon as the main thread runs any Python code, and not by the event loop, which a handler may
    block. Several runners of a process are all told. What was there before comes back when the last one has ended;
    handlers that were given to the event loop (``loop.add_signal_handler``) can't be asked for, and do not.

    Args:
        numbers: which signals.
        runner: what to stop.
        noted: called at once with how many there were; in the middle of whatever the main thread does.

    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread can; somebody else handles them
        return
    one = _Told(runner, numbers, noted, asyncio.get_running_loop())
    _told.append(one)
    for number in numbers:
        if (
            number not in _before
        ):  # else it is set, and setting it again would lose one that comes between the two
            _before[number] = signal.getsignal(number)
            # wakes a loop that waits, whichever thread was given the signal; then Python calls our own
            one.loop.add_signal_handler(number, lambda: None)
            signal.signal(number, _handle)
    try:
        yield
    finally:
        _told.remove(one)
        wanted = {number for other in _told for number in other.numbers}
        for number in _before.keys() - wanted:
            one.loop.remove_signal_handler(number)
            before = _before.pop(number)  # None: set by something other than Python, which can't be set again
            signal.signal(number, signal.SIG_DFL if before is None else before)


def _handle(number: int, _frame: Any) -> None:
    for one in [one for one in _told if number in one.numbers]:
        one.seen += 1
        if one.seen > 2:
            os._exit(128 + number)
        one.noted(one.seen)
        with suppress(RuntimeError):  # the loop is closed
            one.loop.call_soon_threadsafe(one.runner.stop, signal.Signals(number).name)
