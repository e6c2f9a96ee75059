"""What streamjobs raises.

::

    StreamJobsError
    ├── BadArgument (also ValueError)   an argument that cannot work, refused before anything is sent
    ├── ConfigError                     a client, collection or setting that cannot work, with the fix
    │   └── ForkError                   used in a forked child
    ├── ConnectError                    no server answered
    ├── StreamRefused                   the server does not give a change stream
    ├── PutUnknown                      a put without an answer: it carries the jobs, put them again
    ├── JobError
    │   ├── IdTaken                     a put with an id that another job has; the jobs that were not put
    │   ├── JobNotFound
    │   ├── JobState                    the job's status does not allow it
    │   ├── BadData                     a job's data does not fit its handler's parameters
    │   └── UnreadableJob               a document that can't be a job
    ├── HandlerError                    two handlers of one kind, or no handler
    └── LeaseLost                       this try no longer holds its job

The driver's own errors (``pymongo.errors.PyMongoError``) pass through as they are where the server answered: of
reads, and of writes that it refused (a missing privilege, a validator or a unique index of yours), of which nothing
is stored but, in a put_many, the jobs that it did not refuse. Inside a caller's transaction all of them do, since
their labels tell the caller what to repeat.
"""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # job.py raises these errors, so only the type may come back up
    from streamjobs.job import Job


class _Short(reprlib.Repr):
    """A repr that costs little, whatever its value is."""

    def repr_bytes(self, value: bytes, _level: int) -> str:
        """What it begins with: bytes may be many."""
        return repr(value[: self.maxother]) + ("..." if len(value) > self.maxother else "")

    repr_bytearray = repr_bytes


_short = _Short()
_short.maxlevel, _short.maxstring, _short.maxother, _short.maxlong = 3, 80, 80, 80


def shown(value: object) -> str:
    """A value for a message: short whatever it is, and without the password of a URI in it."""
    text = without_secrets(_short.repr(value))
    if "..." in text:  # what ends a password may be among what was left out
        text = re.sub(r"://[^@]*$", "://***", text, flags=re.DOTALL)
    return text if len(text) <= 80 else text[:77] + "..."


def meant(word: str, words: Iterable[str]) -> str:
    """The beginning of a fix for a misspelt word, with a blank after it; nothing where none of the words is near."""
    near = difflib.get_close_matches(word, words, 1)
    return f"did you mean {near[0]}? " if near else ""


def without_secrets(text: str) -> str:
    """A text without the user and password of a URI that may be in it."""
    return re.sub(r"://.*@", "://***@", text, flags=re.DOTALL)


class StreamJobsError(Exception):
    """The root of all errors of this package."""


class BadArgument(StreamJobsError, ValueError):  # noqa: N818 - named for what it is, as in the tree above
    """An argument that cannot work. Nothing was sent."""

    def __init__(self, name: str, value: object, fix: str) -> None:
        super().__init__(f"{name}: {fix} (got {shown(value)})")
        self.name = name


class ConfigError(StreamJobsError):
    """A client, collection or setting that cannot work; the message says what to change."""


class ForkError(ConfigError):
    """A queue was used in a forked child; the driver's sockets and locks belong to the parent."""

    def __init__(self, opened: int, here: int) -> None:
        super().__init__(
            f"this Queue was opened in process {opened} and used in its fork {here}: make the Queue (or call "
            "put) after the fork, for example in the server's post_fork or worker start hook"
        )


class ConnectError(StreamJobsError):
    """No server answered at the given address."""


class StreamRefused(StreamJobsError):  # noqa: N818
    """The server does not give a change stream here; the message says why and what to do."""


class PutUnknown(StreamJobsError):  # noqa: N818
    """A put got no answer: it may or may not have been written.

    :attr:`jobs` are the jobs. Put the same objects again (``await jobs.put(error.jobs[0])`` or
    ``put_many(error.jobs)``): a job that is there already is left alone, so each ends up there once.
    """

    def __init__(self, jobs: Sequence[Job], cause: BaseException) -> None:
        super().__init__(
            f"no answer for {len(jobs)} job(s), written or not ({type(cause).__name__}: {str(cause)[:200]}): put the "
            "same jobs again, they are in this error's .jobs and a second put of the same job is harmless"
        )
        self.jobs = list(jobs)


class JobError(StreamJobsError):
    """Something about one job."""


class IdTaken(JobError):  # noqa: N818
    """Another job, of another kind or with other data, has this ``_id``: nothing of it was changed.

    :attr:`jobs` are those that were not put for that; all others of the call are stored.
    """

    def __init__(self, jobs: Sequence[Job], asked: int) -> None:
        others = f"; the other {asked - len(jobs)} of the call are stored" if asked > len(jobs) else ""
        super().__init__(
            f"another job has _id {shown(jobs[0].id)}, with another kind or other data: {len(jobs)} job(s) not put, in "
            f"this error's .jobs{others}; give each job an id of its own, or leave id out"
        )
        self.jobs = list(jobs)


class JobNotFound(JobError):  # noqa: N818
    """No job has this id."""

    def __init__(self, id_: object) -> None:
        text = re.fullmatch("[0-9a-fA-F]{24}", id_) if isinstance(id_, str) else None
        fix = "; this is a text, and a job's _id is mostly an ObjectId: give bson.ObjectId('{}')"
        hint = "" if text is None else fix.format(text.group())
        super().__init__(f"no job with _id {shown(id_)} in this collection{hint}")


class JobState(JobError):  # noqa: N818
    """The job's status does not allow what was asked."""

    def __init__(self, id_: object, what: str, status: object, fix: str) -> None:
        super().__init__(f"cannot {what} job {id_!s}: it is {status!s}; {fix}")


class BadData(JobError):  # noqa: N818
    """A job's data does not fit its handler's parameters; the message names the parameter."""


class UnreadableJob(JobError):  # noqa: N818
    """A document that can't be a job; :attr:`problem` says why."""

    def __init__(self, id_: object, problem: str) -> None:
        super().__init__(f"document {shown(id_)} can't be a job: {problem}")
        self.id = id_
        self.problem = problem


class HandlerError(StreamJobsError):
    """A handler is missing, or two were registered for one kind."""


class LeaseLost(StreamJobsError):  # noqa: N818
    """This try no longer holds its job: its runner could not renew its lease in time.

    Raised by the library's calls inside a handler. Stop what you do: another runner has the job, or will.
    """

    def __init__(self, id_: Any) -> None:
        super().__init__(
            f"job {id_!s} is no longer held by this try: its runner could not renew its lease in time and "
            "another runner may start it; stop here, nothing of this try will be recorded but its loss"
        )
