"""Pickup: from an insert in another process to the handler's first line, in an idle runner."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from pymongo import MongoClient

from benchmarks import raw
from benchmarks.bench import Bench
from benchmarks.rows import Row, latencies
from streamjobs import Queue, clock

PARTS, PER_PART, WARM = 2, 100, 50
SETTLED = 1.6  # seconds, after which a runner has read what may have come while its stream was opened
PAUSE = 0.002  # seconds in which the finish is written: an idle runner is measured


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
            await asyncio.sleep(PAUSE)
        return out

    def _future(self, id_: str) -> asyncio.Future[float]:
        return self._begun.setdefault(id_, asyncio.get_running_loop().create_future())


async def measure_raw(bench: Bench) -> list[float]:
    namespace = bench.fresh()
    client, jobs = bench.raw(namespace)
    process = await producer(bench.uri, namespace)
    samples, ready = Samples(process), asyncio.Event()
    await raw.index(jobs)
    claim = await raw.faster_claim(jobs)
    task = asyncio.create_task(raw.listen(jobs, claim, ready, samples.begun))
    await ready.wait()
    try:
        await samples.take(WARM)
        return await samples.take(bench.of(PER_PART, 30))
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        await client.close()
        process.stdin.close()
        await process.wait()


async def measure_ours(bench: Bench) -> list[float]:
    namespace = bench.fresh()
    process = await producer(bench.uri, namespace)
    samples = Samples(process)
    async with Queue(bench.uri, namespace) as jobs:
        await jobs.create_indexes()

        @jobs.handler("bench")
        async def handler(job: Any) -> None:
            samples.begun(job.id)

        try:
            async with jobs.running("bench"):
                await asyncio.sleep(SETTLED)
                await samples.take(WARM)
                return await samples.take(bench.of(PER_PART, 30))
        finally:
            process.stdin.close()
            await process.wait()


async def in_turns(
    bench: Bench, name: str, *sides: Callable[[Bench], Awaitable[list[Any]]]
) -> list[list[list[Any]]]:
    """The rounds of each side, in parts that take turns: the machine's pace changes within a round."""
    out: list[list[list[Any]]] = [[[] for _ in range(bench.rounds)] for _ in sides]
    for number in range(bench.rounds):
        bench.step(f"{name} {number + 1}")
        for _ in range(PARTS):
            for rounds, measure in zip(out, sides, strict=True):
                rounds[number] += await measure(bench)
    return out


async def run(bench: Bench) -> list[Row]:
    """Raw and ours, so that both meet the same noise."""
    theirs, mine = await in_turns(bench, "pickup", measure_raw, measure_ours)
    return latencies("pickup", theirs, mine, "times raw", "; insert in another process, claim by id")


if __name__ == "__main__":
    produce(*sys.argv[1:])
