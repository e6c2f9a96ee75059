"""Put: one after the other, and ten thousand in one call; with events off, and with events as JSON into /dev/null."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, contextmanager, nullcontext
from pathlib import Path
from time import perf_counter
from typing import Any

import structlog

from benchmarks import raw
from benchmarks.bench import Bench
from benchmarks.rows import MORE, Row, percentile
from streamjobs import Queue


@contextmanager
def events_on():
    """structlog as an application would configure it for a machine to read."""
    with Path("/dev/null").open("w", encoding="utf-8") as nowhere:
        structlog.configure(
            processors=[
                structlog.processors.add_log_level,
                structlog.processors.TimeStamper(fmt="iso", utc=True),
                structlog.processors.JSONRenderer(),
            ],
            wrapper_class=structlog.make_filtering_bound_logger(20),
            logger_factory=structlog.WriteLoggerFactory(nowhere),
        )
        try:
            yield
        finally:
            structlog.reset_defaults()


@asynccontextmanager
async def both(bench: Bench) -> AsyncIterator[tuple[Any, dict[str, Queue]]]:
    """The raw collection and two queues, each with an index and warm connections; all three grow alike."""
    client, collection = bench.raw(bench.fresh())
    async with client, Queue(bench.uri, bench.fresh()) as off, Queue(bench.uri, bench.fresh()) as on:
        await raw.index(collection)
        for jobs in (off, on):
            await jobs.create_indexes()
        for _ in range(50):
            await collection.insert_one(raw.document())
            for jobs in (off, on):
                await jobs.put("bench", retries=5)
        yield collection, {"off": off, "on": on}


async def _run(
    bench: Bench, name: str, count: int, part: int, theirs: Any, mine: Any, caveat: str, built: str
) -> list[Row]:
    """Rounds in which all sides take turns, each with ``part`` of its ``count``: the machine changes its pace in between."""
    rates: dict[str, list[float]] = {"off": [], "on": []}
    pairs: dict[str, list[float]] = {"off": [], "on": []}
    async with both(bench) as (collection, queues):
        for number in range(bench.rounds):
            bench.step(f"{name} {number + 1}")
            base, took = 0.0, dict.fromkeys(queues, 0.0)
            for _ in range(0, count, part):
                base += await theirs(collection, part)
                for state, jobs in queues.items():
                    with events_on() if state == "on" else nullcontext():
                        took[state] += await mine(jobs, part)
            for state, spent in took.items():
                rates[state].append(count / spent)
                pairs[state].append(base / spent)
    return [
        Row.of(
            one, pairs[state], f"times {caveat}, {MORE}",
            f"ours {percentile(rates[state], 0.5):.0f} jobs/s, events {state}; {count} jobs, {built}",
        )
        for one, state in ((name, "off"), (f"{name}_events", "on"))
    ]  # fmt: skip


async def run(bench: Bench) -> list[Row]:
    """One at a time, each built and written."""

    async def theirs(collection: Any, count: int) -> float:
        began = perf_counter()
        for number in range(count):
            await collection.insert_one({**raw.document(), "data": {"number": number}})
        return perf_counter() - began

    async def mine(jobs: Queue, count: int) -> float:
        began = perf_counter()
        for number in range(count):
            await jobs.put("bench", {"number": number}, retries=5)
        return perf_counter() - began

    return await _run(
        bench, "put", bench.of(2_000, 120), 40, theirs, mine, "insert_one with majority", "built and written"
    )


async def run_many(bench: Bench) -> list[Row]:
    """Calls of many, which are what is timed: documents and jobs are there before."""

    async def theirs(collection: Any, count: int) -> float:
        documents = [{**raw.document(), "data": {"number": number}} for number in range(count)]
        began = perf_counter()
        await collection.insert_many(documents)
        return perf_counter() - began

    async def mine(jobs: Queue, count: int) -> float:
        made = [jobs.job("bench", {"number": number}, retries=5) for number in range(count)]
        began = perf_counter()
        await jobs.put_many(made)
        return perf_counter() - began

    count = bench.of(10_000, 1_000)
    caveat = "insert_many with majority"
    built = f"{count} in a call, made before it"
    return await _run(bench, "put_many", 3 * count, count, theirs, mine, caveat, built)
