"""Drain: no-op jobs that are there already, with the runner's start and stop.

``drain`` is held against the best raw loop (pages, batches, overlap), ``drain_single`` against the plain one,
job by job. Jobs that may start only once are claimed within the free slots, so they are told apart.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from time import perf_counter
from typing import Any

from benchmarks import raw
from benchmarks.bench import Bench
from benchmarks.rows import MORE, Row, percentile
from streamjobs import Queue

SLOTS, WARM, CHUNK = 10, 200, 10_000


def chunks(count: int, retries: int) -> Iterator[list[dict[str, Any]]]:
    for begin in range(0, count, CHUNK):
        yield [raw.document(retries=retries) for _ in range(min(CHUNK, count - begin))]


async def raw_single(bench: Bench, count: int) -> float:
    """Jobs a second, one by one, ten at once."""
    client, jobs = bench.raw(bench.fresh())
    await raw.index(jobs)
    claim = await raw.faster_claim(jobs)
    documents = [raw.document() for _ in range(count)]
    await jobs.insert_many(documents)
    began = perf_counter()
    await raw.drain(jobs, claim, [one["_id"] for one in documents], SLOTS)
    took = perf_counter() - began
    assert await jobs.count_documents({"kind": "bench", "status": 4}) == count
    await client.close()
    return count / took


async def raw_batches(bench: Bench, count: int) -> float:
    """Jobs a second, in batches."""
    client, jobs = bench.raw(bench.fresh())
    await raw.index(jobs)
    for documents in chunks(count, 5):
        await jobs.insert_many(documents)

    async def handler(_document: Any) -> None:
        pass

    began = perf_counter()
    assert await raw.drain_in_batches(jobs, handler) == count
    took = perf_counter() - began
    assert await jobs.count_documents({"kind": "bench", "status": 4}) == count
    await client.close()
    return count / took


async def ours(
    bench: Bench, count: int, *, slots: int = SLOTS, retries: int = 5, sync: bool = False
) -> float:
    """Jobs a second."""
    namespace = bench.fresh()
    client, collection = bench.raw(namespace)
    async with client, Queue(bench.uri, namespace) as jobs:
        await jobs.create_indexes()
        for documents in chunks(count, retries):
            await collection.insert_many(documents)
        done, left, loop = asyncio.Event(), count, asyncio.get_running_loop()

        def one_less() -> None:
            nonlocal left
            left -= 1
            if left == 0:
                loop.call_soon_threadsafe(done.set)

        if sync:

            @jobs.handler("bench")
            def bench_sync(job: Any) -> None:
                one_less()
        else:

            @jobs.handler("bench")
            async def bench_async(job: Any) -> None:
                one_less()

        runner = jobs.runner("bench", concurrency=slots)
        began = perf_counter()
        async with runner.running():
            await done.wait()
        took = perf_counter() - began  # with the last outcomes recorded
        assert (await jobs.count())["bench"] == {"success": count}
    return count / took


async def _against(
    bench: Bench, name: str, theirs: Any, mine: dict[str, dict[str, Any]], count: int, what: str
) -> list[Row]:
    """Rounds in turn, each with the raw loop and ours; one warm-up of each."""
    bench.step("warm-up")
    await theirs(bench, WARM)
    await ours(bench, WARM)
    pairs: dict[str, list[float]] = {one: [] for one in mine}
    rates: dict[str, list[float]] = {one: [] for one in mine}
    for number in range(bench.rounds):
        bench.step(f"{name} {number + 1}, raw")
        rate = await theirs(bench, count)
        for one, options in mine.items():
            bench.step(f"{one} {number + 1}")
            rates[one].append(await ours(bench, count, **options))
            pairs[one].append(rates[one][-1] / rate)
    return [
        Row.of(
            one, pairs[one], f"times {what}, {MORE}",
            f"ours {percentile(rates[one], 0.5):.0f} jobs/s; {count} no-op jobs, {options.get('slots', SLOTS)} slots, "
            "start and stop included",
        )
        for one, options in mine.items()
    ]  # fmt: skip


async def run(bench: Bench) -> list[Row]:
    """Jobs with retries, against the best raw loop."""
    return await _against(
        bench, "drain", raw_batches, {"drain": {}}, bench.of(20_000, 4_000), "best raw loop"
    )


async def run_once(bench: Bench) -> list[Row]:
    """Jobs that may start only once, against the same."""
    mine = {f"drain_once_{slots}": {"slots": slots, "retries": 0} for slots in (10, 200)}
    return await _against(bench, "drain_once", raw_batches, mine, bench.of(20_000, 4_000), "best raw loop")


async def run_single(bench: Bench) -> list[Row]:
    """Few jobs, against the loop that takes them one by one."""
    mine: dict[str, dict[str, Any]] = {"drain_single": {}}
    return await _against(bench, "drain_single", raw_single, mine, bench.of(2_000, 1_000), "raw one-by-one")


async def run_sync(bench: Bench) -> list[Row]:
    """Sync handlers, against our async ones."""

    async def async_ones(bench: Bench, count: int) -> float:
        return await ours(bench, count)

    mine = {"drain_sync": {"sync": True}}
    return await _against(
        bench, "drain_sync", async_ones, mine, bench.of(20_000, 4_000), "our async handlers"
    )
