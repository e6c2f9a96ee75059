"""Backlog: a collection full of jobs that wait, or have ended, of which few are due; and many that are due at once.

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
WAITING, FINISHED, DUE = "wait", "have ended", "are due"


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


async def fill(jobs: Any, count: int, state: str) -> list[Any]:
    """Put so many jobs, due now or in a day, or as they are when they have ended; their ids."""
    ids = []
    now = datetime.now(UTC)
    for begin in range(0, count, CHUNK):
        many = [raw.document() for _ in range(min(CHUNK, count - begin))]
        for number, one in enumerate(many):
            if state == WAITING:
                one["runat"] = now + timedelta(days=1, milliseconds=begin + number)
            elif state == FINISHED:
                one |= {"status": 4, "tries": [{"runner": "bench", "when": now}]}
        await jobs.insert_many(many)
        ids += [one["_id"] for one in many]
    return ids


async def collection(bench: Bench, count: int, state: str) -> tuple[str, Any, Any]:
    """A fresh collection with so many jobs in a state."""
    namespace = bench.fresh()
    async with Queue(bench.uri, namespace) as jobs:
        await jobs.create_indexes()
    client, mine = bench.raw(namespace)
    await fill(mine, count, state)
    return namespace, client, mine


async def raw_page(jobs: Any) -> float:
    """Seconds for one page of the ids of what is due."""
    began = perf_counter()
    async for _ in raw.pages(jobs):
        break
    return perf_counter() - began


async def few_due(bench: Bench, name: str, most: int, state: str) -> list[Row]:
    """Few due among many in a state, beside few due among a thousand in it."""
    sizes = (THOUSAND, bench.of(most, min(most, 20_000)))
    told: dict[int, list[dict[str, float]]] = {size: [] for size in sizes}
    places = {}
    for size in sizes:
        bench.step(f"{size} that {state} are put")
        places[size] = await collection(bench, size, state)
    for number in range(bench.rounds):
        for size in sizes:
            bench.step(f"{size} that {state}, round {number + 1}")
            namespace, _, jobs = places[size]
            ids = await fill(jobs, FEW, DUE)
            told[size].append(await worked(bench, namespace, FEW))
            await jobs.delete_many({"_id": {"$in": ids}})
    for _, client, _ in places.values():
        await client.close()
    small, large = (told[size] for size in sizes)
    rows = []
    what = f"{sizes[1]} {state}, {FEW} are due"
    for figure, unit, factor in (("first", "s to the first job", 1), ("job", "ms a job", 1000)):
        pairs = [a[figure] / b[figure] for a, b in zip(large, small, strict=True)]
        value = percentile([one[figure] for one in large], 0.5) * factor
        beside = f"times a thousand that {state}, {LESS}"
        rows.append(Row.of(f"{name}_{figure}", pairs, beside, f"{value:.2f} {unit}; {what}"))
    caveat = f"peak of a process that ran {FEW} jobs, interpreter and driver included; {what}"
    rows.append(Row.of(f"{name}_memory", [one["memory"] for one in large], f"MB, {LESS}", caveat))
    return rows


async def many_due(bench: Bench) -> list[Row]:
    """Many due: the first job beside a raw page, and the cost of a job beside that among a thousand due."""
    due = bench.of(bench.due, min(bench.due, 5_000))
    firsts, costs, pages = [], [], []
    for number in range(bench.rounds):
        bench.step(f"a thousand due, round {number + 1}")
        namespace, client, _ = await collection(bench, THOUSAND, DUE)
        small = await worked(bench, namespace, FEW)
        await client.close()
        bench.step(f"{due} due, round {number + 1}")
        namespace, client, jobs = await collection(bench, due, DUE)
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
    """Many that wait, many that have ended, many that are due."""
    return [
        *await few_due(bench, "backlog", bench.waiting, WAITING),
        *await few_due(bench, "backlog_finished", bench.finished, FINISHED),
        *await many_due(bench),
    ]


if __name__ == "__main__":
    asyncio.run(work(sys.argv[1], sys.argv[2], int(sys.argv[3])))
