"""Whether the event loop turns, as seen from the beat's thread.

A handler that blocks the loop keeps its runner's jobs, since the beat has a thread of its own; but nothing else of the
runner goes on meanwhile, so it is named soon, and after ``max_block`` its stack is shown and the health turns bad.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from streamjobs import events
from streamjobs.clock import boot
from streamjobs.job import Job
from streamjobs.settings import Settings

_FRAMES = 12


class Turns:
    """Asks the loop now and then to answer; made in the loop, used in the beat's thread.

    Args:
        settings: ``beat``, in halves of which it asks, and ``max_block``.
        who: the runner's fields of each event.
        stuck: called in the beat's thread when the loop has been blocked for ``max_block``.

    Attributes:
        job_of: the job whose handler a task runs.

    """

    def __init__(
        self, settings: Settings, who: Callable[[], dict[str, str]], stuck: Callable[[], None]
    ) -> None:
        self.period = settings.beat / 2
        self._max = settings.max_block
        self._who = who
        self.job_of: Callable[[asyncio.Task[Any]], Job | None] = lambda _task: None
        self._stuck = stuck
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._looked = self._turned = boot()
        self._asked = False
        self._told = ""

    @property
    def good(self) -> bool:
        """Whether the loop has turned within ``max_block``."""
        return boot() - self._turned < self._max

    def look(self) -> None:
        """Ask once more, or say that the last question is still without an answer."""
        now = boot()
        if now - self._looked > 2 * self.period:
            self._turned = now  # this thread was held up too (a suspended machine): nobody's fault
        self._looked = now
        silent = now - self._turned
        if not self._asked:
            self._asked, self._turned = True, now
            with suppress(RuntimeError):  # closed: nothing is left to be blocked
                self._loop.call_soon_threadsafe(self._answered)
        elif silent >= self._max and self._told != "stuck":
            self._told = "stuck"
            frames = sys._current_frames()  # noqa: SLF001 # pyright: ignore[reportPrivateUsage] - documented all the same
            stack = "".join(traceback.format_stack(frames.get(self._thread), _FRAMES))
            events.emit("loop.stuck", **self._who(), **self._job(), since_ms=silent * 1000, stack=stack)
            self._stuck()
        elif silent >= 0.9 * self.period and not self._told and not self._loop.is_closed():
            self._told = "blocked"
            events.emit("loop.blocked", **self._who(), **self._job(), since_ms=silent * 1000)

    def _answered(self) -> None:
        now = boot()
        self._asked = False
        if self._told:
            self._told = ""
            events.emit("loop.turned", **self._who(), since_ms=(now - self._turned) * 1000)
        self._turned = now

    def _job(self) -> dict[str, Any]:
        """The job whose handler has the loop, as far as it can be told from outside."""
        with suppress(RuntimeError):
            task = asyncio.current_task(self._loop)
            job = None if task is None else self.job_of(task)
            if job is not None:
                return {"job": job.id, "kind": job.kind, "number": job.number}
        return {}
