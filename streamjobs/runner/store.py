"""The runner's reads and its two bulk writes: the only place in ``runner/`` that asks the collection."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from bson.dbref import DBRef
from bson.errors import BSONError
from bson.raw_bson import RawBSONDocument
from pymongo import ReadPreference, ReturnDocument
from pymongo.asynchronous.collection import AsyncCollection
from pymongo.errors import PyMongoError
from pymongo.read_concern import ReadConcern

from streamjobs import transitions
from streamjobs.clock import ServerClock, boot
from streamjobs.job import MS_CODEC, RAW_CODEC, date_ms, decode
from streamjobs.runner.backlog import PAGE, Candidate, Range

_CANDIDATE = {"_id": 1, "kind": 1, "status": 1, "runat": 1, "created": 1, "retries": 1}
#: What a take-back needs of a job, and what it makes do with: without retries the job is then failed.
_HELD = {**_CANDIDATE, "tries": 1, "retryinterval": 1, "lease": 1}
_LEAST = {"_id": 1, "kind": 1, "status": 1, "runat": 1, "lease": 1}
_SETTLE_MS = 5_000
#: What tells how a claim has ended.
SETTLED = {"status": 1, "tries": 1, "lease": 1}
#: Errors of one write that pass by themselves: conflicts, elections, shutdowns, time limits.
PASSING = frozenset({50, 89, 91, 112, 189, 262, 10107, 11600, 11602, 13435, 13436, 251, 246})


class Store:
    """The job collection as a runner sees it."""

    def __init__(self, jobs: AsyncCollection[dict[str, Any]]) -> None:
        self.jobs = jobs
        self._raw: AsyncCollection[RawBSONDocument] = jobs.with_options(codec_options=RAW_CODEC)
        self._ms: AsyncCollection[dict[str, Any]] = jobs.with_options(codec_options=MS_CODEC)
        self._sure = surely(jobs)

    async def learn(self, clock: ServerClock) -> dict[str, Any]:
        """Ask the server for its clock; its ``hello``."""
        sent = boot()
        hello: dict[str, Any] = await self.jobs.database.client.admin.command("hello")
        clock.heard(sent, hello)
        return hello

    async def claim(
        self, ids: Sequence[Any], kinds: Collection[str], owner: str, token: str, *, ahead: bool
    ) -> Sequence[Mapping[str, Any]]:
        """Claim jobs and read what was claimed, perhaps with some that were not: look at the token."""
        guard, update = transitions.claim(ids, kinds, owner, token, ahead=ahead)
        if len(ids) == 1:
            # not raw: the driver adds labels to a reply that has an error, which raw bytes do not let it
            try:
                one = await self.jobs.find_one_and_update(guard, update, return_document=ReturnDocument.AFTER)
            except BSONError:
                return await self.claimed(ids, token)  # it was claimed, and can't be decoded
            return [] if one is None else [one]
        result = await self.jobs.update_many(guard, update)
        return await self.claimed(ids, token) if result.matched_count else []

    async def claimed(self, ids: Sequence[Any], token: str) -> list[RawBSONDocument]:
        """Those of the jobs that were claimed with this token."""
        return (
            await self._raw.find({"_id": {"$in": list(ids)}, "lease.token": token})
            .batch_size(len(ids) + 1)
            .to_list()
        )

    async def surely_claimed(
        self, ids: Sequence[Any], token: str
    ) -> list[RawBSONDocument | Exception | None]:
        """The same for each by itself, certain of every write before it; its error where that failed."""
        sure = self._raw.with_options(read_concern=ReadConcern("linearizable"))

        async def look(id_: Any) -> RawBSONDocument | Exception | None:
            try:
                return await sure.find_one({"_id": id_, "lease.token": token}, max_time_ms=_SETTLE_MS)
            except PyMongoError as error:
                return error

        return await asyncio.gather(*map(look, ids))

    async def settled(self, id_: Any) -> dict[str, Any] | None:
        """Status, tries and lease of a job, certain of every write before it."""
        found: dict[str, Any] | None = await self._sure.find_one(
            {"_id": id_}, SETTLED, max_time_ms=_SETTLE_MS
        )
        return found

    async def rows(self, ids: Iterable[Any]) -> list[dict[str, Any]]:
        """What these documents say of themselves; of ``data`` only whether it is a document."""
        data = {"$cond": [{"$eq": [{"$type": "$data"}, "object"]}, {}, None]}
        stages: list[dict[str, Any]] = [
            {"$match": {"_id": {"$in": list(ids)}}},
            {"$project": {**_CANDIDATE, "data": data, "token": "$lease.token"}},
        ]
        return await (await self._ms.aggregate(stages)).to_list()

    async def page(self, home: Range, until_ms: int) -> tuple[list[dict[str, Any]], bool]:
        """The next page of a range, and whether it was full."""
        rows: list[dict[str, Any]] = []
        size = home.size
        for query in home.queries(until_ms):
            want = size - len(rows)
            rows += (
                await self._ms.find(query, _CANDIDATE).sort(home.order).limit(want).batch_size(want).to_list()
            )
            if len(rows) >= size:
                return rows, True
        return rows, False

    async def held_by(self, owner: str) -> list[dict[str, Any]]:
        """Jobs whose lease names this owner, without their data; of one that can't be decoded what can be."""
        found = await self._raw.find({"lease.owner": owner}, _HELD).limit(PAGE).batch_size(PAGE).to_list()
        out: list[dict[str, Any]] = []
        for raw in found:
            try:
                out.append(decode(bytes(raw.raw)))
            except (BSONError, ValueError, OverflowError):
                least = await self._ms.find_one({"_id": raw.get("_id")}, _LEAST)
                out += [least] if least is not None else []
        return out

    async def records(self) -> list[dict[str, Any]]:
        """The runners' control documents."""
        return await self._ms.find({"control": "runner"}).to_list()

    async def owners(self, among: Sequence[str] | None = None) -> list[Any]:
        """The owners that jobs name: all, or those of some."""
        which = {"$gt": ""} if among is None else {"$in": list(among)}
        return await self._ms.distinct("lease.owner", {"lease.owner": which})

    async def index_information(self) -> dict[str, Any]:
        """The collection's indexes."""
        return dict(await self.jobs.index_information())


def surely(jobs: Any) -> Any:
    """A collection, of either sort, whose reads are certain of every write before them."""
    return jobs.with_options(read_concern=ReadConcern("linearizable"), read_preference=ReadPreference.PRIMARY)


def last_of(rows: Sequence[Mapping[str, Any]], home: Range) -> Candidate | None:
    """Where a page ends, whether or not its last row can be a job."""
    for row in reversed(rows):
        last = candidate_of({**row, "kind": home.kind, "status": home.status}, "read")
        if last is not None:
            return last
    return None


def candidate_of(row: Mapping[str, Any], source: str) -> Candidate | None:
    """A candidate of a document's fields, or None if they don't make one."""
    runat, status, kind = date_ms(row.get("runat")), row.get("status"), row.get("kind")
    if runat is None or not isinstance(kind, str) or not isinstance(status, (int, float)) or "_id" not in row:
        return None
    if isinstance(status, float) and not status.is_integer():  # NaN and the infinities among them
        return None
    if isinstance(row["_id"], DBRef):
        return None  # in a list of ids some servers take it for a condition, and refuse all
    retries = row.get("retries")
    left = retries if isinstance(retries, int) else 0
    return Candidate(row["_id"], kind, int(status), runat, row.get("created"), boot(), source, left)
