"""Local: from a put in the runner's own process to the handler's first line, beside raw pickup from another process."""

from __future__ import annotations

import asyncio
from typing import Any

from benchmarks import pickup
from benchmarks.bench import Bench
from benchmarks.rows import Row, latencies
from streamjobs import Queue, clock


async def ours(bench: Bench) -> list[tuple[float, float]]:
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
            await asyncio.sleep(pickup.SETTLED)
            for _ in range(pickup.WARM):
                await sample()
            return [await sample() for _ in range(bench.of(pickup.PER_PART, 30))]


async def run(bench: Bench) -> list[Row]:
    """Raw pickup and ours in turns."""
    theirs, mine = await pickup.in_turns(bench, "local", pickup.measure_raw, ours)
    called, acknowledged = ([[one[place] for one in taken] for taken in mine] for place in (0, 1))
    caveat = "; raw is woken by an insert in another process, its insert included"
    return [
        *latencies("local", theirs, called, "times raw pickup", f"{caveat}, as is the put's own here"),
        *latencies(
            "local_acked", theirs, acknowledged, "times raw pickup", f" after the put returned{caveat}"
        ),
    ]
