"""Executing: one try of one job, from the claim's reply to its outcome.

Each try is a plain task, so that stop can leave one behind that swallows its cancellation or sits in a thread. It is
cancelled once for each reason, as asyncio does: a scope that delivers its cancellation again and again would cut
short what a handler awaits to clean up, and spin while one swallows it.
"""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any

from anyio import CapacityLimiter, to_thread

from streamjobs import context, events
from streamjobs.clock import boot
from streamjobs.errors import LeaseLost
from streamjobs.handler import Cancel, Snooze
from streamjobs.runner.held import Ended, Held

_LOST = "the runner could not renew its lease in time"


class Executor:
    """Runs handlers; as many at once as there are slots.

    Args:
        slots: how many jobs are held at most.
        ended: called in the event loop with each job in hand and how its try ended.
        orphaned: called with a try that outlived stop, from whichever thread it ended in.

    """

    def __init__(
        self, slots: int, ended: Callable[[Held, Ended], None], orphaned: Callable[[Held, Ended], None]
    ) -> None:
        self._threads = CapacityLimiter(slots)
        self._ended = ended
        self._orphaned = orphaned
        self._tasks: dict[Held, asyncio.Task[None]] = {}
        self._changed = asyncio.Event()
        self._closing = False

    @property
    def running(self) -> list[Held]:
        """The jobs whose handlers have not ended."""
        return list(self._tasks)

    def start(self, held: Held) -> None:
        """Begin a try."""
        held.task = asyncio.create_task(self._one(held), name=f"streamjobs try {held.job.id}")
        self._tasks[held] = held.task

    async def empty(self) -> None:
        """Wait until no handler is running."""
        while self._tasks:
            self._changed.clear()
            await self._changed.wait()

    def lose(self, owner: str | None) -> list[Held]:
        """The lease of an owner is gone: cancel async handlers, tell sync ones."""
        hit = [held for held in self._tasks if not held.told_lost and owner in (None, held.owner)]
        for held in hit:
            held.told_lost = True
            self._cancel(held, "lease lost")
        return hit

    def close(self) -> None:
        """Begin no more: what a claim still brings is released."""
        self._closing = True

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
                held.result = held.result or ended
                orphan = held.abandoned
            if not orphan:
                self._ended(held, _trusted(held, held.result))
            elif held.handler.asynchronous:  # a thread tells by itself, since its loop may be gone
                self._orphaned(held, _trusted(held, held.result))
        finally:
            self._tasks.pop(held, None)
            self._changed.set()

    async def _try(self, held: Held) -> Ended:
        """Look whether it may start, read the arguments, call, see how it ended."""
        if held.lost:
            return Ended("released", "the lease could not be trusted when it was about to start")
        if self._closing:
            return Ended("released", "the runner is stopping")
        if events.wanted("debug"):
            events.emit("try.started", **held.about())
        job = held.job
        job.held = held  # what job.log and job.lost look at
        held.started = boot()
        token = context.enter(job)
        try:
            call = self._call_async if held.handler.asynchronous else self._call_thread
            return await call(held)
        except asyncio.CancelledError:
            if not held.told_stop and not held.told_lost:
                raise
            return Ended("interrupted", "the runner stopped")
        finally:
            context.leave(token)

    async def _call_async(self, held: Held) -> Ended:
        try:
            args, named = held.handler.arguments(held.job)
            return _returned(await held.handler.function(*args, **named))
        except asyncio.CancelledError as error:
            if held.told_stop or held.told_lost:
                raise
            return _raised(
                error
            )  # not ours: it awaited something that was cancelled, or somebody cancelled it
        except GeneratorExit:
            raise
        except BaseException as error:  # noqa: BLE001 - also SystemExit: one handler may not end the others
            return _raised(error)

    async def _call_thread(self, held: Held) -> Ended:
        def call() -> Ended:
            try:
                args, named = held.handler.arguments(held.job)
                ended = _returned(held.handler.function(*args, **named))
            except BaseException as error:  # noqa: BLE001 - as above
                ended = _raised(error)
            held.ended = boot()
            with held.lock:
                held.result = ended
                orphan = held.abandoned
            if orphan:
                self._orphaned(held, _trusted(held, ended))
            return ended

        # not cancellable: the slot stays taken for as long as the thread runs
        return await to_thread.run_sync(call, limiter=self._threads, abandon_on_cancel=False)


def _returned(value: Any) -> Ended:
    if isinstance(value, Snooze):
        return Ended("snoozed", delay=float(value.delay))
    if isinstance(value, Cancel):
        return Ended("cancelled", value.reason)
    if asyncio.iscoroutine(value):
        value.close()
        return Ended("failure", "the handler returned a coroutine: define it with async def", "TypeError")
    return Ended("success")


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
