"""How a process that runs handlers ends although something in it does not."""

from __future__ import annotations

import os
import queue
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from streamjobs import events
from streamjobs.clock import boot
from streamjobs.runner import Runner

#: Exit code of a runner whose event loop a handler has blocked for too long.
BLOCKED = 6
_GRACE = 2.0  # seconds after the stop deadline: a second more than a stop takes


class Leaving:
    """Ends the process when its time is over, whatever its threads do.

    A handler may block the event loop, which then stops nothing, or leave work in one of the loop's threads, for whose
    end the loop's own waits. So a thread waits beside them.

    Args:
        runner: whose process it is.
        before: called before the process ends here.

    """

    def __init__(self, runner: Runner, before: Callable[[], None] = lambda: None) -> None:
        self._runner = runner
        self._before = before
        self._limits: queue.SimpleQueue[float | None] = (
            queue.SimpleQueue()
        )  # a signal's handler may put into it
        self.stopped = False  # set when the runner has ended
        threading.Thread(target=self._wait, name="leaving", daemon=True).start()

    def signalled(self, count: int) -> None:
        """A signal has come, the ``count``-th: a stop takes its deadline and a moment, from the second on a moment."""
        self._limits.put(_GRACE if count > 1 else self._runner.settings.stop_deadline + _GRACE)

    def off(self) -> None:
        """The process will end by itself."""
        self._limits.put(None)

    def now(self, code: int = 1) -> None:
        """End the process."""
        self._before()
        if self._runner.health is not None:
            with suppress(OSError):
                Path(self._runner.health).unlink(missing_ok=True)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)

    def _wait(self) -> None:
        until: float | None = None
        while True:
            try:
                limit = self._limits.get(timeout=None if until is None else max(0.0, until - boot()))
            except queue.Empty:
                break
            if limit is None:
                return
            until = boot() + limit if until is None else min(until, boot() + limit)
        events.emit("runner.cut", runner=self._runner.name, owner=self._runner.owner, reason=self._why())
        self.now()

    def _why(self) -> str:
        if not self.stopped:
            return "its stop is not over: the event loop is blocked, or very late"
        going = sorted(one.name for one in threading.enumerate() if one.name.startswith("asyncio_"))
        return f"what was left in the loop's threads goes on: {', '.join(going) or 'none by name'}"
