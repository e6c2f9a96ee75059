"""Idle: what a runner costs that has nothing to do, beside the least that any such runner does.

Both are processes of their own, watched at the same time. The raw one has a change stream that waits 10 s at a time
and one update every 5 s.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from pymongo import AsyncMongoClient, monitoring

from benchmarks.bench import Bench
from benchmarks.rows import LESS, Row
from streamjobs import Queue
from streamjobs.clock import boot

WINDOWS, SETTLE = 5, 3.0  # parts of the time, for the spread; seconds before it begins
BEAT, WAIT_MS = 5.0, 10_000
MB = 1_000_000


class Commands(monitoring.CommandListener):
    """Counts commands by name."""

    def __init__(self) -> None:
        self.names: Counter[str] = Counter()

    def started(self, event: monitoring.CommandStartedEvent) -> None:
        self.names[event.command_name] += 1

    def succeeded(self, event: monitoring.CommandSucceededEvent) -> None:
        pass

    def failed(self, event: monitoring.CommandFailedEvent) -> None:
        pass


def resident() -> float:
    """This process's memory in MB."""
    if not Path("/proc/self/statm").exists():
        return 0.0
    return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * os.sysconf("SC_PAGESIZE") / MB


async def watch(seconds: float, commands: Commands) -> None:
    """Print, as JSON, what this process used in each part of the time, and its memory as it went."""
    await asyncio.sleep(SETTLE)
    commands.names.clear()
    cpu, memory = [], [(boot(), resident())]
    for _ in range(WINDOWS):
        began, until = time.process_time(), boot() + seconds / WINDOWS
        while (left := until - boot()) > 0:
            await asyncio.sleep(min(left, max(1.0, seconds / 50)))
            memory.append((boot(), resident()))
        cpu.append((time.process_time() - began) / (seconds / WINDOWS))
    print(json.dumps({"cpu": cpu, "memory": memory, "commands": commands.names}))


async def raw_runner(uri: str, namespace: str, seconds: float, commands: Commands) -> None:
    database, _, name = namespace.partition(".")
    client: AsyncMongoClient[Any] = AsyncMongoClient(uri, w="majority")
    jobs = client[database][name]
    await jobs.insert_one({"_id": "runner"})

    async def beat() -> None:
        while True:
            await jobs.update_one({"_id": "runner"}, [{"$set": {"seen": "$$NOW"}}])
            await asyncio.sleep(BEAT)

    async def listen() -> None:
        match = {"$match": {"operationType": "insert"}}
        async with await jobs.watch([match], max_await_time_ms=WAIT_MS) as stream:
            while stream.alive:
                await stream.try_next()

    tasks = [asyncio.create_task(beat()), asyncio.create_task(listen())]
    await watch(seconds, commands)
    for task in tasks:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
    await client.close()


async def our_runner(uri: str, namespace: str, seconds: float, commands: Commands) -> None:
    async with Queue(uri, namespace) as jobs:
        await jobs.create_indexes()

        @jobs.handler("bench")
        async def handler(job: Any) -> None:
            pass

        async with jobs.running("bench"):
            await watch(seconds, commands)


async def told(which: str, bench: Bench) -> dict[str, Any]:
    """What one of the two processes used."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "benchmarks.idle", which, bench.uri, bench.fresh(), str(bench.seconds),
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, _ = await process.communicate()
    assert process.returncode == 0
    return json.loads(out)


def slope(points: list[list[float]]) -> float:
    """Least squares: how much the second grows with the first."""
    x = [at for at, _ in points]
    y = [value for _, value in points]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in points) / sum((a - mean_x) ** 2 for a in x)


async def run(bench: Bench) -> list[Row]:
    """Both at once, so that they meet the same noise."""
    bench.step(f"{bench.seconds:.0f} s of idling")
    theirs, mine = await asyncio.gather(told("raw", bench), told("ours", bench))
    share = sum(mine["cpu"]) / WINDOWS
    whole = share / (sum(theirs["cpu"]) / WINDOWS)
    parts = [m / t for m, t in zip(mine["cpu"], theirs["cpu"], strict=True)]
    minutes = bench.seconds / 60
    rates = {name: count / minutes for name, count in mine["commands"].items()}
    by_name = ", ".join(f"{name} {rate:.0f}" for name, rate in sorted(rates.items(), key=lambda one: -one[1]))
    commands = sum(mine["commands"].values()) / sum(theirs["commands"].values())
    growth = slope(mine["memory"]) * 3600
    half = len(mine["memory"]) // 2
    halves = sorted(slope(part) * 3600 for part in (mine["memory"][:half], mine["memory"][half:]))
    last = mine["memory"][-1][1]
    return [
        Row(
            "idle_cpu", round(whole, 3), round(min(parts), 3), round(max(parts), 3),
            f"times raw stream and beat, {LESS}", f"ours {100 * share:.2f} % of a core over {bench.seconds:.0f} s",
        ),
        Row(
            "idle_commands", round(commands, 3), round(commands, 3), round(commands, 3),
            f"times raw stream and beat, {LESS}", f"ours a minute: {by_name}",
        ),
        Row(
            "idle_memory", round(growth, 3), round(halves[0], 3), round(halves[-1], 3), "MB an hour, by slope",
            f"{last:.0f} MB after {bench.seconds:.0f} s; low and high are the halves' slopes",
        ),
    ]  # fmt: skip


async def main() -> None:
    which, uri, namespace, seconds = sys.argv[1:]
    commands = Commands()
    monitoring.register(commands)
    runner = raw_runner if which == "raw" else our_runner
    await runner(uri, namespace, float(seconds), commands)


if __name__ == "__main__":
    asyncio.run(main())
