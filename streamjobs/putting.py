"""Putting: jobs → one insert, which may be repeated until it is known that all of them are there."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, cast

from bson.errors import BSONError
from bson.int64 import Int64
from bson.objectid import ObjectId
from bson.raw_bson import RawBSONDocument
from pymongo.errors import (
    BulkWriteError,
    DuplicateKeyError,
    PyMongoError,
    ServerSelectionTimeoutError,
    WriteConcernError,
)
from pymongo.read_concern import ReadConcern

from streamjobs import events
from streamjobs.check import check_fields, check_job, encode, mapping
from streamjobs.clock import ServerClock, boot, wall
from streamjobs.errors import BadArgument, IdTaken, PutUnknown
from streamjobs.job import ASAP, RAW_CODEC, Job, decode, id_key
from streamjobs.operations import Call, Operation, learn

_LOOK = 10_000  # ids that are looked up at once
_KINDS = 100  # named in one event

#: Jobs that one call puts at most.
MAX_JOBS = 100_000


def draft(
    kind: str, data: Mapping[str, Any] | None, delay: float | None, at: datetime | None, retries: int,
    retry_interval: float, id_: ObjectId | None,
) -> Job:  # fmt: skip
    """A job that has not been put; nor is it checked, but for what could not be made a field of one."""
    # a tzinfo that knows no offset leaves a datetime as naive as none
    if at is not None and (not isinstance(cast("Any", at), datetime) or at.utcoffset() is None):
        raise BadArgument(
            "at", at, "give an aware datetime, for example datetime.now(UTC) + timedelta(hours=1)"
        )
    if id_ is not None and not isinstance(cast("Any", id_), ObjectId):
        raise BadArgument("id", id_, "give a bson.ObjectId")
    job = Job(
        ObjectId() if id_ is None else id_,
        kind,
        {} if data is None else dict(mapping("data", data)),
        created=datetime.fromtimestamp(wall(), UTC),
        runat=ASAP if at is None else _utc(at),
        retries=int(retries) if isinstance(cast("Any", retries), Int64) else retries,
        retryinterval=round(retry_interval * 1_000_000_000),
    )
    job.estimated = True  # put sets created by the server's clock
    job.delay = delay
    return job


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
    """Insert jobs in one call; one that is there already, from a put without an answer, is left alone.

    They are checked here and now, before a client is opened or anything is sent.
    """
    check = check_job if clock.stale else check_fields  # else they are encoded next
    for job in jobs:
        check(job)
    return _put(jobs, clock, session)


def _put(jobs: Sequence[Job], clock: ServerClock, session: Any) -> Operation[list[Job]]:
    if not jobs:
        return []
    began = boot()
    within = session is not None and bool(session.in_transaction)  # else the session changes nothing
    if clock.stale:
        yield from _freshen(clock, jobs, within)
    undated = _date(jobs, clock)
    try:
        # as it was checked, and not encoded once more by the driver
        documents = [RawBSONDocument(encode(job)) for job in jobs]
    except BadArgument:
        for job, created, runat in undated:  # nothing is sent: they are as they were
            job.created, job.runat, job.estimated = created, runat, True
        raise
    taken: list[int] = []
    try:
        try:
            if len(documents) == 1:
                yield lambda collection: collection.insert_one(documents[0], session=session)
            else:
                yield lambda collection: collection.insert_many(documents, ordered=False, session=session)
        except (DuplicateKeyError, BulkWriteError) as error:
            if within:
                raise
            taken = yield from _taken(documents, [job.id for job in jobs], error)
    except PyMongoError as error:
        if within or not _unanswered(error):
            raise
        raise PutUnknown(jobs, error) from error
    if taken:
        raise IdTaken([jobs[place] for place in taken], len(jobs))
    if events.wanted("info"):
        events.emit_wanted(
            "job.put",
            count=len(jobs),
            kinds=sorted({job.kind for job in jobs})[:_KINDS],
            job=jobs[0].id if len(jobs) == 1 else None,
            took_ms=(boot() - began) * 1000,
        )
    return list(jobs)


def _freshen(clock: ServerClock, jobs: Sequence[Job], within: bool) -> Operation[None]:
    error = None if clock.known else (yield from learn(clock))  # pays for connecting, so it is a poor sample
    if error is None:
        error = yield from learn(clock)
    if isinstance(error, ServerSelectionTimeoutError):  # the insert would wait as long again
        raise error if within else PutUnknown(jobs, error) from error


def _taken(
    documents: list[RawBSONDocument], ids: list[Any], error: DuplicateKeyError | BulkWriteError
) -> Operation[list[int]]:
    """The places of those whose ``_id`` another job has, where an insert found that some have been there.

    Those that are of this put must be there by a majority, as the others will be.
    """
    if not _all_there(error):
        raise error
    if error.details and error.details.get("writeConcernErrors"):
        raise WriteConcernError("written, but perhaps not by a majority") from error
    taken: list[int] = []
    for start in range(0, len(ids), _LOOK):
        some = {id_key(id_): id_ for id_ in ids[start : start + _LOOK]}
        # the driver does not say whether a majority has the earlier write, nor whether it was of this job: ask
        found = yield _by_majority(list(some.values()))
        there = {id_key(one["_id"]): one for one in found}
        if some.keys() - there.keys():
            raise WriteConcernError("written before, but not yet by a majority")
        for place, sent in enumerate(documents[start : start + _LOOK], start):
            if not _is_same(there[id_key(ids[place])], sent):
                taken.append(place)
    return taken


def _by_majority(ids: list[Any]) -> Call:
    options: dict[str, Any] = {"read_concern": ReadConcern("majority"), "codec_options": RAW_CODEC}
    return lambda collection: (
        collection.with_options(**options).find({"_id": {"$in": ids}}, {"kind": 1, "data": 1}).to_list()
    )


def _is_same(found: RawBSONDocument, sent: RawBSONDocument) -> bool:
    """Whether what is stored is what was sent; its status and dates may have gone on, and the order of its data."""
    theirs, ours = found.get("data"), sent["data"]
    if found.get("kind") != sent["kind"] or not isinstance(theirs, RawBSONDocument):
        return False
    try:
        return theirs.raw == ours.raw or decode(theirs.raw) == decode(ours.raw)
    except (BSONError, ValueError):  # bytes that are no text are not what was sent
        return False


def _date(jobs: Iterable[Job], clock: ServerClock) -> list[tuple[Job, Any, Any]]:
    """Date jobs by the server's clock; those that were, with their dates before."""
    dated: list[tuple[Job, Any, Any]] = []
    created = clock.date()
    for job in jobs:
        if job.estimated:  # a job that is put again keeps its dates
            dated.append((job, job.created, job.runat))
            job.created = created
            job.estimated = False
            if job.delay is not None:
                job.runat = _cut(created + timedelta(seconds=job.delay))
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


def _all_there(error: DuplicateKeyError | BulkWriteError) -> bool:
    details: Any = error.details
    if isinstance(error, DuplicateKeyError):
        return _same_id(details)
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
