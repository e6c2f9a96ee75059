"""The runner: its roles put together, started, and stopped in order."""

from __future__ import annotations

import asyncio
import os
import random
import socket
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any

import anyio
import pymongo
from pymongo import AsyncMongoClient
from pymongo.errors import PyMongoError

from streamjobs import clients, events, local
from streamjobs.clients import Source
from streamjobs.clock import ServerClock, boot
from streamjobs.errors import ConfigError, ConnectError
from streamjobs.handler import Handler
from streamjobs.job import RUNNABLE, Status, check_name
from streamjobs.runner.backlog import Backlog
from streamjobs.runner.claim import Claimer
from streamjobs.runner.execute import Executor
from streamjobs.runner.finish import Finisher
from streamjobs.runner.fleet import Fleet
from streamjobs.runner.greet import check_indexes, greet, no_stream
from streamjobs.runner.held import Ended, Held
from streamjobs.runner.lease import Beat, owner_of, record_id
from streamjobs.runner.outage import Outage
from streamjobs.runner.slots import Member
from streamjobs.runner.stop import CLOSED, RELEASED, UNHEARD, Stopper
from streamjobs.runner.store import Store
from streamjobs.runner.stream import Stream, refused
from streamjobs.runner.takeback import Sweeper
from streamjobs.runner.tasks import end_task, going, surely_done, to_the_end
from streamjobs.runner.turns import Turns
from streamjobs.runner.wake import Waker
from streamjobs.settings import Settings

_POOL = 20  # connections at most, whatever the URI says: the stream keeps one, the roles a few
_AHEAD = 5.0  # seconds beyond the period for which timers are set
_END = 0.15  # seconds that a role gets to end
_UNDER_WAY = 1.0  # seconds after which no write is under way that was when the stream began


class Runner:
    """Runs the handlers of a queue; made by :meth:`streamjobs.Queue.runner`.

    Args:
        name: as recorded in tries and events; better unique, but nothing breaks if it is not.
        source: where clients come from.
        handlers: by kind.
        settings: how it behaves.
        health: a file that is touched at each renewal while the event loop turns, for probes.

    Attributes:
        on_stuck: called, in another thread, when a handler has blocked the event loop for ``max_block``.

    """

    def __init__(
        self, name: str, source: Source, handlers: Mapping[str, Handler], settings: Settings,
        health: str | None = None,
    ) -> None:  # fmt: skip
        self.name = check_name("name", name)
        self.settings = settings
        self.health = health
        self.on_stuck: Callable[[], None] = lambda: None
        self._source = source
        self._handlers = dict(handlers)
        self._clock = ServerClock()
        self._outage = Outage(lambda: self._who)
        self._stopper = Stopper(settings.stop_deadline, self._outage)
        self._client: Any = None
        self._beat: Beat | None = None
        self._error: BaseException | None = None
        self._renaming: asyncio.Task[None] | None = None

    @property
    def kinds(self) -> list[str]:
        """The kinds it serves."""
        return list(self._handlers)

    @property
    def owner(self) -> str:
        """Its id in leases; fresh for each run, and after a lost lease."""
        return "" if self._beat is None else self._beat.trust.owner

    @property
    def state(self) -> str:
        """The stream's state: connecting, live, gap, degraded, refused, closed."""
        stream: Stream | None = getattr(self, "_stream", None)  # made when it runs
        return "closed" if stream is None or self.settings.poll is not None else stream.state

    @property
    def stuck(self) -> int:
        """How many handlers outlived the stop: threads, and coroutines that swallowed their cancellation."""
        return len(self._stopper.stuck)

    def stop(self, reason: str = "stop") -> None:
        """Ask it to stop: no new jobs, running handlers may go on until the deadline. Again: at once. In any thread."""
        self._stopper.ask(reason)

    async def wait_stopped(self) -> None:
        """Wait until stop is asked for, by whomever."""
        await self._stopper.asked.wait()

    async def run(self) -> None:
        """Run until stopped.

        Raises:
            ConnectError: no server answers.
            StreamRefused: the server gives no change stream, and ``poll`` was not chosen.

        """
        self._stopper.begin(self.name)
        await self._run(boot())

    async def _run(self, began: float) -> None:
        try:
            if await self._stopper.unless_asked(self._open()):
                await self._serve()
        except BaseException as error:
            if isinstance(error, Exception):
                self._stopper.ask("an error", at_once=True)
                events.emit("runner.failed", **self._who, **events.about(error))
                raise error from None
            self._stopper.ask("cancelled", at_once=True)
            raise
        finally:
            await surely_done(lambda: self._close(began))

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[Runner, None]:
        """Run it in the background while the context is open; stops it, in order, on leaving."""
        self._stopper.begin(self.name)
        task = asyncio.create_task(self._run(boot()), name=f"streamjobs runner {self.name}")
        ready = asyncio.create_task(self._stopper.started.wait())
        try:
            await asyncio.wait([task, ready], return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                task.result()
            yield self
        finally:
            ready.cancel()
            self.stop("end of the context")
            await to_the_end(task, lambda: self._stopper.ask("cancelled", at_once=True))
            if not task.cancelled() and task.exception() is not None:
                task.result()

    @property
    def _who(self) -> dict[str, str]:
        return {"runner": self.name, "owner": self.owner}

    async def _open(self) -> None:
        """Connect, register, make the roles, open the stream."""
        settings, loop = self.settings, asyncio.get_running_loop()
        wait_ms = int((settings.stream_wait + clients.COMMAND_TIMEOUT) * 1000)
        client = self._source.connect(
            AsyncMongoClient, appname="streamjobs/runner", timeoutMS=wait_ms, maxPoolSize=_POOL,
            heartbeatFrequencyMS=clients.HEARTBEAT_MS, connectTimeoutMS=clients.CONNECT_MS,
        )  # fmt: skip
        self._client = client
        self._store = Store(self._source.jobs_of(client))
        await greet(self._store, self._clock, self._source.namespace, stream=settings.poll is None)
        self._registered = asyncio.Event()

        def tell(what: str) -> None:
            with suppress(RuntimeError):  # the loop may be closed while the thread still vouches
                loop.call_soon_threadsafe(self._told, what)

        turns = Turns(settings, lambda: self._who, self.on_stuck)

        def state() -> tuple[int, str | None]:
            return self._fleet.condition(self._stopper.asked.is_set())

        self._beat = Beat(self._source, self.name, self.kinds, settings, tell, turns, state, self.health)
        self._make_roles(self._beat, turns)
        self._beat.start()
        await self._first_beat()
        await check_indexes(self._store, self._source.namespace, self._who)
        if settings.poll is None:
            await self._sweeper.first()
            await self._open_stream()
        else:
            self._waker.restart_all()
        self._finisher.begin(self._role_ended)
        local.join(self._source.namespace, self._waker.put)
        events.emit(
            "runner.started", **self._who, kinds=self.kinds, slots=settings.concurrency, pid=os.getpid(),
            host=socket.gethostname(), lease=settings.lease,
        )  # fmt: skip
        self._stopper.started.set()

    def _make_roles(self, beat: Beat, turns: Turns) -> None:
        settings, trust = self.settings, beat.trust
        self._backlog = Backlog(self.kinds, round((settings.period + _AHEAD) * 1000))
        self._finisher = Finisher(self._store, self._clock, lambda: trust.owner, self.name)
        self._executor = Executor(settings.concurrency, self._finisher.put, self._outlived)
        self._claimer = Claimer(
            self._store, self._backlog, self._clock, trust, self._handlers, settings.concurrency, self.name,
            self._outage, self._executor.room, self._executor.start, self._finisher.put,
        )  # fmt: skip
        self._fleet = Fleet(
            self._store, self._backlog, self._clock, trust, settings,
            self._outage, lambda: Member(trust.owner, frozenset(self.kinds), settings.concurrency),
            lambda: settings.concurrency - len(self._executor.running), lambda: self._who,
        )  # fmt: skip
        self._waker = Waker(
            self._backlog, self._claimer, self._fleet, self._clock, self.kinds, settings.period, lambda: self._who
        )  # fmt: skip
        self._sweeper = Sweeper(
            self._store, self._clock, trust, settings, self.name, self._outage, lambda: self._claimer.tokens,
            self._fleet.seen, self._waker.offer_back, self._claimer.report,
        )  # fmt: skip
        self._stream = Stream(
            self._store.jobs, self._fleet.heard, lambda: trust.owner, self.name, settings.stream_wait, self._changed,
            self._opened, self._fleet.refiltered, self._claimer.turn,
        )  # fmt: skip
        turns.job_of = self._executor.job_of
        self._executor.freed = self._claimer.wake
        self._finisher.done = self._settled
        self._claimer.sift, self._claimer.due = self._fleet.sift, self._fleet.due
        self._fleet.join(self._stream, self._waker, self._sweeper)

    async def _first_beat(self) -> None:
        """Wait for the record: no claim before it is written by a majority."""
        beat = self._beat
        with anyio.move_on_after(self.settings.lease):
            await self._registered.wait()
        if self._error is not None or beat is None or not self._registered.is_set():
            error = self._error or (None if beat is None else beat.last_error)
            raise ConnectError(
                f"the runner could not register in {self._source.namespace}: {error} (its role: deploy/role.js)"
            ) from error

    async def _open_stream(self) -> None:
        await self._stream.first()
        if self._stream.state == "refused" and refused(self._stream.error):
            raise no_stream(self._source.namespace, self._stream.error) from self._stream.error

    async def _serve(self) -> None:
        """All roles, until stop; then drain. Plain tasks, since a scope would cancel them in every turn: see end_task."""
        roles = [
            self._claimer.run, self._sweeper.run, self._fallback, self._watch_trust, self._fleet.run,
            self._fleet.follow, *([self._stream.watch] if self.settings.poll is None else []),
        ]  # fmt: skip
        tasks = [asyncio.create_task(role(), name=f"streamjobs role {self.name}") for role in roles]
        for task in tasks:
            task.add_done_callback(self._role_ended)
        try:
            await self._stopper.asked.wait()
            self._vouching.now()  # so that others take its slots
            await self._stopper.drain(self._claimer, self._executor, self._finisher, self._who)
        except asyncio.CancelledError:
            self._stopper.ask("cancelled", at_once=True)
            self._executor.close()  # handlers that were cancelled in the same turn look at it
            raise
        finally:
            await to_the_end(asyncio.gather(*(end_task(task, _END) for task in tasks)))
        if self._error is not None:
            raise self._error

    async def _fallback(self) -> None:
        """Each period: the server's clock, the records, and (spread) each kind from its beginning."""
        while going():
            for _ in range(len(self.kinds)):
                await asyncio.sleep(self.settings.period / len(self.kinds))
                self._waker.restart_next()
            try:
                with pymongo.timeout(clients.COMMAND_TIMEOUT):
                    await self._store.learn(self._clock)
            except PyMongoError as error:
                self._outage.failed("clock", error)
            else:
                self._outage.over("clock")
            self._sweeper.wake(full=True)
            self._claimer.look_again()

    async def _watch_trust(self) -> None:
        """When the lease can't be trusted any more, give up what is held."""
        trust = self._vouching.trust
        while True:
            while trust.holds():  # noqa: ASYNC110 - a time, not an event
                await asyncio.sleep(max(0.01, trust.until - boot()))
            self._lose("lease.untrusted")
            while not trust.holds():
                self._registered.clear()
                await self._registered.wait()
            self._claimer.wake()
            self._sweeper.wake(full=True)

    @property
    def _vouching(self) -> Beat:
        if self._beat is None:
            raise ConfigError(f"runner {self.name!r} is not running")
        return self._beat

    def _lose(self, event: str, **more: Any) -> None:
        events.emit(event, **self._who, held=len(self._claimer.held), **more)
        self._executor.lose(None)

    def _told(self, what: str) -> None:
        """What the beat's thread says, in the loop."""
        beat = self._vouching
        if what == "lost":
            self._lose("lease.lost", reason="its record was fenced or is gone")
        elif what == "broken":
            self._error = beat.last_error
            self._registered.set()
            self._stopper.ask("the beat broke", at_once=True)
        elif what in ("registered", "renewed"):
            again = what == "registered" and self._stopper.started.is_set()
            self._registered.set()
            self._claimer.wake(answered=True)
            if again and not self._stopper.asked.is_set():
                self._renaming = asyncio.create_task(self._renamed())
                self._renaming.add_done_callback(self._role_ended)

    async def _renamed(self) -> None:
        """After a fresh registration: filter by the new owner, and look whether the indexes are still there."""
        if self.settings.poll is None:
            await self._stream.reopen()
        await check_indexes(self._store, self._source.namespace, self._who)

    def _opened(self, begins: bool) -> None:
        """The stream is open, and whatever may have been said meanwhile was not heard."""
        self._waker.restart_all()
        self._sweeper.wake()
        if begins:  # perhaps behind a write under way, which has its place in the oplog and can't be read yet
            wait = _UNDER_WAY * random.uniform(1.0, 1.5)  # noqa: S311 - only to spread
            asyncio.get_running_loop().call_later(wait, self._opened, False)

    def _changed(self, change: dict[str, Any]) -> None:
        """An event of the stream."""
        key: dict[str, Any] = change.get("documentKey") or {}
        id_ = key.get("_id")
        if id_ == record_id(self.owner):
            if change["operationType"] != "insert":
                self._vouching.now()
        elif type(id_) is str and id_.startswith(record_id("")):  # not bson.Code, which is a text too
            self._fleet.changed(owner_of(id_) if change["operationType"] == "delete" else None)
        else:
            self._waker.change(id_, change)

    def _settled(self, held: Held, status: Status, after_ms: int | None) -> None:
        """An outcome is settled: the slot is free, and a job put back is offered again."""
        self._claimer.settled(held)
        self._fleet.freed(held.job.kind)
        if status in RUNNABLE and not self._stopper.asked.is_set():
            self._waker.own(held.job, status, after_ms)

    def _outlived(self, held: Held, ended: Ended) -> None:
        """A handler ended after stop: the thread that still vouches for it records it."""
        self._stopper.outlived(held, ended, self._finisher, self._vouching)

    def _role_ended(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None and self._stopper.drained:
            # what the driver may make of a cancellation: it fails no runner that has drained
            events.emit("runner.failed", **self._who, **events.about(error))
        elif error is not None:
            self._error = error
            self._stopper.ask("a role ended", at_once=True)

    async def _close(self, began: float) -> None:
        """Close the stream, release what is unknown, end the beat, close the client."""
        if self._client is None:
            return
        stopper = self._stopper
        if self._beat is not None:
            local.leave(self._source.namespace, self._waker.put)
            if self._renaming is not None:
                await end_task(self._renaming, 0.1)
            await self._finisher.begin_again()
            if not stopper.drained:
                await stopper.drain(self._claimer, self._executor, self._finisher, self._who)
            await stopper.step(self._stream.close(), UNHEARD, self._who)
            if self._beat.trust.holds() and not self._finisher.behind:
                await stopper.step(self._sweeper.release_orphans(), RELEASED, self._who)
            await self._finisher.end()
            stopper.end_beat(self._beat)
            if not stopper.stuck:
                await stopper.step(
                    asyncio.to_thread(self._beat.join, stopper.left(CLOSED)), CLOSED, self._who
                )
        await clients.close(self._client, min(clients.CLOSE_TIMEOUT, stopper.left(CLOSED)))
        took = (boot() - (stopper.asked_at or began)) * 1000
        events.emit("runner.stopped", **self._who, held=len(stopper.stuck), took_ms=took)
