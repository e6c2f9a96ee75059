"""Local: from a put in the runner's own process to the handler's first line, beside raw pickup from another process."""

from __future__ import annotations

import asyncio
from typing import Any

from benchmarks import pickup
from benchmarks.bench import Bench
from benchmarks.rows import Row, latencies
from streamjobs import Queue, clock


async def ours(bench: Bench) -> list[float]:
    """Latencies in seconds."""
    async with Queue(bench.uri, bench.fresh()) as jobs:
        await jobs.create_indexes()
        begun: asyncio.Queue[float] = asyncio.Queue()

        @jobs.handler("bench")
        async def handler(job: Any) -> None:
            begun.put_nowait(clock.boot())

        async def sample() -> float:
            began = clock.boot()
            await jobs.put("bench", retries=5)
            latency = await asyncio.wait_for(begun.get(), 10) - began
            await asyncio.sleep(pickup.PAUSE)
            return latency

        async with jobs.running("bench"):
            for _ in range(pickup.WARM):
                await sample()
            return [await sample() for _ in range(bench.of(pickup.PER_ROUND, 60))]


async def run(bench: Bench) -> list[Row]:
    """Rounds in turn."""
    theirs, mine = [], []
    for number in range(bench.rounds):
        bench.step(f"local {number + 1}, raw pickup")
        theirs.append(await pickup.measure_raw(bench))
        bench.step(f"local {number + 1}")
        mine.append(await ours(bench))
    caveat = ", the put's own round trip included; raw is woken by an insert in another process"
    return latencies("local", theirs, mine, "times raw pickup", caveat)
