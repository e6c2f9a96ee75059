"""Pickup: from an insert in another process to the handler's first line, in an idle runner."""

from __future__ import annotations

import asyncio
import sys
from contextlib import suppress
from typing import Any

from pymongo import AsyncMongoClient, MongoClient

from benchmarks import raw
from benchmarks.rows import Row, percentile
from streamjobs import Queue, clock

ROUNDS, PER_ROUND, WARM = 5, 200, 50


async def producer(uri: str, namespace: str) -> asyncio.subprocess.Process:
    """A process that inserts a job for each line it is given, and says when it began to."""
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "benchmarks.pickup", uri, namespace,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip


def produce(uri: str, namespace: str) -> None:
    """The producer's process."""
    database, _, name = namespace.partition(".")
    with MongoClient(uri, w="majority") as client:
        jobs = client[database][name]
        jobs.find_one({"_id": 0})
        for _ in sys.stdin:
            one = raw.document()
            began = clock.boot()
            jobs.insert_one(one)
            print(f"{one['_id']} {began}", flush=True)


class Samples:
    """Asks for one insert after the other and measures each until it is told that it has begun."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._begun: dict[str, asyncio.Future[float]] = {}

    def begun(self, id_: Any) -> None:
        """A handler's first line."""
        self.begun_at(str(id_), clock.boot())

    def begun_at(self, id_: str, at: float) -> None:
        """The same, as another process on this machine saw it; where two begin one, the first counts."""
        future = self._future(id_)
        if not future.done():
            future.set_result(at)

    async def take(self, count: int) -> list[float]:
        """So many latencies, in seconds."""
        out = []
        for _ in range(count):
            self._process.stdin.write(b"\n")
            id_, began = (await self._process.stdout.readline()).split()
            out.append(await asyncio.wait_for(self._future(id_.decode()), 10) - float(began))
            await asyncio.sleep(0.002)  # let the finish be written: an idle runner is measured
        return out

    def _future(self, id_: str) -> asyncio.Future[float]:
        return self._begun.setdefault(id_, asyncio.get_running_loop().create_future())


async def measure_raw(uri: str, namespace: str) -> list[float]:
    database, _, name = namespace.partition(".")
    client: AsyncMongoClient[Any] = AsyncMongoClient(uri, tz_aware=True, w="majority")
    jobs = client[database][name]
    process = await producer(uri, namespace)
    samples, ready = Samples(process), asyncio.Event()
    await raw.index(jobs)
    claim = await raw.faster_claim(jobs)
    task = asyncio.create_task(raw.listen(jobs, claim, ready, samples.begun))
    await ready.wait()
    try:
        await samples.take(WARM)
        return await samples.take(PER_ROUND)
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        await client.close()
        process.stdin.close()
        await process.wait()


async def measure_ours(uri: str, namespace: str) -> list[float]:
    process = await producer(uri, namespace)
    samples = Samples(process)
    async with Queue(uri, namespace) as jobs:
        await jobs.create_indexes()

        @jobs.handler("bench")
        async def bench(job: Any) -> None:
            samples.begun(job.id)

        try:
            async with jobs.running("bench"):
                await samples.take(WARM)
                return await samples.take(PER_ROUND)
        finally:
            process.stdin.close()
            await process.wait()


async def run(uri: str, fresh: Any) -> list[Row]:
    """Rounds in turn, raw and ours, so that both meet the same noise."""
    theirs, mine = [], []
    for _ in range(ROUNDS):
        theirs.append(await measure_raw(uri, fresh()))
        mine.append(await measure_ours(uri, fresh()))
    rows = []
    for name, share in (("pickup_p50", 0.5), ("pickup_p99", 0.99)):
        pairs = [percentile(m, share) / percentile(t, share) for m, t in zip(mine, theirs, strict=True)]
        ms = percentile([percentile(m, share) for m in mine], 0.5) * 1000
        rows.append(
            Row.of(
                name,
                pairs,
                "times raw, less is better",
                f"ours {ms:.2f} ms; insert in another process, claim by id",
            )
        )
    return rows


if __name__ == "__main__":
    produce(*sys.argv[1:])
