"""What a check found, and what the checks are given: a client, the collection, and what was asked once for all."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import bson
from bson.errors import BSONError
from bson.raw_bson import RawBSONDocument
from pymongo import MongoClient
from pymongo.collection import Collection

from streamjobs import clock
from streamjobs.clients import Source
from streamjobs.clock import ServerClock
from streamjobs.job import MS_CODEC, RAW_CODEC, date_ms
from streamjobs.runner.lease import owner_of, record_id

#: Documents that are looked at where all would be too many: so many of the newest, and so many at random.
SAMPLE = 1_000
#: Names, kinds and ids that one line tells; the rest is counted.
SHOWN = 5
_RECORDS = 1_000
_DATA = {"$cond": [{"$eq": [{"$type": "$data"}, "object"]}, {}, None]}
_FIELDS = {"kind": 1, "status": 1, "runat": 1, "tries.outcome": 1, "tries.when": 1, "data": _DATA}


class Level(enum.StrEnum):
    """How bad it is. ``skip``: it could not be seen; the text says why."""

    OK = "ok"
    SKIP = "skip"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: the check's name, how bad it is, what was seen, and what to do, empty where nothing is to be done.

    ``text`` and ``fix`` may hold what documents say (kinds, runners' names): make them safe before a terminal sees
    them.
    """

    name: str
    level: Level
    text: str
    fix: str = ""


class Only:
    """A server selector that lets through one member while :attr:`address` is set."""

    def __init__(self) -> None:
        self.address: tuple[str, int | None] | None = None

    def __call__(self, servers: Sequence[Any]) -> list[Any]:
        """Those that may be asked."""
        return [one for one in servers if self.address in (None, one.address)]


@dataclass(frozen=True, slots=True)
class Runner:
    """A runner's record: what it says of itself, and whether its lease holds."""

    owner: str
    name: str
    kinds: tuple[str, ...]
    slots: int
    version: str
    alive: bool


@dataclass(frozen=True, slots=True)
class Sample:
    """Documents without their data: of a small collection all. ``broken``: ids whose BSON can't be decoded."""

    rows: Sequence[Mapping[str, Any]]
    broken: Sequence[Any]
    whole: bool

    def __str__(self) -> str:
        count = len(self.rows) + len(self.broken)
        return f"all {count:,} documents" if self.whole else f"a sample of {count:,} documents"


@dataclass(kw_only=True)
class Subject:
    """What is examined. What several checks need is asked once; a failed question fails each that asks.

    Attributes:
        source: where its clients come from.
        client: the doctor's own.
        only: its server selector.
        margin: the runners' setting, in seconds.
        server: the server's clock.
        hello: its latest reply to ``hello``.

    """

    source: Source
    client: MongoClient[dict[str, Any]]
    only: Only
    margin: float
    server: ServerClock = field(default_factory=ServerClock)
    hello: dict[str, Any] = field(default_factory=dict[str, Any])

    @cached_property
    def jobs(self) -> Collection[dict[str, Any]]:
        """The collection, with the concerns that the library sets and dates as milliseconds."""
        jobs: Collection[dict[str, Any]] = self.source.jobs_of(self.client)
        return jobs.with_options(codec_options=MS_CODEC)

    @cached_property
    def index_information(self) -> dict[str, Any]:
        """The collection's indexes; empty where there is no collection."""
        return dict(self.jobs.index_information())

    @property
    def streams(self) -> bool:
        """Whether the server can have change streams and transactions at all."""
        return bool(self.hello.get("setName")) or self.sharded

    @property
    def sharded(self) -> bool:
        """Whether it is reached through mongos."""
        return self.hello.get("msg") == "isdbgrid"

    def indexed(self, *keys: str) -> bool:
        """Whether an index begins with these keys: without one a query would read the whole collection."""
        wanted = list(keys)
        listed = [[key for key, _ in one["key"]] for one in self.index_information.values()]
        return any(one[: len(wanted)] == wanted for one in listed)

    def runners(self) -> list[Runner]:
        """The runners' records as they are now, by the server's clock; at most a thousand."""
        now = self.server.now_ms()
        # by _id, which is always indexed
        found = self.jobs.find({"_id": {"$gte": record_id(""), "$lt": record_id("")[:-1] + ";"}})
        return [_runner(one, now) for one in found.limit(_RECORDS)]

    def alive(self) -> list[Runner]:
        """Those whose lease holds."""
        return [one for one in self.runners() if one.alive]

    @cached_property
    def sample(self) -> Sample:
        """Documents that should be jobs."""
        whole = self.jobs.estimated_document_count() <= 2 * SAMPLE
        raw = self.jobs.with_options(codec_options=RAW_CODEC)
        newest = {"$sort": {"_id": -1}}
        ways: list[list[dict[str, Any]]] = [[newest, {"$limit": 3 * SAMPLE}]]
        if not whole:
            ways = [[newest, {"$limit": SAMPLE}], [{"$sample": {"size": SAMPLE}}]]
        seen: dict[bytes, RawBSONDocument] = {}
        for way in ways:
            stages = [*way, {"$match": {"control": {"$exists": False}}}, {"$project": _FIELDS}]
            seen.update((bytes(one.raw), one) for one in raw.aggregate(stages))
        rows: list[dict[str, Any]] = []
        broken: list[Any] = []
        for one in seen.values():
            try:
                rows.append(_decode(one))
            except (BSONError, ValueError, OverflowError):
                broken.append(one.get("_id"))
        return Sample(rows, broken, whole)


def listed(things: Sequence[object]) -> str:
    """The first of them, and how many more."""
    more = len(things) - SHOWN
    return ", ".join(str(one) for one in things[:SHOWN]) + (f" and {more:,} more" if more > 0 else "")


def since(milliseconds: float) -> str:
    """A span in words that fit it."""
    seconds = milliseconds / 1000
    for least, size, unit in ((172_800, 86_400, "d"), (7_200, 3_600, "h"), (120, 60, "min"), (1, 1, "s")):
        if seconds >= least:
            return f"{seconds / size:.{1 if seconds < 10 else 0}f} {unit}"
    return f"{milliseconds:.1f} ms" if milliseconds < 10 else f"{milliseconds:.0f} ms"


def utc_ms() -> float:
    """This host's date in milliseconds."""
    return clock.wall() * 1000


def _runner(record: Mapping[str, Any], now: float) -> Runner:
    ends, kinds = date_ms(record.get("ends")), record.get("kinds")
    slots = record.get("slots")
    return Runner(
        owner=owner_of(str(record["_id"])),
        name=str(record.get("name", "?")),
        kinds=tuple(str(one) for one in kinds) if isinstance(kinds, list) else (),  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
        slots=slots if isinstance(slots, int) else 0,
        version=str(record.get("version", "?")),
        alive=record.get("fenced") is None and ends is not None and ends > now,
    )


def _decode(raw: RawBSONDocument) -> dict[str, Any]:
    codec: Any = MS_CODEC  # decode's overloads do not know one for dict[str, Any]
    return dict(bson.decode(bytes(raw.raw), codec))  # pyright: ignore[reportUnknownMemberType]
