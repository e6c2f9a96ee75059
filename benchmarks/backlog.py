"""Backlog: a collection full of jobs that wait, of which few are due; and many that are due at once.

Each measurement is a fresh process, so that its start and its memory are its own. Of many due jobs the first is held
against one raw page of their ids, since some servers read a whole range for any page of it.
"""

from __future__ import annotations

import asyncio
import json
import resource
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from time import perf_counter
from typing import Any

from benchmarks import raw
from benchmarks.bench import Bench
from benchmarks.rows import LESS, Row, percentile
from streamjobs import Queue
from streamjobs.clock import boot

FEW, THOUSAND, CHUNK = 500, 1_000, 10_000


async def work(uri: str, namespace: str, count: int) -> None:
    """Run so many jobs; print seconds from start to the first, from the first to the last, and memory in MB."""
    async with Queue(uri, namespace) as jobs:
        first, left, done = 0.0, count, asyncio.Event()

        @jobs.handler("bench")
        async def handler(job: Any) -> None:
            nonlocal first, left
            first = first or boot()
            left -= 1
            if left == 0:
                done.set()

        began = boot()
        async with jobs.running("bench", stop_deadline=1):
            await done.wait()
            ended = boot()
    print(json.dumps({"first": first - began, "job": (ended - first) / count, "memory": peak()}))


def peak() -> float:
    """The most memory that this process has had, in MB; ``ru_maxrss`` would count what started it, on Linux."""
    status = Path("/proc/self/status")
    if not status.exists():
        return (
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            * (1 if sys.platform == "darwin" else 1024)
            / 1e6
        )
    line = next(line for line in status.read_text("ascii").splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024 / 1e6


async def worked(bench: Bench, namespace: str, count: int) -> dict[str, float]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "benchmarks.backlog", bench.uri, namespace, str(count),
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, _ = await process.communicate()
    assert process.returncode == 0
    return json.loads(out)


async def fill(jobs: Any, count: int, *, ahead: bool) -> None:
    """Put so many jobs, due now or in a day."""
    tomorrow = datetime.now(UTC) + timedelta(days=1)
    for begin in range(0, count, CHUNK):
        many = [raw.document() for _ in range(min(CHUNK, count - begin))]
        for number, one in enumerate(many):
            if ahead:
                one["runat"] = tomorrow + timedelta(milliseconds=begin + number)
        await jobs.insert_many(many)


async def collection(bench: Bench, waiting: int, due: int) -> tuple[str, Any, Any]:
    """A fresh collection with so many of both."""
    namespace = bench.fresh()
    async with Queue(bench.uri, namespace) as jobs:
        await jobs.create_indexes()
    client, mine = bench.raw(namespace)
    await fill(mine, waiting, ahead=True)
    await fill(mine, due, ahead=False)
    return namespace, client, mine


async def raw_page(jobs: Any) -> float:
    """Seconds for one page of the ids of what is due."""
    began = perf_counter()
    async for _ in raw.pages(jobs):
        break
    return perf_counter() - began


async def few_due(bench: Bench) -> list[Row]:
    """Few due among many that wait, beside few due among a thousand."""
    sizes = (THOUSAND, bench.of(bench.waiting, min(bench.waiting, 20_000)))
    told: dict[int, list[dict[str, float]]] = {size: [] for size in sizes}
    places = {}
    for size in sizes:
        bench.step(f"{size} waiting jobs are put")
        places[size] = await collection(bench, size, 0)
    for number in range(bench.rounds):
        for size in sizes:
            bench.step(f"{size} waiting, round {number + 1}")
            namespace, _, jobs = places[size]
            await fill(jobs, FEW, ahead=False)
            told[size].append(await worked(bench, namespace, FEW))
            await jobs.delete_many({"kind": "bench", "status": 4})
    for _, client, _ in places.values():
        await client.close()
    small, large = (told[size] for size in sizes)
    rows = []
    for name, figure, unit, factor in (
        ("backlog_first", "first", "s to the first job", 1),
        ("backlog_job", "job", "ms a job", 1000),
    ):
        pairs = [a[figure] / b[figure] for a, b in zip(large, small, strict=True)]
        value = percentile([one[figure] for one in large], 0.5) * factor
        caveat = f"{value:.2f} {unit}; {sizes[1]} wait, {FEW} are due"
        rows.append(Row.of(name, pairs, f"times a thousand waiting, {LESS}", caveat))
    caveat = f"peak of a process that ran {FEW} jobs, interpreter and driver included; {sizes[1]} wait"
    rows.append(Row.of("backlog_memory", [one["memory"] for one in large], f"MB, {LESS}", caveat))
    return rows


async def many_due(bench: Bench) -> list[Row]:
    """Many due: the first job beside a raw page, and the cost of a job beside that among a thousand due."""
    due = bench.of(20_000, 5_000)
    firsts, costs, pages = [], [], []
    for number in range(bench.rounds):
        bench.step(f"a thousand due, round {number + 1}")
        namespace, client, _ = await collection(bench, 0, THOUSAND)
        small = await worked(bench, namespace, FEW)
        await client.close()
        bench.step(f"{due} due, round {number + 1}")
        namespace, client, jobs = await collection(bench, 0, due)
        pages.append(await raw_page(jobs))
        large = await worked(bench, namespace, FEW)
        await client.close()
        firsts.append(large["first"] / pages[-1])
        costs.append(large["job"] / small["job"])
    what = f"{due} due, {FEW} of them run; a raw page takes {percentile(pages, 0.5) * 1000:.0f} ms"
    return [
        Row.of("backlog_due_first", firsts, f"times one raw page of ids, {LESS}", f"start included; {what}"),
        Row.of("backlog_due_job", costs, f"times a thousand due, {LESS}", what),
    ]


async def run(bench: Bench) -> list[Row]:
    """Both."""
    return await few_due(bench) + await many_due(bench)


if __name__ == "__main__":
    asyncio.run(work(sys.argv[1], sys.argv[2], int(sys.argv[3])))
