"""The raw driver doing what a job runner does, as directly as one would write it."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import UTC, datetime
from time import perf_counter
from typing import Any

from bson import Int64, ObjectId
from pymongo import ReturnDocument, UpdateOne

PAGE, BATCH = 5_000, 200
ASAP = datetime(1, 1, 1, tzinfo=UTC)


def document(kind: str = "bench", retries: int = 5) -> dict[str, Any]:
    """A job as put writes it."""
    return {
        "_id": ObjectId(), "status": 1, "tries": [], "created": datetime.now(UTC), "runat": ASAP, "data": {},
        "retries": retries, "retryinterval": Int64(0), "kind": kind,
    }  # fmt: skip


async def index(jobs: Any) -> None:
    """What any job collection needs to find what is due."""
    await jobs.create_index([("kind", 1), ("status", 1), ("runat", 1), ("created", 1), ("_id", 1)])


async def claim_by_find(jobs: Any, id_: Any) -> Any:
    """One findAndModify by _id."""
    return await jobs.find_one_and_update(
        {"_id": id_, "status": 1}, {"$set": {"status": 2}}, return_document=ReturnDocument.AFTER
    )


async def claim_by_update(jobs: Any, id_: Any) -> Any:
    """An update by _id, and a read."""
    result = await jobs.update_one({"_id": id_, "status": 1}, {"$set": {"status": 2}})
    return await jobs.find_one({"_id": id_}) if result.modified_count else None


async def finish(jobs: Any, id_: Any) -> None:
    """A try and a status, by _id."""
    entry = {"runner": "raw", "when": datetime.now(UTC)}
    await jobs.update_one({"_id": id_, "status": 2}, {"$set": {"status": 4}, "$push": {"tries": entry}})


async def faster_claim(jobs: Any) -> Callable[[Any, Any], Any]:
    """Whichever of the two claims is faster on this server, by a short run of each."""
    best: list[tuple[float, Callable[[Any, Any], Any]]] = []
    for claim in (claim_by_find, claim_by_update):
        documents = [document("probe") for _ in range(60)]
        await jobs.insert_many(documents)
        times: list[float] = []
        for one in documents:
            began = perf_counter()
            await claim(jobs, one["_id"])
            times.append(perf_counter() - began)
        best.append((sorted(times)[len(times) // 2], claim))
    await jobs.delete_many({"kind": "probe"})
    return min(best, key=lambda one: one[0])[1]


async def listen(
    jobs: Any,
    claim: Callable[[Any, Any], Any],
    ready: asyncio.Event,
    claimed: Callable[[Any], None],
    slots: Sequence[int] | None = None,
) -> None:
    """Insert, event, claim by id: tell of each claimed job; with ``slots`` only of those whose ``_id`` ends so."""
    pipeline: list[dict[str, Any]] = [{"$match": {"operationType": "insert"}}]
    if slots is None:
        pipeline.append({"$project": {"documentKey": 1}})
    else:
        slot = {"$substrBytes": [{"$toString": "$documentKey._id"}, 22, 2]}
        pipeline.append({"$project": {"documentKey": 1, "slot": slot}})
        pipeline.append({"$match": {"slot": {"$in": [f"{one:02x}" for one in slots]}}})
    async with await jobs.watch(pipeline, max_await_time_ms=10_000) as stream:
        ready.set()
        async for change in stream:
            document_ = await claim(jobs, change["documentKey"]["_id"])
            if document_ is not None:
                claimed(document_["_id"])


async def drain(jobs: Any, claim: Callable[[Any, Any], Any], ids: list[Any], at_once: int = 10) -> None:
    """Claim by id, finish by id, so many at once."""
    left = iter(ids)

    async def one() -> None:
        for id_ in left:
            if await claim(jobs, id_) is not None:
                await finish(jobs, id_)

    async with asyncio.TaskGroup() as group:
        for _ in range(at_once):
            group.create_task(one())


async def pages(jobs: Any, kind: str = "bench") -> AsyncIterator[list[Any]]:
    """Ids of what is due, in order, a page at a time: equalities, then one range, under one index."""
    order = [("created", 1), ("_id", 1)]
    last = None
    while True:
        beyond = {} if last is None else {"created": {"$gte": last}}
        cursor = jobs.find(
            {"kind": kind, "status": 1, "runat": ASAP, **beyond}, {"created": 1}, sort=order, limit=PAGE
        )
        rows = await cursor.to_list()
        if not rows:
            return
        yield [row["_id"] for row in rows]
        last = rows[-1]["created"]


async def claim_many(jobs: Any, ids: list[Any]) -> list[Any]:
    """Claim a batch with one token, and read what was got."""
    token = secrets.token_hex(12)
    await jobs.update_many({"_id": {"$in": ids}, "status": 1}, {"$set": {"status": 2, "token": token}})
    return await jobs.find({"_id": {"$in": ids}, "token": token}).to_list()


async def finish_many(jobs: Any, documents: list[Any]) -> None:
    """Tries and statuses as one unordered bulk write, each fenced by its token."""
    now = datetime.now(UTC)
    await jobs.bulk_write(
        [
            UpdateOne(
                {"_id": one["_id"], "status": 2, "token": one["token"]},
                {
                    "$set": {"status": 4},
                    "$unset": {"token": ""},
                    "$push": {"tries": {"runner": "raw", "when": now}},
                },
            )
            for one in documents
        ],
        ordered=False,
    )


async def drain_in_batches(jobs: Any, handler: Callable[[Any], Any]) -> int:
    """The best loop: pages of ids, claims of 200, the handlers, finishes of 200 while the next claim is under way."""
    done, finishing = 0, None
    seen: set[Any] = set()
    async for page in pages(jobs):
        ids = [id_ for id_ in page if id_ not in seen]
        seen.update(ids)
        for begin in range(0, len(ids), BATCH):
            documents = await claim_many(jobs, ids[begin : begin + BATCH])
            for one in documents:
                await handler(one)
            if finishing is not None:
                await finishing
            finishing = asyncio.create_task(finish_many(jobs, documents))
            done += len(documents)
        if not ids:
            break
    if finishing is not None:
        await finishing
    return done
