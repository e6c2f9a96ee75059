"""Two hundred kinds in one collection, ten of them busy: what a runner that serves all asks the server."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import pytest
from pymongo import monitoring

from streamjobs import Queue
from streamjobs.clock import boot
from tests.crew import document

KINDS = [f"kind{number:03}" for number in range(200)]
BUSY = KINDS[::20]


class Queries(monitoring.CommandListener):
    """When jobs were asked for, and of which kind."""

    def __init__(self):
        self.asked: list[tuple[float, str | None]] = []
        self.changed = asyncio.Event()

    def started(self, event):
        command = event.command
        record = command.get("filter") == {"control": "runner"}
        stream = "$changeStream" in str(command.get("pipeline", [{}])[:1])
        if event.command_name in ("find", "aggregate") and not record and not stream:
            self.asked.append((boot(), command.get("filter", {}).get("kind")))
            self.changed.set()

    def succeeded(self, event): ...
    def failed(self, event): ...


@asynccontextmanager
async def serving(uri, namespace, mine, monkeypatch, **settings):
    """A runner of all kinds that has read them all."""
    monkeypatch.setattr("streamjobs.runner.runner._UNDER_WAY", 0.0)  # the second read of a start: at once
    queries = Queries()

    def connect(cls, **options):
        return cls(uri, event_listeners=[queries], **options)

    queue = Queue(mine, connect=connect)
    for kind in KINDS:
        queue.handler(kind)(lambda job: None)
    await queue.create_indexes()
    async with queue.running("all", lease=20, beat=5, **settings) as runner:
        async with asyncio.timeout(60):
            ranges = [each for kind in runner._backlog._ranges.values() for each in kind]
            while any(each.unread or each.reading for each in ranges):
                await asyncio.sleep(0.02)
        queries.asked.clear()
        yield queries, runner


async def test_a_wake_costs_no_query(uri, namespace, mine, seen, monkeypatch):
    async with serving(uri, namespace, mine, monkeypatch, interval=600) as (queries, runner):
        runner._waker.restart_next = lambda: None  # every three seconds the fallback reads one of them
        queries.asked.clear()
        for number in range(30):
            one = document(BUSY[number % len(BUSY)])
            await mine.insert_one(one)
            await seen.wait("try", job=one["_id"], outcome="success")
        assert queries.asked == []


@pytest.mark.timeout(180)
async def test_the_reads_of_a_fallback_are_spread_over_its_period(uri, namespace, mine, monkeypatch):
    """Guard: the sleep between two kinds in Runner._fallback. Without it all are read at once."""
    period = 5.0
    async with serving(uri, namespace, mine, monkeypatch, interval=period) as (queries, _):
        began = boot()
        async with asyncio.timeout(120):
            while len(first := _first(queries, began)) < len(KINDS):
                queries.changed.clear()
                await queries.changed.wait()
    times = sorted(first.values())
    for place, at in enumerate(times):
        # a sleep is never too short, however busy the machine; the first read may have been held up
        assert at - times[0] >= place * period / len(KINDS) - 1.0, place


def _first(queries: Queries, began: float) -> dict[str, float]:
    """When each kind was first asked for."""
    out: dict[str, float] = {}
    for at, kind in queries.asked:
        if kind is not None and at >= began:
            out.setdefault(kind, at)
    return out
