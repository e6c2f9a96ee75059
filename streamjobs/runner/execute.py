"""Executing: one try of one job, from the claim's reply to its outcome.

Each try is a plain task, so that stop can leave one behind that swallows its cancellation or sits in a thread. It is
cancelled once for each reason, as asyncio does: a scope that delivers its cancellation again and again would cut
short what a handler awaits to clean up, and spin while one swallows it.
"""

from __future__ import annotations

import asyncio
import inspect
import traceback
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from contextvars import copy_context
from functools import cached_property, partial
from types import TracebackType
from typing import Any

from anyio import CapacityLimiter, to_thread

from streamjobs import context, events
from streamjobs.clock import boot
from streamjobs.errors import LeaseLost
from streamjobs.handler import Cancel, Snooze
from streamjobs.job import Job
from streamjobs.runner.held import Ended, Held

_LOST = "the runner could not renew its lease in time"
#: Seconds within which a job that is claimed ahead of a free slot should begin, at the recent pace.
SOON = 0.05
#: Seconds after which one that has not begun is given back.
LONG = 1.0
_RECENT = 0.2  # seconds over which the pace is counted


class Executor:
    """Runs handlers, as many at once as there are slots; what was claimed ahead waits here for a slot.

    Each handler gets the context variables that were set where this was made, and its own copy of them: those of
    the claim loop hold the driver's deadline for a claim, and those of the handler before it are that one's affair.

    Args:
        slots: how many handlers run at once.
        ended: called in the event loop with each job in hand and how its try ended.
        orphaned: called with a try that outlived stop, from whichever thread it ended in.

    Attributes:
        freed: called in the event loop when a slot has become free.

    """

    def __init__(
        self, slots: int, ended: Callable[[Held, Ended], None], orphaned: Callable[[Held, Ended], None]
    ) -> None:
        self._slots = slots
        self._ended = ended
        self._orphaned = orphaned
        self.freed: Callable[[], None] = lambda: None
        self._tasks: dict[Held, asyncio.Task[None]] = {}
        self._ready: deque[Held] = deque()
        self._ends: deque[float] = deque()
        self._giving_back: asyncio.TimerHandle | None = None
        self._changed = asyncio.Event()
        self._closing = False
        self._context = copy_context()

    @cached_property
    def _threads(self) -> CapacityLimiter:
        return CapacityLimiter(
            self._slots
        )  # the first makes anyio load its backend, while nothing else happens

    @property
    def running(self) -> list[Held]:
        """The jobs whose handlers have not ended."""
        return list(self._tasks)

    def room(self) -> tuple[int, int]:
        """How many jobs would begin at once, and how many more soon, at the pace at which handlers end.

        The second is bounded by time, not by number: workers that lock a backlog ahead leave others idle
        beside them. It is zero while over half of it is in hand, so that claims come in batches. Time in which
        no handler ran for want of jobs counts too: without it one runner of a busy fleet takes the others' part.
        """
        free = self._slots - len(self._tasks) - len(self._ready)
        late = boot() - _RECENT
        while self._ends and self._ends[0] < late:
            self._ends.popleft()
        soon = int(len(self._ends) * SOON / _RECENT)
        if free >= 0:
            return free, soon
        return 0, 0 if -2 * free > soon else soon + free

    def job_of(self, task: asyncio.Task[Any]) -> Job | None:
        """The job whose handler a task runs or (told from Python 3.12 on) was started by; from any thread."""
        job = next((held.job for held, mine in tuple(self._tasks.items()) if mine is task), None)
        return context.of_task(task) if job is None else job

    def start(self, held: Held) -> None:
        """Begin a try, or have it wait for a slot."""
        if self._closing:
            self._ended(held, Ended("released", "the runner is stopping"))
        elif len(self._tasks) < self._slots:
            self._begin(held)
        else:
            self._ready.append(held)
            if self._giving_back is None:
                self._give_back_later()

    def _begin(self, held: Held) -> None:
        # not by the loop's task factory: an eager one runs the handler here, in the middle of the claim
        held.task = asyncio.Task(
            self._one(held), loop=asyncio.get_running_loop(), name=f"streamjobs try {held.job.id}",
            context=self._context.copy(),
        )  # fmt: skip
        self._tasks[held] = held.task
        held.task.add_done_callback(partial(self._unbegun, held))

    def _unbegun(self, held: Held, _task: asyncio.Task[None]) -> None:
        """Give back what was cancelled by another before its first line; all else has left by itself."""
        if held in self._tasks:
            self._ended(held, Ended("released", "it was cancelled before it began"))
            self._leave(held)

    def _leave(self, held: Held) -> None:
        """A slot is free."""
        self._tasks.pop(held, None)
        self._ends.append(boot())
        while self._ready and len(self._tasks) < self._slots:
            self._begin(self._ready.popleft())
        self._changed.set()
        self.freed()

    def _give_back_later(self) -> None:
        self._giving_back = None
        if self._ready:
            wait = max(0.0, self._ready[0].claimed + LONG - boot())
            self._giving_back = asyncio.get_running_loop().call_later(wait, self._give_back)

    def _give_back(self) -> None:
        """The pace was overestimated: what has waited long enough is for others."""
        late = boot() - LONG
        while self._ready and self._ready[0].claimed <= late:
            self._ended(self._ready.popleft(), Ended("released", f"no slot was free within {LONG:g} s"))
        self._give_back_later()

    def _release_ready(self, why: str) -> None:
        while self._ready:
            self._ended(self._ready.popleft(), Ended("released", why))

    async def empty(self) -> None:
        """Wait until no handler is running."""
        while self._tasks:
            self._changed.clear()
            await self._changed.wait()

    def lose(self, owner: str | None) -> list[Held]:
        """The lease of an owner is gone: cancel async handlers, tell sync ones."""
        self._release_ready("the lease could not be trusted before it was about to start")
        hit = [held for held in self._tasks if not held.told_lost and owner in (None, held.owner)]
        for held in hit:
            held.told_lost = True
            self._cancel(held, "lease lost")
        return hit

    def close(self) -> None:
        """Begin no more: what has not begun, and what a claim still brings, is released."""
        self._closing = True
        self._release_ready("the runner is stopping")

    def stop(self) -> None:
        """Stop's deadline has passed: cancel what runs."""
        for held in self._tasks:
            held.told_stop = True
            self._cancel(held, "stop")

    def abandon(self) -> list[Held]:
        """Leave behind what did not end; it is recorded by whoever vouches for it, when it ends."""
        left: list[Held] = []
        for held in list(self._tasks):
            with held.lock:
                if held.result is None:
                    held.abandoned = True
                    left.append(held)
                    if held.over is not None:
                        held.over.set()
        return left

    def _cancel(self, held: Held, reason: str) -> None:
        if held.handler.asynchronous and held.started is not None and held.result is None:
            events.emit("handler.cancelled", **held.about(), reason=reason)
        held.cancel()

    async def _one(self, held: Held) -> None:
        try:
            try:
                ended = await self._try(held)
            except BaseException as error:  # noqa: BLE001 - whatever happens, the job does not stay in hand
                ended = _raised(error)
            held.ended = held.ended or boot()
            with held.lock:
                orphan = held.abandoned
                if held.handler.asynchronous or not orphan:
                    held.result = held.result or ended
            if not orphan:
                self._ended(held, _trusted(held, held.result or ended))
            elif held.handler.asynchronous:  # a thread tells by itself, since its loop may be gone
                self._orphaned(held, _trusted(held, held.result or ended))
        finally:
            self._leave(held)

    async def _try(self, held: Held) -> Ended:
        """Look whether it may start, read the arguments, call, see how it ended."""
        if held.lost:
            return Ended("released", "the lease could not be trusted when it was about to start")
        if self._closing:
            return Ended("released", "the runner is stopping")
        if events.wanted("debug"):
            events.emit_wanted("try.started", **held.about())
        job = held.job.lent(held)
        held.started = boot()
        token = context.enter(job)
        try:
            call = self._call_async if held.handler.asynchronous else self._call_thread
            return await call(held, job)
        except asyncio.CancelledError:
            if not held.told_stop and not held.told_lost:
                raise
            return Ended("interrupted", "the runner stopped")
        finally:
            context.leave(token)

    async def _call_async(self, held: Held, job: Job) -> Ended:
        try:
            args, named = held.handler.arguments(job)
            return _returned(await held.handler.function(*args, **named))
        except asyncio.CancelledError as error:
            if held.told_stop or held.told_lost:
                raise
            if held.task is not None and held.task.cancelling():
                # somebody cancelled the task itself; who cancels all at once, as the end of asyncio.run does, has
                # cancelled the runner with it, which knows of that a turn later
                await asyncio.sleep(0)
                if self._closing:
                    return Ended("interrupted", "the runner stopped")
            return _raised(error)  # also where it awaited something that was cancelled
        except GeneratorExit:
            raise
        except BaseException as error:  # noqa: BLE001 - also SystemExit: one handler may not end the others
            return _raised(error)

    async def _call_thread(self, held: Held, job: Job) -> Ended:
        loop, taken, withdrawn = asyncio.get_running_loop(), False, False

        def call() -> Ended:
            nonlocal taken
            with held.lock:
                taken, orphan = not withdrawn, held.abandoned
            if not taken:
                return _UNCALLED
            if orphan:  # stop's deadline came before a thread did
                held.started = None
                self._orphaned(held, _UNCALLED)
                return _UNCALLED
            try:
                args, named = held.handler.arguments(job)
                ended = _returned(held.handler.function(*args, **named))
            except BaseException as error:  # noqa: BLE001 - as above
                ended = _raised(error)
            held.ended = boot()
            with held.lock:
                held.result = ended
                orphan, over = held.abandoned, held.over
            if orphan:
                self._orphaned(held, _trusted(held, ended))
            elif over is not None:
                with suppress(RuntimeError):  # the loop is closed
                    loop.call_soon_threadsafe(over.set)
            return ended

        try:
            # not cancellable: the slot stays taken for as long as the thread runs
            return await to_thread.run_sync(call, limiter=self._threads, abandon_on_cancel=False)
        except asyncio.CancelledError:
            with held.lock:
                withdrawn, orphan = not taken, held.abandoned
                held.over = over = asyncio.Event()
            if withdrawn:
                held.started = None
                if orphan:
                    self._orphaned(held, _UNCALLED)
                return _UNCALLED
            # cancelled past that shield, as at the end of asyncio.run: the thread goes on, and has the job
            while held.result is None and not held.abandoned:
                with suppress(asyncio.CancelledError):
                    await over.wait()
            if held.result is None:
                raise
            return held.result


_UNCALLED = Ended("released", "the runner is stopping")
_SUCCESS = Ended("success")


def _returned(value: Any) -> Ended:
    if value is None:
        return _SUCCESS
    if isinstance(value, Snooze):
        return Ended("snoozed", delay=float(value.delay))
    if isinstance(value, Cancel):
        return Ended("cancelled", value.reason)
    if inspect.iscoroutine(value):  # asyncio's would say so of a generator, before Python 3.12
        value.close()
        return Ended("failure", "the handler returned a coroutine: define it with async def", "TypeError")
    if inspect.isawaitable(value) or inspect.isgenerator(value) or inspect.isasyncgen(value):
        sort = type(value).__name__
        return Ended(
            "failure", f"the handler returned a {sort}: await it, or loop over it, there", "TypeError"
        )
    return _SUCCESS


def _raised(error: BaseException) -> Ended:
    if isinstance(error, LeaseLost):
        return Ended("lost", _LOST, "LeaseLost")
    name = type(error).__name__
    try:
        text = str(error)
        trace = "".join(traceback.format_exception(type(error), error, _from_handler(error), limit=-20))
    except BaseException as inner:  # noqa: BLE001 - an exception whose text can't be made
        text, trace = f"(its text can't be made: {type(inner).__name__})", ""
    # the original's rule: the error's text is the try's; a KeyError's is only the key, and many have none
    told = f"{name}: {text}" if isinstance(error, KeyError) else text or name
    return Ended("failure", told, name, trace[-4000:] or None)


def _from_handler(error: BaseException) -> TracebackType | None:
    """An error's traceback without our own frames: the handler's is what its writer looks for."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    return trace


def _trusted(held: Held, ended: Ended) -> Ended:
    """What may be recorded: nothing of a handler that was told that its lease is lost."""
    if held.started is None or not held.lost or ended.outcome == "lost":
        return ended
    return Ended("lost", _LOST, "LeaseLost")
