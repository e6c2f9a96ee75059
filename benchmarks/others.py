"""Compare: agenda (by polling and by change stream) and mongo-jobs, beside ours on the same server in the same run.

Needs ``node`` and ``npm``, which fetch the packages into a temporary folder. Each system has its own defaults, but ten
jobs at once; a job does nothing. They claim by a sorted findAndModify, which costs the stand-ins the whole range of
what is due, so the drains are small, and only a real server settles them.
"""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from benchmarks import drain, pickup
from benchmarks.bench import Bench
from benchmarks.rows import Row, percentile

PACKAGES = ("agenda@6", "@agendajs/mongo-backend", "@clipboard-health/mongo-jobs@2", "mongodb", "mongoose")
SYSTEMS = ("agenda_stream", "agenda_poll", "mongo_jobs")
RUNNER = Path(__file__).with_name("compare") / "runner.mjs"
ROUNDS, WARM = 3, 1
POLL = 5.0  # seconds: agenda's default


def there() -> bool:
    """Whether Node is."""
    return shutil.which("node") is not None and shutil.which("npm") is not None


async def install(folder: Path) -> str | None:
    """Fetch the packages; their versions, or None if that failed."""
    (folder / "package.json").write_text('{"private": true, "type": "module"}', "utf-8")
    shutil.copy(RUNNER, folder)
    process = await asyncio.create_subprocess_exec(
        "npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "--silent", *PACKAGES, cwd=folder
    )
    if await process.wait():
        return None
    names = ("agenda", "@clipboard-health/mongo-jobs")
    told = [json.loads((folder / "node_modules" / one / "package.json").read_text("utf-8")) for one in names]
    return ", ".join(f"{one['name'].rpartition('/')[2]} {one['version']}" for one in told)


class Process:
    """A process of runner.mjs."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def line(self, key: str) -> dict[str, Any]:
        """The next line that has this key."""
        while True:
            line = await asyncio.wait_for(self._process.stdout.readline(), 60)
            assert line, "it has ended"
            with suppress(ValueError):
                told = json.loads(line)
                if key in told:
                    return told

    def put(self, count: int) -> None:
        """Have it put so many jobs."""
        self._process.stdin.write(f"{count}\n".encode())


@asynccontextmanager
async def node(folder: Path, role: str, which: str, uri: str, database: str) -> AsyncIterator[Process]:
    """A process that is ready."""
    process = await asyncio.create_subprocess_exec(
        "node", "runner.mjs", role, which, uri, database, cwd=folder,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        one = Process(process)
        await one.line("ready")
        yield one
    finally:
        process.stdin.close()
        with suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), 10)
        if process.returncode is None:
            process.kill()
            await process.wait()


async def their_pickup(bench: Bench, folder: Path, which: str, count: int) -> list[float]:
    """Seconds from a put in another process to the handler's first line, one at a time in an idle worker."""
    database = bench.fresh().partition(".")[0]
    out = []
    async with (
        node(folder, "worker", which, bench.uri, database) as worker,
        node(folder, "producer", which, bench.uri, database) as producer,
    ):
        for number in range(WARM + count):
            producer.put(1)
            put = await producer.line("put")
            begun = await worker.line("begun")
            assert begun["begun"] == put["put"] == number
            out.append((begun["at"] - put["at"]) / 1000)
            # a poll is met at any point of its period, not just after it
            pause = random.uniform(0, POLL) if which == "agenda_poll" else pickup.PAUSE
            await asyncio.sleep(pause)
    return out[WARM:]


async def their_drain(bench: Bench, folder: Path, which: str, count: int) -> float:
    """Jobs a second, from the worker's start to the last handler."""
    database = bench.fresh().partition(".")[0]
    async with node(folder, "producer", which, bench.uri, database) as producer:
        producer.put(count)
        for _ in range(count):
            await producer.line("put")
    async with node(folder, "worker", which, bench.uri, database) as worker:
        times = [(await worker.line("begun"))["at"] for _ in range(count)]
    return (count - 1) / ((times[-1] - times[0]) / 1000)


def left_out(why: str) -> list[Row]:
    """No rows, and a word about it."""
    print(f"compare: left out, {why}", file=sys.stderr)
    return []


async def run(bench: Bench) -> list[Row]:
    """Each system's pickup and drain as ratios to ours."""
    if not there():
        return left_out("node and npm are not here")
    count = bench.of(500, 200)
    latencies: dict[str, list[float]] = {one: [] for one in SYSTEMS}
    rates: dict[str, list[float]] = {one: [] for one in SYSTEMS}
    ours, our_rates = [], []
    with tempfile.TemporaryDirectory(prefix="streamjobs-compare-") as name:
        folder = Path(name)
        bench.step("npm install")
        versions = await install(folder)
        if versions is None:
            return left_out("npm could not install them")
        for number in range(ROUNDS):
            bench.step(f"ours, round {number + 1}")
            ours.append(percentile(await pickup.measure_ours(bench), 0.5))
            our_rates.append(await drain.ours(bench, count))
            for one in SYSTEMS:
                bench.step(f"{one}, round {number + 1}")
                samples = 5 if one == "agenda_poll" else bench.of(50, 20)  # seconds each
                latencies[one].append(percentile(await their_pickup(bench, folder, one, samples), 0.5))
                rates[one].append(await their_drain(bench, folder, one, count))
    rows = []
    for one in SYSTEMS:
        pairs = [a / b for a, b in zip(latencies[one], ours, strict=True)]
        ms = percentile(latencies[one], 0.5) * 1000
        rows.append(
            Row.of(
                f"compare_{one}_pickup_p50", pairs, "times ours, more is slower", f"{ms:.1f} ms; {versions}"
            )
        )
    for one in SYSTEMS:
        pairs = [a / b for a, b in zip(rates[one], our_rates, strict=True)]
        rate = percentile(rates[one], 0.5)
        caveat = f"{rate:.0f} jobs/s; {count} no-op jobs, 10 at once; ours with its start and stop"
        rows.append(Row.of(f"compare_{one}_drain", pairs, "times ours, less is slower", caveat))
    return rows
