"""Killed: one of four processes with eight runners each, at once, under load; what that costs the jobs.

Which slots have lost their holder or watcher is what the runners' own records and their own assignment say.
"""

from __future__ import annotations

import asyncio
from typing import Any

from benchmarks import raw
from benchmarks.bench import Bench
from benchmarks.herd import Fleet, fleet
from benchmarks.rows import LESS, Row, percentile
from streamjobs import clock
from streamjobs.runner.slots import assign, slot_of

PROCESSES, EACH = 4, 8
LEASE = {"lease": 10.0, "beat": 2.0, "margin": 1.0}
HELD = 128  # in hand when it happens, spread over all
RATE = 50.0  # jobs a second
BEFORE, AFTER = 2.0, LEASE["lease"] + 2.0  # seconds of load
#: Seconds after which no runner listens to slots that it has lost.
SETTLED = LEASE["beat"] + LEASE["margin"] + 1.0
BOUND = 0.1


async def measure(bench: Bench, number: int) -> dict[str, float]:
    """One round: how late new jobs began and held ones were back, each as a part of its bound."""
    bench.step(f"round {number}: {PROCESSES * EACH} runners come")
    async with fleet(bench, PROCESSES * EACH, PROCESSES, **LEASE) as one:
        await asyncio.sleep(SETTLED)
        bench.step(f"round {number}: killed")
        return await _round(one, one.jobs)


async def _round(one: Fleet, collection: Any) -> dict[str, float]:
    held = [{**raw.document(), "data": {"hold": 3600.0}} for _ in range(HELD)]
    await collection.insert_many(held)
    where = {}
    for _ in held:
        line = await one.next("job")
        where[line["job"]] = line["runner"]
    records = [record async for record in collection.find({"control": "runner"})]
    victim = one.processes[-1]
    dead = {record["_id"].removeprefix("runner:") for record in records if record["pid"] == victim.pid}
    dealt = assign({record["_id"].removeprefix("runner:"): record["slots"] for record in records})
    orphans = {slot for slot, pair in dealt.items() if dead.issuperset(pair)}
    put: dict[str, tuple[float, bool, bool]] = {}

    async def load(seconds: float, *, after: bool) -> None:
        began = clock.boot()
        for count in range(int(seconds * RATE)):
            await asyncio.sleep(began + count / RATE - clock.boot())
            document = raw.document()
            put[str(document["_id"])] = (clock.boot(), after, slot_of(document["_id"]) in orphans)
            await collection.insert_one(document)

    await load(BEFORE, after=False)
    await asyncio.sleep(0.5)  # what these began is not what dies
    victim.kill()
    at = clock.boot()
    await load(AFTER, after=True)
    theirs = {job for job, runner in where.items() if runner >= (PROCESSES - 1) * EACH}
    began, back = dict[str, float](), dict[str, float]()
    while not (put.keys() <= began.keys() and theirs <= back.keys()):
        line = await one.next("job")
        if line["job"] in theirs and line["try"] > 1:
            back[line["job"]] = line["at"] - at
        began.setdefault(line["job"], line["at"])
    waits = {
        orphaned: [
            began[job] - since for job, (since, after, lost) in put.items() if after and lost == orphaned
        ]
        for orphaned in (False, True)
    }
    bound = LEASE["lease"] + 1.0
    return {
        "p50": percentile(waits[False], 0.5) / BOUND,
        "p99": percentile(waits[False], 0.99) / BOUND,
        "orphaned": max(waits[True], default=0.0) / bound,
        "back": max(back.values(), default=0.0) / bound,
    }


async def run(bench: Bench) -> list[Row]:
    """Three rounds."""
    rounds = [await measure(bench, number + 1) for number in range(bench.of(3, 1))]
    what = f"a quarter of {PROCESSES * EACH} runners killed at once, {RATE:.0f} jobs/s, a lease of {LEASE['lease']:.0f} s"
    served = f"new jobs in slots whose holder or watcher lives, of {BOUND * 1000:.0f} ms, {LESS}"
    units = {
        "p50": served,
        "p99": served,
        "orphaned": f"the latest new job in a slot whose holder and watcher both died, of lease + 1 s, {LESS}",
        "back": f"the last of the jobs that the dead had in hand, of lease + 1 s, {LESS}",
    }
    return [
        Row.of(f"killed_{name}", [one[name] for one in rounds], unit, what) for name, unit in units.items()
    ]
