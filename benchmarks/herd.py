"""Herd: what one insert costs when 1, 8 or 64 runners listen, who gets it, and how soon.

The runners live in up to three processes; each has a stream and a lease of its own. Claims are those that runners
tried (the event ``claim``), events are those that the server delivered to their streams (replies to getMore).
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

from bson import ObjectId
from pymongo import AsyncMongoClient, monitoring

from benchmarks import raw
from benchmarks.bench import Bench
from benchmarks.rows import LESS, MORE, Row, percentile
from streamjobs import Queue, clock, subscribe
from streamjobs.runner.slots import COUNT

PROCESSES, WARM = 3, 5
PAUSE = 0.1  # seconds after which nothing is left of a job: its outcome has woken all streams, its watcher has looked


# ---- a process of runners


class Delivered(monitoring.CommandListener):
    """Counts the events about jobs that streams were given."""

    def __init__(self) -> None:
        self.count = 0

    def started(self, event: monitoring.CommandStartedEvent) -> None:
        pass

    def failed(self, event: monitoring.CommandFailedEvent) -> None:
        pass

    def succeeded(self, event: monitoring.CommandSucceededEvent) -> None:
        if event.command_name == "getMore":
            for change in event.reply.get("cursor", {}).get("nextBatch", ()):
                key = change.get("documentKey") or {}
                self.count += "operationType" in change and isinstance(key.get("_id"), ObjectId)


async def host(uri: str, namespace: str, first: int, count: int, settings: dict[str, float]) -> None:
    """So many runners, until stdin ends; each line of it asks what was counted since the last one.

    A job whose data has ``hold`` is held for so many seconds by its first try.
    """
    delivered, asked = Delivered(), 0
    monitoring.register(delivered)

    def listen(name: str, _level: str, fields: dict[str, Any]) -> None:
        nonlocal asked
        if name == "claim":
            asked += fields["asked"]

    async def runner(number: int) -> None:
        jobs = await stack.enter_async_context(Queue(uri, namespace))

        @jobs.handler("bench")
        async def handler(job: Any) -> None:
            print(
                json.dumps({"job": str(job.id), "at": clock.boot(), "runner": number, "try": job.number}),
                flush=True,
            )
            if job.number == 1 and "hold" in job.data:
                await asyncio.sleep(job.data["hold"])

        await stack.enter_async_context(jobs.running(f"herd-{number}", stop_deadline=1, **settings))

    loop = asyncio.get_running_loop()
    async with AsyncExitStack() as stack:
        stack.enter_context(subscribe(listen))
        for number in range(first, first + count):
            await runner(number)
        print(json.dumps({"ready": count}), flush=True)
        while await loop.run_in_executor(None, sys.stdin.readline):
            print(json.dumps({"claims": asked, "events": delivered.count}), flush=True)
            asked = delivered.count = 0


async def raw_host(uri: str, namespace: str, first: int, count: int, total: int) -> None:
    """The same with the raw driver: so many of ``total`` loops, each with a stream of its own part of the ids."""
    loop = asyncio.get_running_loop()
    database, _, name = namespace.partition(".")
    async with AsyncMongoClient(uri, tz_aware=True, w="majority") as client:
        claim = await raw.faster_claim(client[database]["probe"])

    async def one(number: int, ready: asyncio.Event) -> None:
        finishing: set[asyncio.Task[None]] = set()

        def claimed(id_: Any) -> None:
            print(json.dumps({"job": str(id_), "at": clock.boot(), "runner": number, "try": 1}), flush=True)
            task = loop.create_task(raw.finish(jobs, id_))
            finishing.add(task)
            task.add_done_callback(finishing.discard)

        async with AsyncMongoClient(uri, tz_aware=True, w="majority") as client:
            jobs = client[database][name]
            slots = range(number * COUNT // total, (number + 1) * COUNT // total)
            await raw.listen(jobs, claim, ready, claimed, slots)

    tasks = []
    for number in range(first, first + count):
        ready = asyncio.Event()
        tasks.append(loop.create_task(one(number, ready)))
        await ready.wait()
    print(json.dumps({"ready": count}), flush=True)
    while await loop.run_in_executor(None, sys.stdin.readline):
        print(json.dumps({"claims": 0, "events": 0}), flush=True)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


HOSTS = {"runners": host, "raw": raw_host}

# ---- the fleet as the benchmark sees it


class Fleet:
    """Processes of runners on one collection."""

    def __init__(self, jobs: Any) -> None:
        self.jobs = jobs
        self.processes: list[asyncio.subprocess.Process] = []
        self.told: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._readers: list[asyncio.Task[None]] = []

    async def add(self, sort: str, *arguments: Any) -> None:
        """Another process of a sort, one of HOSTS, with its arguments."""
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "benchmarks.herd", sort, *map(json.dumps, arguments),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        self.processes.append(process)
        self._readers.append(asyncio.create_task(self._read(process)))

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        async for line in process.stdout:
            self.told.put_nowait(json.loads(line))

    async def next(self, key: str) -> dict[str, Any]:
        """The next line that has this key."""
        while key not in (line := await asyncio.wait_for(self.told.get(), 120)):
            pass
        return line

    async def one(self) -> float:
        """Insert a job; seconds until its handler's first line."""
        document = raw.document()
        began = clock.boot()
        await self.jobs.insert_one(document)
        line = await self.next("job")
        assert line["job"] == str(document["_id"])
        return line["at"] - began

    async def singles(self, count: int) -> list[float]:
        """So many inserts, each into an idle fleet."""
        latencies = []
        for _ in range(count):
            latencies.append(await self.one())
            await asyncio.sleep(PAUSE)
        return latencies

    async def quiet(self) -> None:
        """Until every outcome is written and what the others still try is over."""
        # asked, not listened for: a stream of the benchmark's own would be one more in what is measured
        while await self.jobs.count_documents({"kind": "bench", "status": {"$ne": 4}}):  # noqa: ASYNC110
            await asyncio.sleep(PAUSE)
        await asyncio.sleep(0.3)

    async def counted(self) -> tuple[int, int]:
        """Claims tried and events delivered since the last time."""
        await self.quiet()
        claims = events = 0
        for process in self.processes:
            process.stdin.write(b"\n")
            line = await self.next("claims")
            claims, events = claims + line["claims"], events + line["events"]
        return claims, events

    async def wave(self, count: int) -> Counter[int]:
        """Insert so many at once; who ran how many."""
        await self.jobs.insert_many([raw.document() for _ in range(count)])
        return Counter([(await self.next("job"))["runner"] for _ in range(count)])

    async def end(self) -> None:
        for process in self.processes:
            process.stdin.close()
        for process in self.processes:
            with suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), 30)
            if process.returncode is None:
                process.kill()
                await process.wait()
        await asyncio.wait(self._readers)


@asynccontextmanager
async def fleet(
    bench: Bench, runners: int, processes: int = PROCESSES, *, theirs: bool = False, **settings: float
) -> AsyncIterator[Fleet]:
    """Runners that are all up and warm, in so many processes at most; or raw loops that share the ids."""
    namespace = bench.fresh()
    async with Queue(bench.uri, namespace) as jobs:
        await jobs.create_indexes()
    client, collection = bench.raw(namespace)
    one = Fleet(collection)
    try:
        sort, last = ("raw", runners) if theirs else ("runners", settings)
        shares = [len(range(part, runners, processes)) for part in range(min(processes, runners))]
        for part, share in enumerate(shares):
            await one.add(sort, bench.uri, namespace, sum(shares[:part]), share, last)
        for _ in shares:
            await one.next("ready")
        for _ in range(WARM):
            await one.one()
        await one.counted()
        yield one
    finally:
        await one.end()
        await client.close()


async def measure(bench: Bench, runners: int) -> dict[str, list[float]]:
    """By round: p50 and p99 of pickup, claims and events per job; of all: least and greatest share of a runner."""
    out: dict[str, list[float]] = {name: [] for name in ("p50", "p99", "claims", "events")}
    ran: Counter[int] = Counter()  # over all rounds: with few jobs to a runner, chance alone is unfair
    samples, waves = bench.of(40, 20), bench.of(8, 4)
    async with fleet(bench, runners) as one:
        for number in range(bench.rounds):
            bench.step(f"{runners} runners, round {number + 1}")
            latencies = await one.singles(samples)
            claims, events = await one.counted()
            out["p50"].append(percentile(latencies, 0.5))
            out["p99"].append(percentile(latencies, 0.99))
            out["claims"].append(claims / samples)
            out["events"].append(events / samples)
            for _ in range(waves):
                ran += await one.wave(runners)
                await one.quiet()
            while any(
                await one.counted()
            ):  # what the waves cost, some of it late, is not what a single insert does
                pass
    shares = [ran[number] / (waves * bench.rounds) for number in range(runners)]
    return {**out, "least": [min(shares)], "most": [max(shares)]}


async def measure_raw(bench: Bench, runners: int) -> list[float]:
    """By round: p50 of pickup by as many raw loops that share the ids, without a watcher or anything else."""
    out = []
    async with fleet(bench, runners, theirs=True) as one:
        for number in range(bench.rounds):
            bench.step(f"{runners} raw loops, round {number + 1}")
            out.append(percentile(await one.singles(bench.of(40, 20)), 0.5))
    return out


async def run(bench: Bench) -> list[Row]:
    """One runner, eight, sixty-four."""
    alone = await measure(bench, 1)
    rows = []
    for runners in (8,) if bench.short else (8, 64):
        theirs = await measure_raw(bench, runners)
        many = await measure(bench, runners)
        name = f"herd_{runners}"
        what = f"{runners} runners in {min(PROCESSES, runners)} processes, single inserts into an idle fleet"
        rows += [
            Row.of(f"{name}_{figure}", many[figure], f"{figure} per job, {LESS}", what)
            for figure in ("claims", "events")
        ]
        for figure in ("p50", "p99"):
            pairs = [a / b for a, b in zip(many[figure], alone[figure], strict=True)]
            ms = percentile(many[figure], 0.5) * 1000
            rows.append(
                Row.of(f"{name}_pickup_{figure}", pairs, f"times one runner, {LESS}", f"{ms:.1f} ms; {what}")
            )
        pairs = [a / b for a, b in zip(many["p50"], theirs, strict=True)]
        caveat = f"{percentile(theirs, 0.5) * 1000:.1f} ms; as many raw streams in as many processes, each with its part of the ids"
        rows.append(Row.of(f"{name}_pickup_raw", pairs, f"times raw loops, {LESS}", caveat))
        waves = f"of an equal share; waves of {runners} jobs, 10 slots each, {bench.of(8, 4) * bench.rounds} jobs to a runner"
        rows.append(Row.of(f"{name}_least", many["least"], f"share of the idlest, {MORE}", waves))
        rows.append(Row.of(f"{name}_most", many["most"], f"share of the busiest, {LESS}", waves))
    return rows


if __name__ == "__main__":
    asyncio.run(HOSTS[sys.argv[1]](*map(json.loads, sys.argv[2:])))
