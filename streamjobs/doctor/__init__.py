"""What is wrong with a deployment, and how to mend it: behind ``streamjobs doctor``, and for programs.

::

    for finding in examine(queue.source):
        print(finding.level, finding.name, finding.text, finding.fix)

Each check is a function that takes a :class:`Subject` and returns findings. Every query is bounded in time and in
what it reads; where that makes it a sample, the finding says so. What is written is one control document,
``doctor:<random>``, which is removed again; nothing is left behind, and no runner looks at it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from typing import Any

import pymongo
from bson.errors import BSONError
from pymongo import MongoClient
from pymongo.errors import OperationFailure, PyMongoError

from streamjobs.clients import Source, close_sync
from streamjobs.doctor import access, jobs, server
from streamjobs.doctor.finding import Finding, Level, Only, Subject
from streamjobs.errors import BadArgument

__all__ = ["CHECKS", "Finding", "Level", "Subject", "examine", "worst"]

Check = Callable[[Subject], list[Finding]]
#: By name, in the order in which they are made. The first says whether the others make sense.
CHECKS: dict[str, Check] = {
    "reachable": server.reachable,
    "topology": server.topology,
    "version": server.version,
    "concerns": server.concerns,
    "pool": server.pool,
    "clocks": server.clocks,
    "oplog": server.oplog,
    "privileges": access.privileges,
    "stream": access.stream,
    "indexes": access.indexes,
    "runners": jobs.runners,
    "unserved kinds": jobs.unserved,
    "held": jobs.held,
    "unreadable": jobs.unreadable,
    "lost tries": jobs.losses,
}
_LIMIT = 20.0  # seconds for one check
_DENIED = 13
_DAY = 86_400


def examine(source: Source, *, margin: float = 2.0) -> Generator[Finding]:
    """Make all checks, and tell each finding when it is made.

    Args:
        source: where clients come from: :attr:`streamjobs.Queue.source`.
        margin: the runners' setting of that name, in seconds: how far clocks may be apart.

    Raises:
        ConfigError: no client can be made of the source.
        BadArgument: margin is no number of seconds.

    """
    if not 0 <= margin <= _DAY:
        raise BadArgument("margin", margin, f"give seconds from 0 to {_DAY}")
    only = Only()
    client: MongoClient[dict[str, Any]] = source.connect(
        MongoClient, appname="streamjobs/doctor", server_selector=only, retryReads=False
    )
    try:
        subject = Subject(source=source, client=client, only=only, margin=margin)
        for name, check in CHECKS.items():
            found = _make(name, check, subject)
            yield from found
            if name == "reachable" and worst(found) is Level.FAIL:
                return
    finally:
        close_sync(client)


def worst(findings: Iterable[Finding]) -> Level:
    """The worst level among them."""
    levels = {one.level for one in findings}
    return next((level for level in reversed(Level) if level in levels), Level.OK)


def _make(name: str, check: Check, subject: Subject) -> list[Finding]:
    """A check's findings; that it could not be made is one."""
    try:
        with pymongo.timeout(_LIMIT):
            return check(subject)
    except (PyMongoError, BSONError) as error:
        if isinstance(error, OperationFailure) and error.code == _DENIED:
            return [Finding(name, Level.SKIP, f"can't be seen without the privilege: {server.short(error)}")]
        if isinstance(error, PyMongoError) and error.timeout:
            text = f"given up after {_LIMIT:.0f} s, or what the server allows: {server.short(error)}"
            return [Finding(name, Level.WARN, text, "try again when the server is less busy")]
        return [Finding(name, Level.WARN, f"could not be looked at: {server.short(error)}")]
