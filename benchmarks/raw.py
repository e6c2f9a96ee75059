"""The raw driver doing what a job runner does, as directly as one would write it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from time import perf_counter
from typing import Any

from bson import Int64, ObjectId
from pymongo import ReturnDocument

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
    jobs: Any, claim: Callable[[Any, Any], Any], ready: asyncio.Event, claimed: Callable[[Any], None]
) -> None:
    """Insert, event, claim by id: tell of each claimed job."""
    pipeline = [{"$match": {"operationType": "insert"}}, {"$project": {"documentKey": 1}}]
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
