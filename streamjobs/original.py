"""The surface of the Go package ``jobs``, for those who come from it: a thin layer on the same core.

::

    job = Job.new("mail")
    job.data["to"] = "ann@example.org"
    await put(collection, job)

    runner = Runner("runner-1", collection, "mail", send, connect=uri)
    await runner.start()
    ...
    runner.stop()
    await runner.stopped.wait()

Differences: ``start`` and ``put`` are awaited (``put`` on a synchronous collection is not); a runner opens
clients of its own, so it takes a URI beside a collection, or a :class:`~streamjobs.Queue`, which has one;
``interval`` is the fallback's period, since jobs are listened for; and a job put with ``retries`` 0 that fails
is failed, where the original would retry it for ever.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, cast, overload

from pymongo.asynchronous.collection import AsyncCollection
from pymongo.collection import Collection

from streamjobs.clients import ClientFactory, Document
from streamjobs.errors import BadArgument, ConfigError
from streamjobs.handler import Handler, is_async
from streamjobs.job import Job, Status, Try, check_kind, check_name
from streamjobs.queue import Queue
from streamjobs.settings import Settings

__all__ = ["Job", "Runner", "Status", "Try", "put"]

#: None: success. An exception: the try failed, its text is the try's ``err``.
JobFunc = Callable[[Job], Any]


@overload
def put(collection: Collection[Document], *jobs: Job) -> list[Job]: ...
@overload
def put(collection: AsyncCollection[Document] | Queue, *jobs: Job) -> Awaitable[list[Job]]: ...
def put(collection: Collection[Document] | AsyncCollection[Document] | Queue, *jobs: Job) -> Any:
    """Insert one or many jobs in one call."""
    queue = collection if isinstance(collection, Queue) else Queue(collection)
    if isinstance(collection, Collection):
        return queue.sync.put_many(jobs)
    return queue.put_many(jobs)


class Runner:
    """Runs one function for one kind, one job at a time, as the original's runner does.

    Args:
        name: unique across the system.
        collection: where the jobs are; or a Queue.
        kind: the kind of jobs it takes.
        fn: takes a job; a coroutine function, or a plain one, which runs in a thread.
        connect: beside a collection, the URI (or factory) for the runner's own clients.
        settings: as :class:`streamjobs.Settings`; concurrency is 1.

    """

    def __init__(
        self,
        name: str,
        collection: Collection[Document] | AsyncCollection[Document] | Queue,
        kind: str,
        fn: JobFunc,
        *,
        connect: str | ClientFactory | None = None,
        **settings: Any,
    ) -> None:
        self.name = check_name("name", name)
        self.kind = check_kind(kind)
        if not callable(cast("Any", fn)):
            raise BadArgument("fn", fn, "give a function that takes a job")
        #: Seconds between two looks for jobs that no event told of; set it before start.
        self.interval: float = settings.pop("interval", 30.0)
        #: Set when the runner has really stopped: ``await runner.stopped.wait()``.
        self.stopped = asyncio.Event()
        #: The error that stopped it, None while all is well.
        self.err: BaseException | None = None
        self._queue = collection if isinstance(collection, Queue) else Queue(collection, connect=connect)
        self._handler = Handler(self.kind, fn, asynchronous=is_async(fn))
        self._settings = {"concurrency": 1, **settings}
        Settings(interval=self.interval, **self._settings)  # says now what start would
        self._task: asyncio.Task[None] | None = None
        self._stop: Callable[[], None] = lambda: None

    async def start(self) -> None:
        """Start; returns when it listens, or raises what kept it from it."""
        if self._task is not None:
            raise ConfigError(f"runner {self.name!r} was started already: make a new one")
        runner = self._queue.runner(
            self.name, handlers={self.kind: self._handler}, interval=self.interval, **self._settings
        )
        started: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        async def run() -> None:
            try:
                async with runner.running():
                    if not started.done():
                        started.set_result(None)
                    await runner.wait_stopped()
            except BaseException as error:
                self.err = error
                if not started.done():
                    started.set_exception(error)
                elif not isinstance(error, Exception):
                    raise
            finally:
                self.stopped.set()

        self._stop = runner.stop
        self._task = asyncio.create_task(run(), name=f"streamjobs original {self.name}")
        await started

    def stop(self) -> None:
        """Ask it to stop; :attr:`stopped` is set when it has."""
        self._stop()
