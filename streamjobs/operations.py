"""What a queue does with its collection, written once for asyncio and for threads.

Each operation is a generator that yields calls on a collection and is sent their results; :func:`perform`
drives it with pymongo's async collection, :func:`perform_sync` with the synchronous one.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Generator
from typing import Any, TypeVar, cast

from bson.datetime_ms import DatetimeMS
from pymongo import IndexModel
from pymongo.errors import (
    PyMongoError,
)

from streamjobs import events, transitions
from streamjobs.check import check_id
from streamjobs.clock import ServerClock, boot
from streamjobs.errors import BadArgument, JobNotFound, JobState
from streamjobs.indexes import Index, missing
from streamjobs.job import RUNNABLE, Job, Status, check_kind, date_ms, problem_of

Call = Callable[[Any], Any]
T = TypeVar("T")
Operation = Generator[Call, Any, T]

#: Names this process as the writer of put-backs that no runner made.
OUTSIDE = "outside"


async def perform(operation: Operation[T], collection: Any) -> T:
    """Run an operation on an asynchronous collection."""
    try:
        call = next(operation)
        while True:
            try:
                result = await call(collection)
            except PyMongoError as error:
                call = operation.throw(error)
            else:
                call = operation.send(result)
    except StopIteration as done:
        return cast("T", done.value)


def perform_sync(operation: Operation[T], collection: Any) -> T:
    """Run an operation on a synchronous collection."""
    try:
        call = next(operation)
        while True:
            try:
                result = call(collection)
            except PyMongoError as error:
                call = operation.throw(error)
            else:
                call = operation.send(result)
    except StopIteration as done:
        return cast("T", done.value)


def learn(clock: ServerClock) -> Operation[PyMongoError | None]:
    """Take a sample of the server's clock; without an answer the estimate stays what it was, and the error is returned."""
    sent = boot()
    try:
        hello = yield lambda collection: collection.database.client.admin.command("hello")
    except PyMongoError as error:
        return error
    clock.heard(sent, hello)
    return None


def get(id_: Any) -> Operation[Job]:
    """Read a job."""
    check_id(id_)
    document = yield lambda collection: collection.find_one({"_id": id_})
    if document is None:
        raise JobNotFound(id_)
    return Job.from_document(document)


def list_jobs(
    kind: str | None, status: str | int | None, due: bool | None, limit: int, clock: ServerClock
) -> Operation[list[Job]]:
    """Read jobs, newest first."""
    if (
        isinstance(cast("Any", limit), bool)
        or not isinstance(cast("Any", limit), int)
        or not 1 <= limit <= 100_000
    ):
        raise BadArgument("limit", limit, "give a whole number from 1 to 100000")
    wanted: dict[str, Any] = {"kind": {"$type": "string"} if kind is None else check_kind(kind)}
    if status is not None:
        wanted["status"] = int(_status(status))
    if due is not None and not isinstance(cast("Any", due), bool):
        raise BadArgument("due", due, "give True, False or None")
    if due is not None:
        yield from learn(clock)
        now = DatetimeMS(round(clock.now_ms()))
        wanted.setdefault("status", {"$in": [int(runnable) for runnable in RUNNABLE]})
        wanted["runat"] = {"$lte": now} if due else {"$gt": now}
    found = yield lambda collection: collection.find(wanted).sort("_id", -1).limit(limit).to_list()
    jobs = [Job.from_document(document) for document in found if problem_of(document) is None]
    # ids of one second are in no order across processes; their dates are
    return sorted(jobs, key=lambda job: date_ms(job.created) or 0, reverse=True)


def count() -> Operation[dict[str, dict[str, int]]]:
    """Jobs by kind and status text."""
    rows = yield lambda collection: collection.aggregate(
        [
            {"$match": {"kind": {"$type": "string"}}},
            {"$group": {"_id": {"kind": "$kind", "status": "$status"}, "n": {"$sum": 1}}},
        ]
    )
    found = yield lambda _collection: rows.to_list()
    out: dict[str, dict[str, int]] = {}
    for row in found:
        group = row["_id"]
        try:
            state = str(Status(group.get("status")))
        except ValueError:
            state = f"unknown ({group.get('status')})"
        kind = group["kind"] if isinstance(group["kind"], str) else repr(group["kind"])
        states = out.setdefault(kind, {})
        states[state] = states.get(state, 0) + row["n"]
    return {kind: out[kind] for kind in sorted(out)}


def retry(id_: Any, force: bool) -> Operation[Job]:
    """Make a job new again."""
    check_id(id_)
    if not isinstance(cast("Any", force), bool):
        raise BadArgument("force", force, "give True or False")
    guard, update = transitions.retry(id_, OUTSIDE, secrets.randbits(31), force=force)
    result = yield lambda collection: collection.update_one(guard, update)
    job = yield from get(id_)
    if not result.matched_count:
        if job.status == Status.WORKING and not _leased(job):
            fix = "no lease names its holder: an original's runner has it or died with it; if you know that it died, force the retry (--force)"
        elif job.status == Status.WORKING:
            fix = "its holder is running it; if that runner died, its lease frees the job by itself" + (
                "" if not force else " (force is only for jobs that no lease names a holder of)"
            )
        else:
            fix = "only new, waiting, success, failed and cancelled jobs can be retried"
            fix += ", force only for working ones" if force else ""
        raise JobState(id_, "retry", job.state, fix)
    events.emit("job.retried", job=id_, status=job.state)
    return job


def cancel(id_: Any, reason: str) -> Operation[Job]:
    """Cancel a job before it runs."""
    if not isinstance(cast("Any", reason), str):
        raise BadArgument("reason", reason, "give a text")
    check_id(id_)
    guard, update = transitions.cancel(id_, reason)
    result = yield lambda collection: collection.update_one(guard, update)
    job = yield from get(id_)
    if not result.matched_count:
        raise JobState(id_, "cancel", job.state, "only new and waiting jobs can be cancelled")
    events.emit("job.cancelled", job=id_, status=job.state, reason=events.printable(reason)[:1000])
    return job


def missing_indexes() -> Operation[list[Index]]:
    """The declared indexes that are not there."""
    existing = yield lambda collection: collection.index_information()
    return missing(existing)


def create_indexes() -> Operation[list[Index]]:
    """Make the declared indexes that are not there, in one command, for which mongod reads all once; those made."""
    made = yield from missing_indexes()
    if made:
        models = [IndexModel(list(index.keys), name=index.name, **index.options) for index in made]
        yield lambda collection: collection.create_indexes(models)
    return made


def _status(status: str | int) -> Status | int:
    if isinstance(status, int) and not isinstance(status, bool) and -(2**63) <= status < 2**63:
        return status
    parsed = Status.parse(status) if isinstance(status, str) else Status.INVALID
    if parsed is Status.INVALID:
        raise BadArgument(
            "status", status, f"give one of {', '.join(str(known) for known in Status if known)}"
        )
    return parsed


def _leased(job: Job) -> bool:
    """Whether a lease names the job's holder, so that runners can free it."""
    found: Any = job.extra.get("lease")
    lease: Any = found if isinstance(found, dict) else {}  # pyright: ignore[reportUnknownVariableType]
    return all(isinstance(lease.get(key), str) and lease[key] for key in ("owner", "token"))
