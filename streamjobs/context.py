"""Which job is being run: :func:`current_job`, and the check that its try still holds it."""

from __future__ import annotations

import asyncio
from contextvars import ContextVar, Token
from typing import Any

from streamjobs.job import Job

_current: ContextVar[Job | None] = ContextVar("streamjobs_job", default=None)


def current_job() -> Job:
    """The job whose handler is running here, in a coroutine or a thread.

    Raises:
        LookupError: no handler is running here.

    """
    job = _current.get()
    if job is None:
        raise LookupError("current_job() is only known inside a handler")
    return job


def enter(job: Job) -> Token[Job | None]:
    """Make a job the current one of this context."""
    return _current.set(job)


def leave(token: Token[Job | None]) -> None:
    """Undo :func:`enter`."""
    _current.reset(token)


def of_task(task: asyncio.Task[Any]) -> Job | None:
    """The job whose handler started a task; None before Python 3.12, where it can't be told from outside."""
    context: dict[Any, Job | None] = getattr(task, "get_context", dict[Any, Any])()
    return context.get(_current)


def check_lease() -> None:
    """Raise LeaseLost inside a handler whose try no longer holds its job; outside, do nothing.

    Every call into the library begins with it. A task that a handler has started and that outlives it is outside.
    """
    job = _current.get()
    if job is not None and job.held is not None and job.held.result is None:
        job.check()
