"""Drain: 2,000 no-op jobs that are there already, ten slots."""

from __future__ import annotations

import asyncio
from time import perf_counter
from typing import Any

from pymongo import AsyncMongoClient

from benchmarks import raw
from benchmarks.rows import Row, percentile
from streamjobs import Queue

ROUNDS, JOBS, SLOTS = 5, 2_000, 10


async def measure_raw(uri: str, namespace: str, count: int) -> float:
    database, _, name = namespace.partition(".")
    client: AsyncMongoClient[Any] = AsyncMongoClient(uri, tz_aware=True, w="majority")
    jobs = client[database][name]
    await raw.index(jobs)
    claim = await raw.faster_claim(jobs)
    documents = [raw.document() for _ in range(count)]
    await jobs.insert_many(documents)
    began = perf_counter()
    await raw.drain(jobs, claim, [one["_id"] for one in documents], SLOTS)
    took = perf_counter() - began
    assert await jobs.count_documents({"status": 4}) == count
    await client.close()
    return count / took


async def measure_ours(uri: str, namespace: str, count: int) -> float:
    async with Queue(uri, namespace) as jobs:
        await jobs.create_indexes()
        done, left = asyncio.Event(), count

        @jobs.handler("bench")
        async def bench(job: Any) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                done.set()

        await jobs.put_many([jobs.job("bench", retries=5) for _ in range(count)])
        runner = jobs.runner("bench", concurrency=SLOTS)
        began = perf_counter()
        async with runner.running():
            await done.wait()
        took = perf_counter() - began  # with the last outcomes recorded, the start and the stop
        assert (await jobs.count())["bench"] == {"success": count}
    return count / took


async def run(uri: str, fresh: Any, count: int = JOBS) -> list[Row]:
    """Rounds in turn; one warm-up of each."""
    await measure_raw(uri, fresh(), 200)
    await measure_ours(uri, fresh(), 200)
    pairs, rates = [], []
    for _ in range(ROUNDS):
        theirs = await measure_raw(uri, fresh(), count)
        mine = await measure_ours(uri, fresh(), count)
        pairs.append(mine / theirs)
        rates.append(mine)
    caveat = f"ours {percentile(rates, 0.5):.0f} jobs/s; {count} no-op jobs, {SLOTS} at once, start and stop included"
    return [Row.of("drain", pairs, "times raw one-by-one, more is better", caveat)]
