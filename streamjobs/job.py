"""What a job is: its document, read and written to the byte.

The format is that of the Go package ``jobs``. Two things follow from sharing a collection with it: its
runner rewrites the whole document when it finishes a job, so our optional fields are gone then; and it
marks a job working without naming an owner, so a working job without ``lease`` is never taken back.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, cast

import bson
from bson.binary import UuidRepresentation
from bson.codec_options import CodecOptions, DatetimeConversion
from bson.datetime_ms import DatetimeMS
from bson.errors import BSONError
from bson.int64 import Int64
from bson.objectid import ObjectId
from bson.raw_bson import RawBSONDocument

from streamjobs.clock import to_ms, wall
from streamjobs.errors import BadArgument, UnreadableJob, without_secrets

#: Go's zero time: run as soon as possible.
ASAP = datetime(1, 1, 1, tzinfo=UTC)
ASAP_MS = to_ms(ASAP)

#: How documents are decoded: aware dates, those outside Python's range as DatetimeMS, UUIDs as UUIDs.
CODEC: CodecOptions[dict[str, Any]] = CodecOptions(
    tz_aware=True,
    tzinfo=UTC,
    datetime_conversion=DatetimeConversion.DATETIME_AUTO,
    uuid_representation=UuidRepresentation.STANDARD,
)
#: The same, not decoded before someone looks: one unreadable document must not cost its batch, nor must a text of
#: bytes that are no UTF-8, which servers store; replaced, it is equal to nothing there.
RAW_CODEC: CodecOptions[RawBSONDocument] = CODEC.with_options(
    document_class=RawBSONDocument, unicode_decode_error_handler="replace"
)
#: Dates as plain milliseconds, for comparing and asking.
MS_CODEC: CodecOptions[dict[str, Any]] = CODEC.with_options(
    datetime_conversion=DatetimeConversion.DATETIME_MS, unicode_decode_error_handler="replace"
)

#: Largest document that put accepts. The server's limit is 16 MiB; the rest is kept for a hundred tries.
MAX_DOCUMENT = 15 * 1024 * 1024
#: Characters of a name: a kind's, a runner's.
MAX_NAME = 200
#: Deepest nesting of a value in it; mongod refuses documents over 100 deep in some commands, and ours wrap them.
MAX_DEPTH = 90
_FIELDS = ("_id", "status", "tries", "created", "runat", "data", "retries", "retryinterval", "kind")
_OURS = frozenset(_FIELDS)


class Status(enum.IntEnum):
    """A job's state as stored; 1 to 5 are the original's."""

    INVALID = 0
    NEW = 1
    WORKING = 2
    WAITING = 3
    SUCCESS = 4
    FAILED = 5
    CANCELLED = 6

    def __str__(self) -> str:
        return self.name.lower()

    @classmethod
    def parse(cls, text: str) -> Status:
        """The status of a text form ("new", "working", ...); any other text is INVALID, as in the original."""
        return next((one for one in cls if str(one) == text), cls.INVALID)


#: Statuses from which a job may be claimed.
RUNNABLE = (Status.NEW, Status.WAITING)


@dataclass(slots=True)
class Try:
    """One attempt, as recorded in the job.

    ``when`` is the server's time at its end. ``err`` is None after a success. ``outcome`` is set where it
    was neither success nor failure: lost, released, interrupted, snoozed, cancelled, folded.
    """

    runner: str
    when: datetime | DatetimeMS | None
    err: str | None = None
    token: str | None = None
    claimed: datetime | DatetimeMS | None = None
    started: datetime | DatetimeMS | None = None
    trace: str | None = None
    outcome: str | None = None
    folded: int = 0

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Try:
        """Read a try; unknown and missing fields are no error, and what is no document is an empty one."""
        try:
            get = dict(document if isinstance(cast("Any", document), Mapping) else {}).get
        except BSONError:
            return cls("", None)
        return cls(
            str(get("runner", "")), get("when"), get("err"), get("token"), get("claimed"), get("started"),
            get("trace"), get("outcome"), max(0, _number(get("folded"))),
        )  # fmt: skip


@dataclass(slots=True, eq=False)
class Job:
    """A job: the original's nine fields under its names, and in ``extra`` all others, kept as they are.

    ``retries`` is the number of attempts left, in all: 5 at put means five attempts, and 0 and 1 both mean
    one. ``retryinterval`` is in nanoseconds. ``runat`` of :data:`ASAP` means as soon as possible. Inside a
    handler, see also :attr:`log`, :attr:`lost` and :attr:`number`.
    """

    id: ObjectId | Any
    kind: str
    data: dict[str, Any] = field(default_factory=dict[str, Any])
    status: int = Status.NEW
    tries: list[Any] = field(default_factory=list[Any])
    created: datetime | DatetimeMS | None = None
    runat: datetime | DatetimeMS = ASAP
    retries: int = 0
    retryinterval: int = 0
    extra: dict[str, Any] = field(default_factory=dict[str, Any])
    _order: tuple[str, ...] = _FIELDS
    estimated: bool = False  # created is this host's guess: put asks the server's clock
    delay: float | None = None  # seconds that put adds to the server's time
    held: Any = None  # the running try, inside a handler: see streamjobs.context

    @classmethod
    def new(cls, kind: str) -> Job:
        """A job as the original's ``New``: fresh id, status new, created now, empty data.

        ``created`` is this host's date until the job is put, which sets it by the server's clock.
        """
        return cls(ObjectId(), check_kind(kind), created=datetime.fromtimestamp(wall(), UTC), estimated=True)

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Job:
        """Read a document, accepting what older or foreign writers leave.

        Raises:
            UnreadableJob: it can't be a job: no kind, a status that is no number, a runat that is no date,
                data that is no document, or bytes that are no BSON.

        """
        if not isinstance(cast("Any", document), Mapping):
            raise UnreadableJob(None, f"it is no document but {type(document).__name__}")
        if isinstance(document, RawBSONDocument):
            id_ = _id_of(document)
            try:
                document = decode(bytes(document.raw))
            except (BSONError, ValueError, OverflowError) as error:
                raise undecodable(id_, error) from error
        problem = problem_of(document)
        if problem:
            raise UnreadableJob(document.get("_id"), problem)
        tries = document.get("tries")
        return cls(
            id=document.get("_id"),
            kind=document["kind"],
            data=document["data"],
            status=document["status"],
            tries=tries if isinstance(tries, list) else [],  # pyright: ignore[reportUnknownArgumentType]
            created=document.get("created"),
            runat=document["runat"],
            retries=_number(document.get("retries")),
            retryinterval=_number(document.get("retryinterval")),
            extra={key: value for key, value in document.items() if key not in _OURS},
            _order=tuple(document),
        )

    def to_document(self) -> dict[str, Any]:
        """The document, fields in the order they were read in, or the original's for a new job."""
        mine: dict[str, Any] = {
            "_id": self.id, "status": _int(self.status), "tries": self.tries, "created": self.created,
            "runat": self.runat, "data": self.data, "retries": _int(self.retries),
            "retryinterval": Int64(self.retryinterval), "kind": self.kind,
        }  # fmt: skip
        if self._order is _FIELDS and not self.extra:  # a new one, as most that are written
            return mine
        out = {
            key: mine[key] if key in mine else self.extra[key]
            for key in self._order
            if key in mine or key in self.extra
        }
        out.update({key: value for key, value in self.extra.items() if key not in out})
        for key, value in mine.items():
            if key not in out and value not in ([], 0, None):
                out[key] = value
        return out

    @property
    def history(self) -> list[Try]:
        """The tries as objects, oldest first."""
        entries = cast("list[Mapping[str, Any]]", [one for one in self.tries if isinstance(one, Mapping)])
        return [Try.from_document(entry) for entry in entries]

    @property
    def number(self) -> int:
        """The number of the try that is running or would be next, from 1; grows with every claim."""
        return 1 + sum(1 if not entry.folded else entry.folded for entry in self.history)

    @property
    def state(self) -> str:
        """The status as text; a number that this version does not know as ``unknown (n)``."""
        try:
            return str(Status(self.status))
        except ValueError:
            return f"unknown ({self.status})"

    @property
    def asap(self) -> bool:
        """Whether it was put to run as soon as possible."""
        return date_ms(self.runat) == ASAP_MS

    @property
    def log(self) -> Any:
        """A structlog logger bound with job, kind, try and runner. Only inside a handler."""
        return self._in_handler("log").log

    @property
    def lost(self) -> bool:
        """Whether this try has lost its job; a sync handler that runs long should look now and then."""
        return bool(self.held is not None and self.held.lost)

    def check(self) -> None:
        """Raise LeaseLost if this try has lost its job. Only inside a handler."""
        self._in_handler("check()").check()

    def lent(self, held: Any) -> Job:
        """The handler's own: what it changes in it does not change which job is finished, and how."""
        return Job(
            self.id, self.kind, self.data, self.status, list(self.tries), self.created, self.runat, self.retries,
            self.retryinterval, self.extra, self._order, self.estimated, self.delay, held,
        )  # fmt: skip

    def _in_handler(self, what: str) -> Any:
        if self.held is None:
            raise AttributeError(f"job.{what} exists only inside a handler, on the job that it was given")
        return self.held


def problem_of(document: Mapping[str, Any]) -> str | None:
    """Why a document can't be a job, or None."""
    if (
        type(document.get("kind")) is str and type(document.get("status")) is int
        and type(document.get("runat")) is datetime and type(document.get("data")) is dict
    ):  # fmt: skip
        return None  # the usual case, in a fraction of the time
    checks = (
        ("kind", isinstance(document.get("kind"), str), "a text"),
        ("status", _is_status(document.get("status")), "a number"),
        ("runat", isinstance(document.get("runat"), (datetime, DatetimeMS)), "a date"),
        ("data", isinstance(document.get("data"), Mapping), "a document"),
    )
    for name, good, wanted in checks:
        if not good:
            value = document.get(name)
            return f"{name} is not {wanted} but {'missing' if value is None else type(value).__name__}"
    return None


def id_key(id_: Any) -> Any:
    """An ``_id`` as something that can be looked up: foreign ones may be documents, or dates in two forms."""
    if type(id_) in (ObjectId, str):  # not bson.Code, a text without a hash
        return id_
    return bson.encode({"_id": id_}, codec_options=CODEC)


def date_ms(value: Any) -> int | None:
    """A BSON date in either of its Python forms as milliseconds since 1970 UTC; None for anything else."""
    if isinstance(value, datetime):
        return to_ms(value)
    return int(value) if isinstance(value, DatetimeMS) else None


def check_kind(kind: object) -> str:
    """A usable kind as a plain text, or BadArgument."""
    return check_name("kind", kind)


def check_name(name: str, value: object) -> str:
    """A name of 1 to 200 characters as a plain text, or BadArgument."""
    if not isinstance(value, str) or not value or len(value) > MAX_NAME or "\0" in value:
        raise BadArgument(name, value, "give a text of 1 to 200 characters without NUL")
    plain = str.__str__(value)  # a subclass may be stored as something else, as bson.Code is
    try:
        plain.encode()
    except UnicodeEncodeError:
        raise BadArgument(name, value, "give a text without lone surrogates") from None
    return plain


def encodable(name: str, value: Any) -> int:
    """Refuse a value that BSON or a server can't hold, naming it; the encoded size in bytes if it is good."""
    try:
        size = len(bson.encode({"value": value}, codec_options=CODEC))
    except RecursionError:
        raise BadArgument(name, value, "it is nested too deeply or contains itself") from None
    except Exception as error:  # a mapping of the caller's own may raise anything
        raise BadArgument(
            name, value, f"it can't be stored as BSON ({without_secrets(str(error))[:100]})"
        ) from error
    if size > 8 * MAX_DEPTH and depth(value) > MAX_DEPTH:  # a level costs at least eight bytes
        raise BadArgument(name, value, f"nest it at most {MAX_DEPTH} deep (servers refuse more)")
    return size


def depth(value: Any) -> int:
    """How many documents and lists are in each other."""
    deepest, stack = 0, [(value, 1)]
    while stack:
        item, level = stack.pop()
        deepest = max(deepest, level)
        if isinstance(item, Mapping):
            stack.extend((inner, level + 1) for inner in cast("Mapping[str, Any]", item).values())
        elif isinstance(item, (list, tuple)):
            stack.extend((inner, level + 1) for inner in cast("list[Any]", item))
    return deepest


def undecodable(id_: Any, error: Exception) -> UnreadableJob:
    """What to say of a document whose bytes are no BSON that Python can hold."""
    return UnreadableJob(id_, f"its BSON can't be decoded ({error})")


def decode(raw: bytes | memoryview) -> dict[str, Any]:
    """A document, decoded as all are."""
    codec: Any = CODEC  # decode's overloads do not know one for dict[str, Any]
    return dict(bson.decode(raw, codec))  # pyright: ignore[reportUnknownMemberType]


def _id_of(document: RawBSONDocument) -> Any:
    try:
        return document.get("_id")
    except (BSONError, ValueError, OverflowError):
        return None


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_status(value: Any) -> bool:
    return _is_int(value) or (
        isinstance(value, float) and value.is_integer()
    )  # some shells store every number so


def _number(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if not isinstance(value, float) or not math.isfinite(value):
        return 0
    return int(max(-(2.0**62), min(value, 2.0**62)))  # a whole number that BSON can hold


def _int(value: int) -> int:
    # an IntEnum would be refused by the encoder; an Int64 or double that was read stays one
    return value if isinstance(value, (Int64, float)) else int(value)
