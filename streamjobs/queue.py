"""The queue: where handlers are named, jobs are put and looked at, and runners are started."""

from __future__ import annotations

import signal
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

from bson.objectid import ObjectId
from pymongo.asynchronous.client_session import AsyncClientSession

from streamjobs import local, operations, putting
from streamjobs.check import check_job, mapping, seconds
from streamjobs.clients import AnyCollection, ClientFactory, Source, check_session
from streamjobs.clock import ServerClock
from streamjobs.context import check_lease
from streamjobs.errors import BadArgument, HandlerError, shown
from streamjobs.handler import Handler
from streamjobs.job import Job, check_kind
from streamjobs.operations import Operation, perform
from streamjobs.runner import Runner
from streamjobs.runner.signals import on_signals
from streamjobs.settings import Choices, Settings, default_name
from streamjobs.sync import Indexes, Jobs, SyncQueue

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")


class Queue:
    """Jobs in one MongoDB collection.

    Args:
        source: a MongoDB URI, or a collection of your own client (asynchronous or synchronous) for puts.
        name: ``"database.collection"``; left out where a collection is given.
        connect: with a collection, how a runner opens clients of its own: a URI, or a function
            ``(cls, **options) -> client`` that makes a client of the class it is given.

    A queue that was given a URI opens clients when they are first used; close them with :meth:`close`, or use
    ``async with``. It may be made at import time; it may not be used on both sides of a fork.

    """

    def __init__(
        self,
        source: str | AnyCollection,
        name: str | None = None,
        *,
        connect: str | ClientFactory | None = None,
    ) -> None:
        self._source = Source(source, name, connect)
        self._handlers: dict[str, Handler] = {}
        self._clock = ServerClock()
        #: The same calls for programs without a loop.
        self.sync = SyncQueue(self._source, self._draft)

    def __repr__(self) -> str:
        return f"Queue({self._source.namespace!r}, kinds={sorted(self._handlers)!r})"

    @property
    def namespace(self) -> str:
        """``database.collection`` of its jobs."""
        return self._source.namespace

    @property
    def source(self) -> Source:
        """Where its clients come from; :func:`streamjobs.doctor.examine` takes it."""
        return self._source

    @property
    def handlers(self) -> Mapping[str, Handler]:
        """The registered handlers by kind."""
        return dict(self._handlers)

    def use(self, uri: str, name: str | None = None) -> None:
        """Point this queue at another server (and another ``database.collection``), before it is used."""
        self._source = self._source.with_uri(uri, name)
        self.sync = SyncQueue(self._source, self._draft)

    def handler(
        self, kind: str, *, retries: int = 0, retry_interval: float | timedelta = 0.0
    ) -> Callable[[F], F]:
        """Register a function for a kind.

        A parameter named ``job`` (or annotated ``Job``) gets the job; all others are filled from
        ``job.data`` by name and checked against their annotations. Coroutine functions run in the event
        loop, others in threads. Returning anything is success, but ``Snooze(delay)`` and ``Cancel(reason)``;
        an exception is a failed try.

        Args:
            kind: the kind of jobs it runs.
            retries: attempts in all that :meth:`put` writes for this kind; 5 is five, 0 and 1 are both one.
            retry_interval: seconds between a failed try and the next.

        """
        kind = check_kind(kind)
        wait = seconds("retry_interval", retry_interval)

        def register(function: F) -> F:
            if kind in self._handlers:
                raise HandlerError(
                    f"kind {kind!r} already has a handler ({shown(self._handlers[kind].function)}): one function a kind"
                )
            self._handlers[kind] = Handler.of(kind, function, retries=retries, retry_interval=wait)
            return function

        return register

    async def put(
        self,
        kind: str | Job,
        data: Mapping[str, Any] | None = None,
        *,
        delay: float | timedelta | None = None,
        at: datetime | None = None,
        retries: int | None = None,
        retry_interval: float | timedelta | None = None,
        id: ObjectId | None = None,  # noqa: A002 - the field's name
        session: AsyncClientSession | None = None,
    ) -> Job:
        """Put a job, and return it once a majority of the servers has it.

        Args:
            kind: its kind; or a Job, made by :meth:`job` or taken from a PutUnknown error.
            data: what the handler gets: a dict that BSON can hold.
            delay: seconds from now, on the server's clock, before which it must not run.
            at: an aware datetime before which it must not run.
            retries: attempts in all; where left out, the handler's, if this queue knows it, or 0 (one).
            retry_interval: seconds between a failed try and the next; likewise.
            id: its ``_id``; where left out, a fresh ObjectId. The same job put again with it is left as it is.
            session: a session of the collection's client: the job is put when its transaction commits.

        Raises:
            BadArgument: an argument can't work; nothing was sent.
            IdTaken: the id is that of another job, of another kind or with other data.
            PutUnknown: no answer came; put the job that it carries again.
            LeaseLost: called in a handler whose try has lost its job.

        """
        job = self._draft(kind, data, delay, at, retries, retry_interval, id)
        await self._put([job], session)
        return job

    async def put_many(self, jobs: Iterable[Job], *, session: AsyncClientSession | None = None) -> Jobs:
        """Put many jobs, made by :meth:`job`, in one call; errors as :meth:`put`'s.

        At most 100,000 (the driver sends them in messages of up to 48 MB). All are checked before any is
        sent. After PutUnknown, put all that it carries again; IdTaken names those that were not put, alone.
        """
        return await self._put(putting.many(jobs), session)

    def job(
        self,
        kind: str,
        data: Mapping[str, Any] | None = None,
        *,
        delay: float | timedelta | None = None,
        at: datetime | None = None,
        retries: int | None = None,
        retry_interval: float | timedelta | None = None,
        id: ObjectId | None = None,  # noqa: A002
    ) -> Job:
        """Make a job for :meth:`put_many` without putting it; arguments as :meth:`put`'s."""
        return check_job(self._draft(kind, data, delay, at, retries, retry_interval, id))

    async def get(self, id: Any) -> Job:  # noqa: A002
        """Read a job; raises JobNotFound."""
        return await self._run(operations.get(id))

    async def list(
        self,
        *,
        kind: str | None = None,
        status: str | int | None = None,
        due: bool | None = None,
        limit: int = 100,
    ) -> Jobs:
        """Read jobs, newest first.

        Args:
            kind: only of this kind.
            status: only in this status (its text or number).
            due: True for those that may run now, False for those that may not yet.
            limit: at most so many.

        """
        return await self._run(operations.list_jobs(kind, status, due, limit, self._clock))

    async def count(self) -> dict[str, dict[str, int]]:
        """Jobs by kind and status text: ``{"resize": {"new": 3, "success": 40}}``."""
        return await self._run(operations.count())

    async def retry(self, id: Any, *, force: bool = False) -> Job:  # noqa: A002
        """Make a job new again, to run now, with at least one attempt.

        Args:
            id: a new, waiting, success, failed or cancelled job's.
            force: for a job that is working without a lease, left so by an original's runner that died, or with one
                that somebody has damaged. It is recorded as a lost try: its handler may have begun.

        Raises:
            JobNotFound, JobState: it is not there, or its status does not allow it.

        """
        job = await self._run(operations.retry(id, force))
        local.tell(self._source.namespace, [job])
        return job

    async def cancel(self, id: Any, reason: str = "") -> Job:  # noqa: A002
        """Cancel a new or waiting job; raises JobNotFound, JobState."""
        return await self._run(operations.cancel(id, reason))

    async def missing_indexes(self) -> Indexes:
        """The declared indexes that the collection lacks."""
        return await self._run(operations.missing_indexes())

    async def create_indexes(self) -> Indexes:
        """Make the indexes that are missing; returns those made. A runner never does."""
        return await self._run(operations.create_indexes())

    def runner(
        self,
        name: str | None = None,
        *,
        handlers: Mapping[str, Handler] | None = None,
        **settings: Unpack[Choices],
    ) -> Runner:
        """A runner of this queue's handlers, not started: see :class:`~streamjobs.Runner`.

        Args:
            name: of the runner, as recorded in tries and events; host and process where left out.
            handlers: instead of the registered ones.
            settings: those of :class:`~streamjobs.Settings`: concurrency, interval, stop_deadline, lease, beat,
                margin, max_block, poll, stream_wait.

        Raises:
            BadArgument: a setting that there is not, or cannot be.
            HandlerError: no handler is registered.

        """
        mine = self._handlers if handlers is None else _checked(handlers)
        if not mine:
            raise HandlerError(
                "this Queue has no handlers: register some with @queue.handler(kind) before running"
            )
        return Runner(default_name() if name is None else name, self._source, mine, Settings.of(settings))

    async def run(
        self, name: str | None = None, *, signals: bool = True, **settings: Unpack[Choices]
    ) -> None:
        """Run this queue's handlers until stopped.

        SIGTERM and SIGINT stop it (no new jobs, running handlers may go on until ``stop_deadline``); a second
        one cancels the handlers at once, a third exits the process. ``signals=False`` leaves them alone.

        Args:
            name: of this runner, as recorded in tries and events; host and process where left out.
            signals: whether to handle signals; only the main thread can.
            settings: as :meth:`runner`'s.

        Raises:
            ConnectError: no server answers.
            StreamRefused: the server gives no change stream (and ``poll`` was not chosen).

        """
        if not isinstance(signals, bool):
            raise BadArgument("signals", signals, "give True or False")
        runner = self.runner(name, **settings)
        if not signals:
            await runner.run()
            return
        with on_signals((signal.SIGTERM, signal.SIGINT), runner):
            await runner.run()

    @asynccontextmanager
    async def running(
        self, name: str | None = None, **settings: Unpack[Choices]
    ) -> AsyncGenerator[Runner, None]:
        """Run this queue's handlers for as long as the context is open, as in a web application's lifespan.

        No signal is handled. Leaving the context stops the runner as SIGTERM would.
        """
        runner = self.runner(name, **settings)
        async with runner.running():
            yield runner

    async def close(self) -> None:
        """Close the clients that this queue opened in this loop, and for ``sync``.

        It can be used again: they are opened anew, also in a child that is forked when all are closed.
        """
        await self._source.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _put(self, jobs: Jobs, session: Any) -> Jobs:
        check_lease()
        operation = putting.put(jobs, self._clock, session)
        collection = self._source.asynchronous()
        check_session(session, collection)
        done = await perform(operation, collection)
        if session is None:
            local.tell(self._source.namespace, done)
        return done

    async def _run(self, operation: Operation[T]) -> T:
        check_lease()
        return await perform(operation, self._source.asynchronous())

    def _draft(
        self, kind: str | Job, data: Mapping[str, Any] | None, delay: float | timedelta | None, at: datetime | None,
        retries: int | None, retry_interval: float | timedelta | None, id_: ObjectId | None,
    ) -> Job:  # fmt: skip
        """A job from put's arguments; whoever puts it checks it."""
        if isinstance(kind, Job):
            names = ("data", "delay", "at", "retries", "retry_interval", "id")
            for name, value in zip(names, (data, delay, at, retries, retry_interval, id_), strict=True):
                if value is not None:
                    raise BadArgument(name, value, "a Job is put as it is: give it alone")
            return kind
        kind = check_kind(kind)
        handler = self._handlers.get(kind)
        if delay is not None:
            if at is not None:
                raise BadArgument("delay", delay, "give delay or at, not both")
            delay = seconds("delay", delay)
        if retries is None:
            retries = 0 if handler is None else handler.retries
        if retry_interval is not None:
            wait = seconds("retry_interval", retry_interval)
        else:
            wait = 0.0 if handler is None else handler.retry_interval
        return putting.draft(kind, data, delay, at, retries, wait, id_)


def _checked(handlers: Mapping[str, Handler]) -> dict[str, Handler]:
    known = mapping("handlers", handlers)
    for kind, handler in known.items():
        check_kind(kind)
        if not isinstance(handler, Handler):
            raise BadArgument("handlers", handler, "give Handlers, made by Handler.of(kind, function)")
    return known
