"""Herd: many runners, one insert; how many notice it, how many try to claim it, and how long it takes.

Each runner has its own stream; a few processes hold them all, another inserts, one job at a time.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from pymongo import AsyncMongoClient

from benchmarks import raw
from benchmarks.pickup import Samples, producer
from benchmarks.rows import Row, percentile
from streamjobs import Queue, clock, events
from streamjobs.runner import slots

RUNNERS, PROCESSES, ROUNDS, JOBS, WARM = 64, 4, 3, 512, 30
#: Leases that outlive a start of this many runners on a small machine; a fallback that stays out of the way.
SETTINGS = {"lease": 120, "beat": 10, "margin": 2, "interval": 600, "concurrency": 10, "stop_deadline": 5}
#: Leases that a benchmark can wait for.
QUICK = {**SETTINGS, "lease": 6, "beat": 1, "margin": 1}


async def work(uri: str, namespace: str, count: int) -> None:
    """The process of some runners: says when each job's handler begins, and on a line of input what it cost."""
    asked, told, ran = 0, 0, Counter[str]()

    def listen(name: str, _level: str, fields: dict[str, Any]) -> None:
        nonlocal asked
        if name == "claim":
            asked += fields["asked"]
        elif name == "try.started":
            ran[fields["owner"]] += 1

    async with AsyncExitStack() as stack:
        jobs = await stack.enter_async_context(Queue(uri, namespace))

        @jobs.handler("bench")
        async def bench(job: Any) -> None:
            print(f"begun {job.id} {clock.boot()}", flush=True)

        stack.enter_context(events.subscribe(listen))
        runners = [await stack.enter_async_context(jobs.running(f"r{n}", **SETTINGS)) for n in range(count)]
        for runner in runners:
            inner = runner._waker.change

            def change(id_: Any, one: dict[str, Any], inner: Any = inner) -> None:
                nonlocal told
                told += 1
                inner(id_, one)

            runner._waker.change = change
        print("ready", flush=True)
        reader = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
        )
        while line := (await reader.readline()).decode().strip():
            if line == "agreed":
                shares = [runner._fleet._shares["bench"] for runner in runners]
                print(f"agreed {sum(len(one.holds or ()) for one in shares)}", flush=True)
            elif line == "clear":
                asked, told = 0, 0
                ran.clear()
            else:
                owners = {runner.owner: ran[runner.owner] for runner in runners}
                print("cost " + json.dumps({"asked": asked, "told": told, "ran": owners}), flush=True)


class Herd:
    """The processes of the runners."""

    def __init__(self, samples: Any) -> None:
        self._samples = samples
        self._processes: list[asyncio.subprocess.Process] = []
        self._said: asyncio.Queue[str] = asyncio.Queue()
        self._readers: list[asyncio.Task[None]] = []

    async def start(self, uri: str, namespace: str, counts: list[int], mode: str) -> None:
        for count in counts:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "benchmarks.herd", uri, namespace, str(count), mode,
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
            )  # fmt: skip
            self._processes.append(process)
            self._readers.append(asyncio.create_task(self._read(process)))
        for _ in counts:
            assert await asyncio.wait_for(self._said.get(), 120) == "ready"

    @property
    def first(self) -> int:
        """The process that :meth:`kill` would kill."""
        return self._processes[0].pid

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        while line := (await process.stdout.readline()).decode().strip():
            if line.startswith("begun "):
                _, id_, at = line.split()
                self._samples.begun_at(id_, float(at))
            else:
                self._said.put_nowait(line)

    async def ask(self, what: str) -> list[str]:
        for process in self._processes:
            process.stdin.write(what.encode() + b"\n")
        return [(await asyncio.wait_for(self._said.get(), 60)).partition(" ")[2] for _ in self._processes]

    async def tell(self, what: str) -> None:
        for process in self._processes:
            process.stdin.write(what.encode() + b"\n")

    async def agreed(self) -> None:
        """Wait until each slot has one holder, in the runners' own eyes."""
        async with asyncio.timeout(60):
            while sum(int(one) for one in await self.ask("agreed")) != slots.COUNT:  # noqa: ASYNC110
                await asyncio.sleep(0.25)

    def kill(self) -> None:
        """Kill the first of the processes; nobody says goodbye."""
        self._processes.pop(0).kill()

    async def stop(self) -> None:
        for process in self._processes:
            process.stdin.close()
        for process in self._processes:
            await process.wait()
        for reader in self._readers:
            await reader


@asynccontextmanager
async def herd(
    uri: str, namespace: str, runners: int, processes: int, mode: str
) -> AsyncIterator[tuple[Herd, Samples]]:
    async with Queue(uri, namespace) as queue:
        await queue.create_indexes()
    making = await producer(uri, namespace)
    samples = Samples(making)
    one = Herd(samples)
    each, more = divmod(runners, processes)
    try:
        await one.start(uri, namespace, [each + (n < more) for n in range(processes)], mode)
        if mode != "all" and runners > (1 if mode == "slots-always" else slots.HANDFUL):
            await one.agreed()
            await asyncio.sleep(SETTINGS["beat"] + SETTINGS["margin"] + 1)  # what was lost is heard no longer
        yield one, samples
    finally:
        await one.stop()
        making.stdin.close()
        await making.wait()


async def measure(
    uri: str, namespace: str, runners: int, processes: int, mode: str, jobs: int
) -> dict[str, Any]:
    """Latencies of so many inserts, and what they cost in all."""
    async with herd(uri, namespace, runners, processes, mode) as (one, samples):
        await samples.take(WARM)
        await one.tell("clear")
        latencies = await samples.take(jobs)
        await asyncio.sleep(0.3)  # the watchers' looks
        costs = [json.loads(line) for line in await one.ask("cost")]
    ran = [count for cost in costs for count in cost["ran"].values()]
    return {
        "p50": percentile(latencies, 0.5), "p99": percentile(latencies, 0.99),
        "asked": sum(cost["asked"] for cost in costs) / jobs, "told": sum(cost["told"] for cost in costs) / jobs,
        "least": min(ran) * len(ran) / jobs, "most": max(ran) * len(ran) / jobs,
    }  # fmt: skip


async def run(uri: str, fresh: Any) -> list[Row]:
    """One runner, and many, in turn."""
    ones, many = [], []
    for _ in range(ROUNDS):
        ones.append(await measure(uri, fresh(), 1, 1, "slots", JOBS))
        many.append(await measure(uri, fresh(), RUNNERS, PROCESSES, "slots", JOBS))
    what = f"{RUNNERS} runners in {PROCESSES} processes"
    ms = percentile([one["p50"] for one in many], 0.5) * 1000
    pairs = [m["p50"] / o["p50"] for m, o in zip(many, ones, strict=True)]
    return [
        Row.of("herd_pickup_p50", pairs, "times one runner, less is better", f"{what}: {ms:.2f} ms"),
        Row.of("herd_claims", [one["asked"] for one in many], "tried for each job, less is better", what),
        Row.of("herd_events", [one["told"] for one in many], "delivered for each job, less is better", what),
        Row.of("herd_least", [one["least"] for one in many], "of a fair share, more is better", what),
        Row.of("herd_most", [one["most"] for one in many], "of a fair share, less is better", what),
    ]


class Late:
    """How late each job began, by its insert's moment."""

    def __init__(self) -> None:
        self.put: dict[str, float] = {}
        self.begun: dict[str, float] = {}

    def begun_at(self, id_: str, at: float) -> None:
        self.begun.setdefault(id_, at)


async def killed(uri: str, fresh: Any) -> list[Row]:
    """A quarter of 32 runners is killed at once under load: who waits, and how long."""
    namespace = fresh()
    database, _, name = namespace.partition(".")
    async with Queue(uri, namespace) as queue:
        await queue.create_indexes()
    late = Late()
    crew = Herd(late)
    client: AsyncMongoClient[Any] = AsyncMongoClient(uri, w="majority")
    jobs, lease = client[database][name], QUICK["lease"]
    try:
        await crew.start(uri, namespace, [8, 8, 8, 8], "quick")
        await crew.agreed()
        await asyncio.sleep(QUICK["beat"] + QUICK["margin"] + 1)
        dealt = slots.assign(dict.fromkeys(await _owners(jobs), QUICK["concurrency"]))
        gone = {owner for owner in await _owners(jobs) if f":{crew.first}:" in owner}
        assert len(gone) == 8
        began, at = clock.boot(), 0.0
        while clock.boot() - began < 3 * lease:
            if not at and clock.boot() - began > lease / 2:
                crew.kill()
                at = clock.boot()
            one = raw.document()
            late.put[str(one["_id"])] = clock.boot()
            await jobs.insert_one(one)
            await asyncio.sleep(0.01)
        async with asyncio.timeout(SETTINGS["interval"]):
            while len(late.begun) < len(late.put):  # noqa: ASYNC110
                await asyncio.sleep(0.1)
    finally:
        await crew.stop()
        await client.close()
    served: list[float] = []
    orphaned = [0.0]
    for id_, put in late.put.items():
        pair = dealt[int(id_[-2:], 16)]
        took = late.begun[id_] - put
        if put > at and not set(pair) <= gone:
            served.append(took)
        else:
            orphaned.append(late.begun[id_] - max(put, at))
    what = f"of 32 runners 8 were killed, lease {lease:g} s"
    return [
        Row.of(
            "killed_served", [percentile(served, 0.99) / 0.1], "of 100 ms, p99 where one of two lives", what
        ),
        Row.of(
            "killed_orphaned", [max(orphaned) / (lease + 1)], "of lease + 1 s, the worst of the others", what
        ),
    ]


async def _owners(jobs: Any) -> list[str]:
    return [one["_id"].partition(":")[2] async for one in jobs.find({"control": "runner"}, {"_id": 1})]


if __name__ == "__main__":
    if sys.argv[4] == "quick":
        SETTINGS = QUICK
    if sys.argv[4] == "all":
        slots.HANDFUL = 10_000
    elif sys.argv[4] == "slots-always":
        slots.HANDFUL = 1
    asyncio.run(work(sys.argv[1], sys.argv[2], int(sys.argv[3])))
