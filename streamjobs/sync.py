"""The queue for programs without a loop: Flask, Django, scripts, sync handlers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timedelta
from typing import Any, TypeVar

from bson.objectid import ObjectId
from pymongo.client_session import ClientSession

from streamjobs import local, operations, putting
from streamjobs.clients import Source, check_session
from streamjobs.clock import ServerClock
from streamjobs.context import check_lease
from streamjobs.indexes import Index
from streamjobs.job import Job
from streamjobs.operations import Operation, perform_sync

#: Makes a job of put's arguments; the Queue's, which knows its handlers.
Draft = Callable[..., Job]
Jobs = list[Job]  # inside the class, list is a method
Indexes = list[Index]
T = TypeVar("T")


class SyncQueue:
    """The same calls as :class:`~streamjobs.Queue`, without ``await``; reached as ``queue.sync``."""

    def __init__(self, source: Source, draft: Draft) -> None:
        self._source = source
        self._draft = draft
        self._clock = ServerClock()

    def put(
        self,
        kind: str | Job,
        data: Mapping[str, Any] | None = None,
        *,
        delay: float | timedelta | None = None,
        at: datetime | None = None,
        retries: int | None = None,
        retry_interval: float | timedelta | None = None,
        id: ObjectId | None = None,  # noqa: A002 - the field's name
        session: ClientSession | None = None,
    ) -> Job:
        """Put a job; see :meth:`streamjobs.Queue.put`."""
        job = self._draft(kind, data, delay, at, retries, retry_interval, id)
        self._put([job], session)
        return job

    def put_many(self, jobs: Iterable[Job], *, session: ClientSession | None = None) -> Jobs:
        """Put many jobs in one call; see :meth:`streamjobs.Queue.put_many`."""
        return self._put(putting.many(jobs), session)

    @property
    def namespace(self) -> str:
        """``database.collection``."""
        return self._source.namespace

    def get(self, id: Any) -> Job:  # noqa: A002
        """Read a job; see :meth:`streamjobs.Queue.get`."""
        return self._run(operations.get(id))

    def list(
        self,
        *,
        kind: str | None = None,
        status: str | int | None = None,
        due: bool | None = None,
        limit: int = 100,
    ) -> Jobs:
        """Read jobs, newest first; see :meth:`streamjobs.Queue.list`."""
        return self._run(operations.list_jobs(kind, status, due, limit, self._clock))

    def count(self) -> dict[str, dict[str, int]]:
        """Jobs by kind and status text."""
        return self._run(operations.count())

    def retry(self, id: Any, *, force: bool = False) -> Job:  # noqa: A002
        """Make a job new again; see :meth:`streamjobs.Queue.retry`."""
        return self._told(self._run(operations.retry(id, force)))

    def cancel(self, id: Any, reason: str = "") -> Job:  # noqa: A002
        """Cancel a job before it runs; see :meth:`streamjobs.Queue.cancel`."""
        return self._run(operations.cancel(id, reason))

    def missing_indexes(self) -> Indexes:
        """The declared indexes that the collection lacks."""
        return self._run(operations.missing_indexes())

    def create_indexes(self) -> Indexes:
        """Make the indexes that are missing; returns those made."""
        return self._run(operations.create_indexes())

    def close(self) -> None:
        """Close the client, if this queue opened one."""
        self._source.close_sync()

    def _put(self, jobs: Jobs, session: Any) -> Jobs:
        check_lease()
        operation = putting.put(jobs, self._clock, session)
        collection = self._source.synchronous()
        check_session(session, collection)
        done = perform_sync(operation, collection)
        if session is None:
            local.tell(self._source.namespace, done)
        return done

    def _run(self, operation: Operation[T]) -> T:
        check_lease()
        return perform_sync(operation, self._source.synchronous())

    def _told(self, job: Job) -> Job:
        local.tell(self._source.namespace, [job])
        return job
