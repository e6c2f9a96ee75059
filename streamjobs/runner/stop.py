"""Stopping: in order, and within its deadline and a second, whatever the server does."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable
from contextlib import suppress
from functools import partial
from typing import Any

import anyio
from pymongo.errors import DocumentTooLarge, OperationFailure, PyMongoError

from streamjobs import events
from streamjobs.clock import boot
from streamjobs.errors import ConfigError
from streamjobs.runner.claim import Claimer
from streamjobs.runner.execute import Executor
from streamjobs.runner.finish import Finisher
from streamjobs.runner.held import Ended, Held
from streamjobs.runner.lease import Beat, record_id
from streamjobs.runner.outage import Outage
from streamjobs.runner.tasks import end_task, to_the_end

#: By when after the deadline each step is over, in seconds, so that stop returns within one.
CANCELLED, FLUSHED, UNHEARD, RELEASED, CLOSED = 0.15, 0.3, 0.45, 0.55, 0.65
_ATTEMPTS = 20  # to write an outcome after the end, one a beat
_MOST = 2.0  # seconds that a step gets where the deadline is far


class Stopper:
    """When stop was asked, how far it has come, and what was left running."""

    def __init__(self, deadline: float, outage: Outage) -> None:
        self._deadline = deadline
        self._outage = outage
        self._at_once = asyncio.Event()
        self._why = ""
        self.asked = asyncio.Event()
        self.started = asyncio.Event()
        self.asked_at: float | None = None
        self.drained = False
        self._told = False
        self.stuck: set[Held] = set()
        self._due: float | None = None
        self._home: tuple[asyncio.AbstractEventLoop, int] | None = None

    def begin(self, name: str) -> None:
        """The run of this runner begins, in this loop and thread; it does so once."""
        if self._home is not None:
            raise ConfigError(f"runner {name!r} has run already: make a new one with queue.runner(...)")
        self._home = (asyncio.get_running_loop(), threading.get_ident())

    def ask(self, reason: str, *, at_once: bool = False) -> None:
        """Ask for a stop; asked again, at once. In any thread."""
        if self._home is None or self._home[1] == threading.get_ident():
            self._ask(reason, at_once=at_once)
            return
        with suppress(RuntimeError):  # the loop is closed, so it has ended
            self._home[0].call_soon_threadsafe(partial(self._ask, reason, at_once=at_once))

    def _ask(self, reason: str, *, at_once: bool) -> None:
        if self.asked.is_set() or at_once:
            self._at_once.set()
        if not self.asked.is_set():
            self.asked_at, self._why = boot(), reason
            self.asked.set()

    async def unless_asked(self, doing: Awaitable[None]) -> bool:
        """Do something, unless stop is asked for meanwhile; whether it was done."""
        task, asked = asyncio.ensure_future(doing), asyncio.ensure_future(self.asked.wait())
        try:
            await asyncio.wait([task, asked], return_when=asyncio.FIRST_COMPLETED)
        finally:
            asked.cancel()
            if not task.done():
                await to_the_end(end_task(task))
        if task.cancelled():
            return False
        task.result()
        return not self.asked.is_set()

    def left(self, by: float) -> float:
        """Seconds that a step has that must be over so many seconds after the deadline."""
        if self._due is None or (self._at_once.is_set() and self._due > boot()):
            self._due = boot() if self._at_once.is_set() else (self.asked_at or boot()) + self._deadline
        return min(_MOST, max(0.05, self._due + by - boot()))

    async def drain(
        self, claimer: Claimer, executor: Executor, finisher: Finisher, who: dict[str, str]
    ) -> None:
        """No new claims; handlers end, or are cancelled, or are left behind; outcomes are written."""
        if not self._told:
            self._told = True
            events.emit(
                "runner.stopping", **who, reason=self._why or "the runner ends", held=len(claimer.held)
            )
        claimer.stop()
        executor.close()
        await self._until_hurried(self._quiet(claimer, executor, finisher))
        if executor.running:
            executor.stop()
            with anyio.move_on_after(self.left(CANCELLED)):
                await executor.empty()
        now = boot()
        self.stuck = set(executor.abandon())
        for held in self.stuck:
            events.emit("handler.stuck", **held.about(), since_ms=(now - (held.started or now)) * 1000)
        await self.step(finisher.flushed(), FLUSHED, who)
        self.drained = True  # only now: a drain that was cancelled is done again, at once

    async def _quiet(self, claimer: Claimer, executor: Executor, finisher: Finisher) -> None:
        await claimer.ended.wait()
        await executor.empty()
        await finisher.flushed()

    async def _until_hurried(self, quiet: Awaitable[None]) -> None:
        """Wait for it, until the deadline or a second call of stop."""
        waiting = asyncio.ensure_future(quiet)
        hurry = asyncio.ensure_future(self._at_once.wait())
        patience = (self.asked_at or boot()) + self._deadline - boot()
        try:
            await asyncio.wait(
                [waiting, hurry], timeout=max(0.0, patience), return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            for one in (waiting, hurry):
                one.cancel()
            await asyncio.wait([waiting, hurry])

    async def step(self, doing: Awaitable[Any], by: float, who: dict[str, str]) -> None:
        """One bounded step of stopping; what it can't do, the lease does."""
        task = asyncio.ensure_future(doing)
        await asyncio.wait([task], timeout=self.left(by))
        await end_task(task, 0.1)
        error = task.exception() if task.done() and not task.cancelled() else None
        if isinstance(error, PyMongoError):
            self._outage.failed("stop", error)
        elif error is not None:
            events.emit("runner.failed", **who, **events.about(error))

    def end_beat(self, beat: Beat) -> None:
        """Delete the record if nothing is held, and end the beat; else it goes on for what was left."""
        if self.stuck:
            return

        def forget(jobs: Any) -> None:
            owner = beat.trust.owner  # now: it may have registered since
            if not beat.trust.holds():
                return
            if jobs.find_one({"lease.owner": owner}, {"_id": 1}) is None:
                jobs.delete_one({"_id": record_id(owner)})
            else:  # unless the last renewal has said so
                jobs.update_one({"_id": record_id(owner)}, {"$set": {"away": "stopping"}})

        beat.submit(forget)
        beat.finish()

    def outlived(self, held: Held, ended: Ended, finisher: Finisher, beat: Beat) -> None:
        """Record a try that ended after stop, in the beat's thread; the last one ends the beat."""
        attempts = 0

        def record(jobs: Any) -> None:
            nonlocal attempts
            attempts += 1
            try:
                finisher.write_late(jobs, held, ended)
            except (OperationFailure, DocumentTooLarge) as error:
                finisher.give_up(held, ended, str(error))
            except PyMongoError as error:
                if attempts == 1:
                    about = {"runner": held.runner, "owner": held.owner, **events.about(error)}
                    events.emit("outcome.kept", count=1, **about)
                if attempts < _ATTEMPTS:
                    raise
                finisher.give_up(held, ended, str(error))
            self.stuck.discard(held)
            if not self.stuck:
                self.end_beat(beat)

        beat.submit(record)
