"""Checks of what this user may do, of the indexes, and of the change stream."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

from pymongo.change_stream import CollectionChangeStream
from pymongo.client_session import ClientSession
from pymongo.errors import ConfigurationError, OperationFailure, PyMongoError
from pymongo.read_concern import ReadConcern

from streamjobs.clock import boot
from streamjobs.doctor.finding import Finding, Level, Subject, since
from streamjobs.doctor.server import short
from streamjobs.indexes import INDEXES, command, missing
from streamjobs.runner.stream import pipeline

_PREFIX = "doctor:"
_CONTROL = "doctor"
_DENIED = 13
_WAIT = 12.0  # seconds for an event: an idle shard lets one through every 10 s
_LATE = 1.0
_LEFT = 60.0  # seconds after which a probe is one that a killed doctor left


def privileges(subject: Subject) -> list[Finding]:
    """What the runner's role needs; writes in transactions that are given up, so that nothing is changed."""
    jobs, probe = subject.jobs, _probe()
    tried: dict[str, Callable[[], Any]] = {
        "find": lambda: jobs.find_one({"_id": probe}),
        "insert": lambda: _try_write(
            subject, lambda session: jobs.insert_one(_document(subject, probe), session=session)
        ),
        "update": lambda: _try_write(
            subject,
            lambda session: jobs.update_one({"_id": probe}, {"$set": {"control": _CONTROL}}, session=session),
        ),
        "remove": lambda: _try_write(
            subject, lambda session: jobs.delete_one({"_id": probe}, session=session)
        ),
        "changeStream": lambda: _watch(subject, probe).close(),
        "listIndexes": lambda: subject.index_information,
    }
    return [_privilege(subject, action, attempt) for action, attempt in tried.items()]


def indexes(subject: Subject) -> list[Finding]:
    """Each declared index."""
    there = subject.index_information
    if not there:
        text = f"{subject.source.namespace} is not there yet: the first put makes it, but no indexes"
        return [Finding("collection", Level.WARN, text, command(subject.source.namespace))]
    absent = missing(there)
    found: list[Finding] = []
    for index in INDEXES:
        name = f"index {index.name}"
        if index in absent:
            text = f"missing: it serves {index.serves}"
            found.append(Finding(name, Level.FAIL, text, command(subject.source.namespace)))
            continue
        alike = [one for one in there.items() if tuple(one[1]["key"]) == index.keys]
        limits = {
            word for _, info in alike for word in ("hidden", "partialFilterExpression") if info.get(word)
        }
        if limits:
            text = f"there, but with {' and '.join(sorted(limits))}, so that the server does not use it"
            fix = f"drop it (db.{subject.source.collection}.dropIndex({alike[0][0]!r})); {command(subject.source.namespace)}"
            found.append(Finding(name, Level.FAIL, text, fix))
        else:
            found.append(Finding(name, Level.OK, f"serves {index.serves}"))
    return found


def stream(subject: Subject) -> list[Finding]:
    """Open a runner's stream, write a control document that no runner looks at, and wait for its event."""
    name = "stream"
    if not subject.streams:
        return [Finding(name, Level.SKIP, "a standalone has none, see topology")]
    probe, began = _probe(), boot()
    try:
        watching = _watch(subject, probe)
    except (OperationFailure, ConfigurationError) as error:
        return [Finding(name, Level.FAIL, f"refused: {short(error)}", _refusal(subject, error))]
    with watching:
        opened = f"opened in {since((boot() - began) * 1000)}"
        if not subject.index_information:
            return [
                Finding(name, Level.SKIP, f"{opened}; no event was tried, since the collection is not there")
            ]
        try:
            seen = _first_event(watching, _write(subject, probe))
        except OperationFailure as error:
            if error.code != _DENIED:
                raise
            return [Finding(name, Level.SKIP, f"{opened}; no event was tried, for want of privileges")]
        finally:
            with suppress(OperationFailure):
                _clean(subject, probe)
    if seen is None:
        text = f"{opened}, but no event came within {_WAIT:.0f} s of a write"
        fix = "events wait for a majority of the members: rs.status() tells which lags or is away"
        return [Finding(name, Level.FAIL, text, fix)]
    told = f"{opened}, an event {since(seen * 1000)} after its write was sent"
    if seen <= _LATE:
        return [Finding(name, Level.OK, told)]
    fix = "compare replication lag: rs.printSecondaryReplicationInfo()"
    if subject.sharded:
        fix = "lower periodicNoopIntervalSecs on the shards: an idle one holds events back for that long"
    return [Finding(name, Level.WARN, f"{told}: jobs wait for that long", fix)]


def _privilege(subject: Subject, action: str, attempt: Callable[[], Any]) -> Finding:
    name = f"privilege {action}"
    if not subject.streams and action not in ("find", "listIndexes"):
        return Finding(name, Level.SKIP, "not tried on a standalone, see topology")
    try:
        attempt()
    except OperationFailure as error:
        if error.code != _DENIED:
            return Finding(name, Level.SKIP, f"can't be told: {short(error)}")
        if "authentication" in str(error):
            return Finding(name, Level.FAIL, "the server wants a user", "give user and password in the URI")
        return Finding(name, Level.FAIL, f"not granted on {subject.source.namespace}", _grant(subject))
    except PyMongoError as error:
        return Finding(name, Level.SKIP, f"can't be told: {short(error)}")
    return Finding(name, Level.OK, f"granted on {subject.source.namespace}")


def _grant(subject: Subject) -> str:
    place = f"STREAMJOBS_DATABASE={subject.source.database} STREAMJOBS_COLLECTION={subject.source.collection}"
    return f'{place} mongosh "$ADMIN_URI" deploy/role.js, and give the user the role streamjobsRunner'


def _refusal(subject: Subject, error: PyMongoError) -> str:
    if isinstance(error, OperationFailure) and error.code == _DENIED:
        return _grant(subject)
    return "where a host gives no streams, or no more of them: run with --poll SECONDS"


def _probe() -> str:
    return _PREFIX + secrets.token_hex(6)


def _document(subject: Subject, probe: str) -> dict[str, Any]:
    made = subject.server.date()
    return {"_id": probe, "control": _CONTROL, "made": made}


def _try_write(subject: Subject, write: Callable[[ClientSession], Any]) -> None:
    """A write that leaves neither a document nor a collection."""
    with subject.client.start_session() as session, session.start_transaction():
        try:
            write(session)
        finally:
            session.abort_transaction()


def _watch(subject: Subject, probe: str) -> CollectionChangeStream[dict[str, Any]]:
    """The stream that a runner opens, which also tells of the probe."""
    stages = pipeline({probe: None}, probe)
    stages[0]["$match"]["$or"].append({"documentKey._id": probe})
    jobs = subject.jobs.with_options(read_concern=ReadConcern("majority"))
    return jobs.watch(stages, max_await_time_ms=1_000)


def _first_event(watching: CollectionChangeStream[dict[str, Any]], made: float) -> float | None:
    """Seconds until the first event, or None."""
    while boot() - made < _WAIT and watching.alive:
        if watching.try_next() is not None:
            return boot() - made
    return None


def _write(subject: Subject, probe: str) -> float:
    """Write the probe, if it may be removed again; the boot time of its sending."""
    subject.jobs.delete_one({"_id": probe})
    made = boot()
    subject.jobs.insert_one(_document(subject, probe))
    return made


def _clean(subject: Subject, probe: str) -> None:
    """Remove the probe, and what a doctor left that was killed."""
    subject.jobs.delete_one({"_id": probe})
    now = subject.server.date()
    old = {
        "_id": {"$gte": _PREFIX, "$lt": _PREFIX[:-1] + ";"},
        "made": {"$lt": now - timedelta(seconds=_LEFT)},
    }
    subject.jobs.delete_many({**old, "control": _CONTROL})
