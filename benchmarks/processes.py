"""Processes: handlers that burn 20 ms of CPU, under ``run --processes 2`` beside ``--processes 1``."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from time import perf_counter

from benchmarks import raw
from benchmarks.bench import Bench
from benchmarks.cpu import BURN
from benchmarks.rows import MORE, Row, percentile
from streamjobs import Queue

WARM = 20


async def until(process: asyncio.subprocess.Process, name: str, count: int) -> None:
    """Until a supervisor's stderr has told of so many such events."""
    while count:
        line = await asyncio.wait_for(process.stderr.readline(), 120)
        assert line, "the supervisor has ended"
        count -= json.loads(line)["event"] == name


async def rate(bench: Bench, processes: int, count: int) -> float:
    """Jobs a second, from the insert to the last outcome."""
    namespace = bench.fresh()
    async with Queue(bench.uri, namespace) as jobs:
        await jobs.create_indexes()
    client, collection = bench.raw(namespace)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "streamjobs", "run", "benchmarks.cpu:jobs", "--processes", str(processes),
        "--uri", bench.uri, "--collection", namespace, "--log", "json", stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        await until(process, "runner.started", processes)
        await collection.insert_many([raw.document() for _ in range(WARM)])
        await until(process, "try", WARM)
        began = perf_counter()
        await collection.insert_many([raw.document() for _ in range(count)])
        await until(process, "try", count)
        took = perf_counter() - began
        process.send_signal(signal.SIGTERM)
        await process.stderr.read()
        assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        await client.close()
    return count / took


async def run(bench: Bench) -> list[Row]:
    """Rounds in turn."""
    count = bench.of(300, 100)
    pairs, one, two = [], [], []
    for number in range(bench.rounds):
        bench.step(f"processes {number + 1}, one")
        one.append(await rate(bench, 1, count))
        bench.step(f"processes {number + 1}, two")
        two.append(await rate(bench, 2, count))
        pairs.append(two[-1] / one[-1])
    caveat = (
        f"{percentile(two, 0.5):.0f} and {percentile(one, 0.5):.0f} jobs/s; {count} sync jobs of {BURN * 1000:.0f} ms CPU; "
        "the server shares the cores"
    )
    return [Row.of("processes", pairs, f"times one process, {MORE}", caveat)]
