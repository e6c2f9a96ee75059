"""What a queue does with its collection, written once for asyncio and for threads.

Each operation is a generator that yields calls on a collection and is sent their results; :func:`perform`
drives it with pymongo's async collection, :func:`perform_sync` with the synchronous one.
"""

from __future__ import annotations

import inspect
import itertools
import secrets
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar, cast

from bson.datetime_ms import DatetimeMS
from bson.int64 import Int64
from bson.objectid import ObjectId
from bson.raw_bson import RawBSONDocument
from pymongo import IndexModel
from pymongo.errors import (
    BulkWriteError,
    DuplicateKeyError,
    PyMongoError,
    ServerSelectionTimeoutError,
    WriteConcernError,
)
from pymongo.read_concern import ReadConcern

from streamjobs import events, transitions
from streamjobs.check import check_fields, check_id, check_job, encoded, mapping
from streamjobs.clock import ServerClock, boot, wall
from streamjobs.errors import BadArgument, JobNotFound, JobState, PutUnknown
from streamjobs.indexes import Index, missing
from streamjobs.job import ASAP, RUNNABLE, Job, Status, check_kind, date_ms, id_key, problem_of

Call = Callable[[Any], Any]
T = TypeVar("T")
Operation = Generator[Call, Any, T]

_LOOK = 10_000  # ids that are looked up at once
_KINDS = 100  # named in one event

#: Jobs that one call puts at most.
MAX_JOBS = 100_000

#: Names this process as the writer of put-backs that no runner made.
OUTSIDE = "outside"


async def perform(operation: Operation[T], collection: Any) -> T:
    """Run an operation on an asynchronous collection."""
    call = _send(operation, None)
    while not isinstance(call, _Done):
        try:
            result = call(collection)
            if inspect.isawaitable(result):
                result = await result
        except PyMongoError as error:
            call = _throw(operation, error)
        else:
            call = _send(operation, result)
    return cast("T", call.value)


def perform_sync(operation: Operation[T], collection: Any) -> T:
    """Run an operation on a synchronous collection."""
    call = _send(operation, None)
    while not isinstance(call, _Done):
        try:
            result = call(collection)
        except PyMongoError as error:
            call = _throw(operation, error)
        else:
            call = _send(operation, result)
    return cast("T", call.value)


def draft(
    kind: str,
    data: Mapping[str, Any] | None,
    *,
    delay: float | None = None,
    at: datetime | None = None,
    retries: int = 0,
    retry_interval: float = 0.0,
    id_: ObjectId | None = None,
) -> Job:
    """A checked job that has not been put."""
    if at is not None and (not isinstance(cast("Any", at), datetime) or at.tzinfo is None):
        raise BadArgument(
            "at", at, "give an aware datetime, for example datetime.now(UTC) + timedelta(hours=1)"
        )
    if id_ is not None and not isinstance(cast("Any", id_), ObjectId):
        raise BadArgument("id", id_, "give a bson.ObjectId")
    job = Job(
        id_ or ObjectId(),
        check_kind(kind),
        {} if data is None else dict(mapping("data", data)),
        created=datetime.fromtimestamp(wall(), UTC),
        runat=ASAP if at is None else _utc(at),
        retries=int(retries) if isinstance(cast("Any", retries), Int64) else retries,
        retryinterval=round(retry_interval * 1_000_000_000),
    )
    job.estimated = True  # put sets created by the server's clock
    job.delay = delay
    return check_job(job)


def many(jobs: Iterable[Job]) -> list[Job]:
    """The jobs of a call of put_many, which checks them; of a source without an end no more is taken than a call may have."""
    if isinstance(jobs, (str, bytes, Mapping)) or not isinstance(cast("Any", jobs), Iterable):
        raise BadArgument("jobs", cast("Any", jobs), "give Jobs, made by queue.job(...)")
    some = list(itertools.islice(jobs, MAX_JOBS + 1))
    if len(some) > MAX_JOBS:
        raise BadArgument("jobs", f"over {MAX_JOBS}", f"put at most {MAX_JOBS} in a call: put them in slices")
    for job in some:
        if not isinstance(cast("Any", job), Job):
            raise BadArgument("jobs", job, "give Jobs, made by queue.job(...)")
    return some


def put(jobs: Sequence[Job], clock: ServerClock, session: Any) -> Operation[list[Job]]:
    """Insert jobs in one call; one that is there already, from a put without an answer, is left alone."""
    if not jobs:
        return []
    began = boot()
    stale = clock.stale
    for job in jobs:  # all of them, before anything is sent
        (check_job if stale else check_fields)(job)
    error = None if clock.known else (yield from learn(clock))  # pays for connecting, so it is a poor sample
    if stale and error is None:
        error = yield from learn(clock)
    if isinstance(error, ServerSelectionTimeoutError):  # the insert would wait as long again
        raise error if session is not None else PutUnknown(jobs, error) from error
    undated = _date(jobs, clock)
    try:
        # as it was checked, and not encoded once more by the driver
        documents = [RawBSONDocument(encoded(job)) for job in jobs]
    except BadArgument:
        for job, created, runat in undated:  # nothing is sent: they are as they were
            job.created, job.runat, job.estimated = created, runat, True
        raise
    try:
        yield from _insert(documents, [job.id for job in jobs], session)
    except PyMongoError as error:
        if session is not None or not _unanswered(error):
            raise
        raise PutUnknown(jobs, error) from error
    if events.wanted("info"):
        events.emit(
            "job.put",
            count=len(jobs),
            kinds=sorted({job.kind for job in jobs})[:_KINDS],
            job=jobs[0].id if len(jobs) == 1 else None,
            took_ms=(boot() - began) * 1000,
        )
    return list(jobs)


def _insert(documents: list[RawBSONDocument], given: list[Any], session: Any) -> Operation[None]:
    """Insert; documents that are there already must be there by a majority, as the others will be."""
    try:
        if len(documents) == 1:
            yield lambda collection: collection.insert_one(documents[0], session=session)
        else:
            yield lambda collection: collection.insert_many(documents, ordered=False, session=session)
    except DuplicateKeyError as error:
        if session is not None or not _same_id(error.details):
            raise
    except BulkWriteError as error:
        if session is not None or not _all_there(error):
            raise
        if error.details.get("writeConcernErrors"):
            raise WriteConcernError("written, but perhaps not by a majority") from error
    else:
        return
    # the driver does not say whether a majority has the earlier write: ask
    ids = list({id_key(id_): id_ for id_ in given}.values())
    for start in range(0, len(ids), _LOOK):
        some = ids[start : start + _LOOK]
        there = yield _majority_count(some)
        if there != len(some):
            raise WriteConcernError("written before, but not yet by a majority")


def _majority_count(ids: list[Any]) -> Call:
    sure = ReadConcern("majority")
    return lambda collection: collection.with_options(read_concern=sure).count_documents(
        {"_id": {"$in": ids}}
    )


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


class _Done:
    def __init__(self, value: Any) -> None:
        self.value = value


def _send(operation: Operation[Any], value: Any) -> Any:
    try:
        return operation.send(value)
    except StopIteration as done:
        return _Done(done.value)


def _throw(operation: Operation[Any], error: BaseException) -> Any:
    try:
        return operation.throw(error)
    except StopIteration as done:
        return _Done(done.value)


def _date(jobs: Iterable[Job], clock: ServerClock) -> list[tuple[Job, Any, Any]]:
    """Date jobs by the server's clock; those that were, with their dates before."""
    dated: list[tuple[Job, Any, Any]] = []
    now = datetime.fromtimestamp(clock.now_ms() / 1000, UTC)
    created = _cut(now)
    for job in jobs:
        if job.estimated:  # a job that is put again keeps its dates
            dated.append((job, job.created, job.runat))
            job.created = created
            job.estimated = False
            if job.delay is not None:
                job.runat = _cut(now + timedelta(seconds=job.delay))
    return dated


def _utc(at: datetime) -> datetime:
    try:
        return _cut(at.astimezone(UTC))
    except OverflowError:
        raise BadArgument("at", at, "give a date that lies in the years 1 to 9999 in UTC") from None


def _cut(moment: datetime) -> datetime:
    # to the millisecond that BSON keeps, so that the job in hand equals the one read back
    return moment.replace(microsecond=moment.microsecond // 1000 * 1000)


def _same_id(details: Any) -> bool:
    told: dict[str, Any] = details or {}
    pattern: dict[str, Any] = told.get("keyPattern", {"_id": 1})
    return list(pattern) == ["_id"]


def _all_there(error: BulkWriteError) -> bool:
    details: Any = error.details
    wrong: list[Any] = details.get("writeErrors", [])
    return all(e.get("code") == 11000 and _same_id(e) for e in wrong)


def _unanswered(error: PyMongoError) -> bool:
    """Whether the write may have happened all the same."""
    return (
        error.timeout
        or error.has_error_label("RetryableWriteError")
        or any(
            kind.__name__ in {"ConnectionFailure", "WriteConcernError", "WTimeoutError"}
            for kind in type(error).__mro__
        )
    )


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
