"""Ids and jobs that can't work, refused by name before anything is sent."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any, cast

import bson
from bson.datetime_ms import DatetimeMS
from bson.dbref import DBRef
from bson.errors import BSONError
from bson.max_key import MaxKey
from bson.min_key import MinKey
from bson.objectid import ObjectId
from bson.regex import Regex

from streamjobs.errors import BadArgument
from streamjobs.job import (
    CODEC,
    MAX_DEPTH,
    MAX_DOCUMENT,
    MAX_NAME,
    Job,
    Status,
    check_kind,
    decode,
    depth,
    encodable,
)  # fmt: skip

#: How the ``_id`` of a runner's record begins: no job may have one like it.
RECORD = "runner:"
#: Bytes of an ``_id``, other than an ObjectId.
MAX_ID = 1024
_NO_ID = (Regex, re.Pattern, DBRef, MinKey, MaxKey)
_FLAT = frozenset({str, int, float, bool, type(None), bytes, datetime, ObjectId})
_INT32 = 2**31
_INT64 = 2**63
_LONGEST = 100 * 365 * 86_400.0  # seconds


def seconds(name: str, value: float | timedelta) -> float:
    """A span as seconds; refuses what is no number, not finite, negative or over a century."""
    number = value.total_seconds() if isinstance(value, timedelta) else value
    good = isinstance(cast("Any", number), (int, float)) and not isinstance(number, bool)
    if not good or not 0 <= number <= _LONGEST:  # nan is neither
        raise BadArgument(name, value, "give seconds (a number or timedelta) from 0 to a hundred years")
    return float(number)


def check_id(id_: Any) -> None:
    """Refuse what a filter would take for a condition, such as the ``{"$gt": ""}`` of a request's JSON."""
    if type(id_) is ObjectId:
        return
    keys = [str(key) for key in mapping("id", id_)] if isinstance(id_, Mapping) else []
    if isinstance(id_, _NO_ID) or any(key.startswith("$") for key in keys):
        raise BadArgument("id", cast("Any", id_), "give the job's _id")
    if encodable("id", id_) > MAX_ID:
        raise BadArgument("id", cast("Any", id_), f"give a job's _id, of at most {MAX_ID} bytes")


def mapping(name: str, value: Any) -> dict[Any, Any]:
    """What a mapping holds, as a dict, or BadArgument."""
    if type(value) is dict:  # the usual case, which costs no copy
        return cast("dict[Any, Any]", value)
    if not isinstance(value, Mapping):
        raise BadArgument(name, value, "give a dict (a BSON document)")
    try:
        return dict(cast("Mapping[Any, Any]", value))
    except Exception as error:  # any class may call itself a mapping, and raw bytes may be broken
        raise BadArgument(name, cast("Any", value), f"it can't be read ({type(error).__name__})") from error


def check_job(job: Job) -> Job:
    """Refuse a job that could not be stored, or not be read back; the job itself if it is good."""
    check_fields(job)
    encode(job)
    return job


def check_fields(job: Job) -> None:
    """Refuse what is wrong by itself, whatever its size and whatever is in its data."""
    if _is_usual(job):
        return
    job.kind = check_kind(job.kind)
    _check_new_id(job.id)
    if not isinstance(cast("Any", job.tries), list):
        raise BadArgument("tries", job.tries, "give a list, empty for a new job")
    for name, value in (("data", mapping("data", job.data)), ("extra", mapping("extra", job.extra))):
        if "$ref" in value and "$id" in value:
            raise BadArgument(name, value, "$ref with $id is read back as a DBRef: name them otherwise")
    _check_numbers(job)
    _check_dates(job)
    if not all(isinstance(key, str) for key in job.extra):
        raise BadArgument("extra", job.extra, "name its fields with texts")


def _is_usual(job: Job) -> bool:
    """Whether only its size and what its data holds are left to look at: a fast way to a part of the answer."""
    kind, data, delay = job.kind, job.data, job.delay
    return (
        type(kind) is str and kind.isascii() and 0 < len(kind) <= MAX_NAME and "\0" not in kind
        and type(job.id) is ObjectId and type(job.tries) is list and type(job.extra) is dict and not job.extra
        and type(data) is dict and "$ref" not in data
        and type(job.retries) is int and 0 <= job.retries < _INT32
        and type(job.retryinterval) is int and 0 <= job.retryinterval < _INT64
        and job.status is Status.NEW
        and type(job.runat) is datetime and job.runat.tzinfo is not None
        and type(job.created) is datetime and job.created.tzinfo is not None
        and (delay is None or (type(delay) is float and 0 <= delay <= _LONGEST))
    )  # fmt: skip


def _check_new_id(id_: Any) -> None:
    """Refuse an ``_id`` that servers refuse, or that is like that of a runner's record."""
    check_id(id_)
    if id_ is None or isinstance(id_, (list, tuple, Mapping)) or _is_record(id_):
        raise BadArgument("id", cast("Any", id_), "give an ObjectId, or another single value")


def _check_numbers(job: Job) -> None:
    for name, value, limit in (
        ("retries", job.retries, _INT32),
        ("retryinterval", job.retryinterval, _INT64),
    ):
        if not _is_int(value) or not 0 <= value < limit:
            raise BadArgument(name, value, f"give a whole number from 0 to {limit - 1}")
    if not _is_int(job.status) or not -_INT64 <= job.status < _INT64:
        raise BadArgument("status", job.status, "give a Status")


def _check_dates(job: Job) -> None:
    if not isinstance(cast("Any", job.runat), (datetime, DatetimeMS)):
        raise BadArgument("runat", job.runat, "give an aware datetime, or ASAP")
    if job.created is not None and not isinstance(cast("Any", job.created), (datetime, DatetimeMS)):
        raise BadArgument("created", job.created, "give an aware datetime")
    for name, moment in (("runat", job.runat), ("created", job.created)):
        if isinstance(moment, datetime) and moment.tzinfo is None:
            raise BadArgument(name, moment, "give an aware datetime, for example datetime.now(UTC)")
    if job.delay is not None:
        job.delay = seconds("delay", job.delay)


def encode(job: Job) -> bytes:
    """Encode a job whose fields were checked; refuse what BSON or a server can't hold, by the field that it is in."""
    document = job.to_document()
    try:
        raw = bson.encode(document, codec_options=CODEC)
        if job.tries or job.extra or not _FLAT.issuperset(map(type, job.data.values())):
            decode(raw)  # raw bytes among them may be broken
        size = len(raw)
    except Exception:  # found again below, where its name is known
        for name, value in document.items():
            _readable(name, value)
        _readable("extra", dict.fromkeys(job.extra))  # then it is one of its keys
        raise
    if size > 8 * MAX_DEPTH:  # a level costs at least eight bytes, so a small one is not worth walking
        for name, value in document.items():
            if depth(value) > MAX_DEPTH:
                encodable(name, value)
    if size > MAX_DOCUMENT:
        sizes = {name: encodable(name, value) for name, value in document.items()}
        raise BadArgument(
            max(sizes, key=lambda name: sizes[name]),
            f"{size} bytes",
            f"keep the document under {MAX_DOCUMENT} bytes: store the payload elsewhere and put a reference",
        )
    return raw


def _readable(name: str, value: Any) -> None:
    encodable(name, value)
    try:
        decode(bson.encode({"value": value}, codec_options=CODEC))
    except BSONError as error:
        raise BadArgument(name, value, "it could not be read back: its bytes are no BSON") from error


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_record(id_: Any) -> bool:
    return isinstance(id_, str) and id_.startswith(RECORD)
