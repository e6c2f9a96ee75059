"""Local: from a put in the runner's own process to the handler's first line, beside raw pickup from another process."""

from __future__ import annotations

import asyncio
from typing import Any

from benchmarks import pickup
from benchmarks.bench import Bench
from benchmarks.rows import Row, latencies
from streamjobs import Queue, clock


async def ours(bench: Bench) -> tuple[list[float], list[float]]:
    """Latencies in seconds: from the call of put, and from its return, when the job is acknowledged."""
    async with Queue(bench.uri, bench.fresh()) as jobs:
        await jobs.create_indexes()
        begun: asyncio.Queue[float] = asyncio.Queue()

        @jobs.handler("bench")
        async def handler(job: Any) -> None:
            begun.put_nowait(clock.boot())

        async def sample() -> tuple[float, float]:
            called = clock.boot()
            await jobs.put("bench", retries=5)
            acknowledged = clock.boot()
            at = await asyncio.wait_for(begun.get(), 10)
            await asyncio.sleep(pickup.PAUSE)
            return at - called, at - acknowledged

        async with jobs.running("bench"):
            for _ in range(pickup.WARM):
                await sample()
            taken = [await sample() for _ in range(bench.of(pickup.PER_ROUND, 60))]
            return [one for one, _ in taken], [one for _, one in taken]


async def run(bench: Bench) -> list[Row]:
    """Rounds in turn."""
    theirs, called, acknowledged = [], [], []
    for number in range(bench.rounds):
        bench.step(f"local {number + 1}, raw pickup")
        theirs.append(await pickup.measure_raw(bench))
        bench.step(f"local {number + 1}")
        for kept, one in zip((called, acknowledged), await ours(bench), strict=True):
            kept.append(one)
    caveat = "; raw is woken by an insert in another process, its insert included"
    return [
        *latencies("local", theirs, called, "times raw pickup", f"{caveat}, as is the put's own here"),
        *latencies(
            "local_acked", theirs, acknowledged, "times raw pickup", f" after the put returned{caveat}"
        ),
    ]
