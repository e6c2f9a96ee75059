"""Waking, timers, order and fairness, and documents that can't be jobs."""

from __future__ import annotations

import asyncio
import threading
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from bson import Int64, ObjectId
from pymongo import AsyncMongoClient, monitoring

from streamjobs import ASAP, Queue, clock
from streamjobs.clients import Source
from streamjobs.handler import Handler
from streamjobs.runner import Runner, claim
from streamjobs.runner.store import Store
from streamjobs.settings import Settings


def document(kind: str = "mail", **more: Any) -> dict[str, Any]:
    return {
        "_id": ObjectId(), "status": 1, "tries": [], "created": datetime.now(UTC), "runat": ASAP, "data": {},
        "retries": 0, "retryinterval": Int64(0), "kind": kind, **more,
    }  # fmt: skip


async def test_a_put_of_another_process_wakes_through_the_stream(queue, raw, seen):
    queue.handler("mail")(lambda job: None)
    async with queue.running("w"):
        raw.insert_one(one := document())
        await seen.wait("try", job=one["_id"], outcome="success", timeout=5)
    assert seen.of("job.woken", job=one["_id"], source="stream")


async def test_a_put_of_the_same_process_wakes_without_the_stream(queue, seen):
    queue.handler("mail")(lambda job: None)
    async with queue.running("w") as runner:
        runner._stream._change = lambda change: None
        for job in (await queue.put("mail"), await asyncio.to_thread(queue.sync.put, "mail")):
            await seen.wait("try", job=job.id)
            assert seen.of("job.woken", job=job.id)[0]["source"] == "put"
    assert all(event["asked"] == event["count"] for event in seen.of("claim"))


async def test_jobs_put_before_the_runner_came_are_found_by_the_catch_up(queue, raw, seen):
    queue.handler("mail")(lambda job: None)
    raw.insert_many([document() for _ in range(25)])
    async with queue.running("w"):
        await seen.wait("try", count=25, outcome="success")


@pytest.mark.parametrize("form", ["update", "replace", "hand", "retry"])
async def test_a_put_back_by_somebody_else_wakes_in_each_form(form, queue, raw, seen):
    """mongod may log one pipeline update as an update or as a replacement; a hand may set the status alone."""
    queue.handler("mail")(lambda job: None)
    raw.insert_one(one := document(status=2))
    wake = {"kind": "mail", "by": "another", "n": 7, "runat": ASAP, "created": one["created"]}
    async with queue.running("w"):
        if form == "update":
            raw.update_one({"_id": one["_id"]}, [{"$set": {"status": 1, "wake": {"$literal": wake}}}])
        elif form == "replace":
            raw.replace_one({"_id": one["_id"]}, {**one, "status": 3, "wake": wake})
        elif form == "hand":
            raw.update_one({"_id": one["_id"]}, {"$set": {"status": 1}})
        else:
            raw.update_one({"_id": one["_id"]}, {"$set": {"status": 5, "wake": wake}})
            outside = Queue(queue._source._connect, queue._source.namespace)
            outside.sync.retry(one["_id"])
            outside.sync.close()
        await seen.wait("try", job=one["_id"], outcome="success", timeout=5)


async def test_a_future_job_runs_on_its_timer_not_before(queue, raw, seen):
    queue.handler("mail")(lambda job: None)
    before = await queue.put("mail", delay=1.0)
    async with queue.running("w"):
        after = await queue.put("mail", delay=0.6)
        raw.insert_one(foreign := document(runat=datetime.now(UTC) + timedelta(seconds=0.8)))
        await seen.wait("try", count=3, outcome="success", timeout=10)
    for id_ in (before.id, after.id, foreign["_id"]):
        (event,) = seen.of("try", job=id_)
        job = await queue.get(id_)
        assert event["started_ms"] >= -1  # the estimate of the server's clock is good to a millisecond here
        assert job.history[0].claimed >= job.runat


@pytest.mark.parametrize("minutes", [5, -5])
async def test_a_host_with_a_wrong_clock_neither_puts_nor_runs_early_or_late(
    minutes, queue, seen, monkeypatch
):
    """Guard: ServerClock; only clock.wall is wrong."""
    real = clock.wall
    monkeypatch.setattr(clock, "wall", lambda: real() + minutes * 60)
    monkeypatch.setattr("streamjobs.job.wall", lambda: real() + minutes * 60)
    monkeypatch.setattr("streamjobs.putting.wall", lambda: real() + minutes * 60)
    queue.handler("mail")(lambda job: None)
    async with queue.running("w"):
        asap, later = await queue.put("mail"), await queue.put("mail", delay=0.5)
        assert abs(asap.created.timestamp() - real()) < 5
        await seen.wait("try", count=2, outcome="success", timeout=10)
    (event,) = seen.of("try", job=later.id)
    assert -1 <= event["started_ms"] < 5_000
    assert abs(event["offset_ms"] + minutes * 60_000) < 5_000
    assert (await queue.get(later.id)).history[0].claimed >= later.runat


async def test_a_claim_before_its_time_is_refused_by_the_server_and_tried_again(queue, seen, monkeypatch):
    """Guard: the due check in the claim's pipeline. The runner's estimate runs ahead by 300 ms."""
    real = clock.ServerClock.now_ms
    queue.handler("mail")(lambda job: None)
    async with queue.running("w"):
        job = await queue.put("mail", delay=0.6)
        monkeypatch.setattr(clock.ServerClock, "now_ms", lambda self: real(self) + 300)
        await seen.wait("try", job=job.id, outcome="success", timeout=10)
    assert any(claim["count"] < claim["asked"] for claim in seen.of("claim"))
    after = await queue.get(job.id)
    assert after.history[0].claimed >= after.runat


async def test_an_idle_runner_does_not_poll(uri, namespace, seen, python_server):
    """One stream wait per its period, the beat, the fallback's reads; nothing else."""
    commands: list[str] = []

    class Count(monitoring.CommandListener):
        def started(self, event):
            commands.append(event.command_name)

        def succeeded(self, event):
            pass

        def failed(self, event):
            pass

    def connect(cls, **options):
        return cls(uri, event_listeners=[Count()], **options)

    async with Queue(uri, namespace) as queue:
        await queue.create_indexes()
    source = Source(AsyncMongoClient(uri)[namespace.partition(".")[0]]["jobs"], None, connect)
    settings = Settings(interval=60, lease=20, beat=2, stream_wait=2)
    runner = Runner("idle", source, {"mail": Handler("mail", lambda job: None)}, settings)
    async with runner.running():
        await seen.wait("runner.started")
        renewed = asyncio.Event()
        turns = 0

        def turn() -> None:
            nonlocal turns
            turns += 1
            renewed.set()

        tell, loop = runner._beat._tell, asyncio.get_running_loop()
        runner._beat._tell = lambda what: (tell(what), loop.call_soon_threadsafe(turn))
        await asyncio.wait_for(renewed.wait(), 10)
        commands.clear()
        turns, began = 0, clock.boot()
        while turns < 3:  # three beats of two seconds
            renewed.clear()
            await asyncio.wait_for(renewed.wait(), 10)
        counted, periods = list(commands), (clock.boot() - began) / 2
    await source._given.database.client.close()
    assert counted.count("update") <= periods + 2
    # The default server's wait may end without a change when a write, as the beat's, comes between.
    woken = counted.count("update") if python_server else 0
    assert counted.count("getMore") <= periods + 2 + woken
    assert set(counted) <= {"update", "getMore", "find", "hello"}
    assert counted.count("find") <= 2


async def test_what_no_event_told_of_is_found_by_the_fallback(queue, raw, seen):
    """Guard: the fallback. The stream is silenced, so only the period finds the job."""
    queue.handler("mail")(lambda job: None)
    async with queue.running("w", interval=0.5) as runner:
        runner._stream._change = lambda change: None
        raw.insert_one(one := document())
        await seen.wait("try", job=one["_id"], outcome="success", timeout=5)


async def test_a_write_under_way_when_the_stream_begins_is_found_though_neither_stream_nor_read_has_it(
    queue, raw, seen, monkeypatch
):
    """Guard: the second read. Its place in the oplog is before the stream's, and it comes to be seen after the read."""
    queue.handler("mail")(lambda job: None)
    raw.insert_one(one := document())
    page, blind = Store.page, 4

    async def read(self, home, until_ms):
        nonlocal blind
        blind -= 1
        return ([], False) if blind >= 0 else await page(self, home, until_ms)

    monkeypatch.setattr(Store, "page", read)
    async with queue.running("w"):
        await seen.wait("try", job=one["_id"], outcome="success", timeout=10)


async def test_polling_by_choice_finds_jobs_without_a_stream(queue, raw, seen):
    queue.handler("mail")(lambda job: None)
    async with queue.running("w", poll=0.3):
        raw.insert_one(one := document())
        await seen.wait("try", job=one["_id"], outcome="success", timeout=5)
    assert not seen.of("stream.state", state="live")


async def test_an_endless_backlog_starves_neither_a_retry_nor_a_delayed_job_nor_another_kind(queue, seen):
    done: dict[str, int] = {}
    stop = asyncio.Event()
    count = 0

    @queue.handler("flood")
    async def flood(job):
        nonlocal count
        count += 1
        if not stop.is_set():
            await queue.put_many([queue.job("flood") for _ in range(2)])

    @queue.handler("flaky", retries=3, retry_interval=0.2)
    async def flaky(job):
        done["flaky"] = count
        if job.number < 3:
            raise ValueError("again")

    @queue.handler("later")
    async def later(job):
        done["later"] = count

    await queue.put_many([queue.job("flood") for _ in range(200)])
    async with queue.running("w", concurrency=4, interval=1.0, stop_deadline=2):
        await seen.wait("try", kind="flood", count=20)
        await queue.put("flaky")
        await queue.put("later", delay=0.5)
        await seen.wait("try", kind="flaky", outcome="success", timeout=20)
        await seen.wait("try", kind="later", outcome="success", timeout=20)
        stop.set()
    assert len(done) == 2


async def test_an_endless_backlog_of_a_kind_does_not_starve_its_own_retry_or_delayed_job(queue, seen):
    stop = asyncio.Event()
    special = []

    @queue.handler("flood", retries=3, retry_interval=0.1)
    async def flood(job):
        if job.data.get("special"):
            special.append(job.number)
            if job.number < 2:
                raise ValueError("again")
        elif not stop.is_set():
            await queue.put_many([queue.job("flood") for _ in range(2)])

    await queue.put_many([queue.job("flood") for _ in range(200)])
    async with queue.running("w", concurrency=4, interval=1.0, stop_deadline=2):
        await seen.wait("try", count=10)
        await queue.put("flood", {"special": True}, delay=0.3)
        await seen.wait("try", number=2, outcome="success", timeout=20)
        stop.set()
    assert special == [1, 2]


async def test_a_producer_whose_clock_is_a_day_behind_is_served_behind_the_cursor(queue, raw, seen):
    gate = asyncio.Event()

    @queue.handler("mail")
    async def mail(job):
        await gate.wait()

    raw.insert_many([document() for _ in range(30)])
    async with queue.running("w", concurrency=2):
        await seen.wait("try.started", count=2)
        raw.insert_one(old := document(created=datetime.now(UTC) - timedelta(days=1)))
        await seen.wait("job.woken", job=old["_id"])
        gate.set()
        await seen.wait("try", count=31, outcome="success")
    order = [fields["job"] for fields in seen.of("try.started")]
    assert order.index(str(old["_id"])) <= 5


async def test_a_backlog_larger_than_a_page_with_one_created_is_run_once_each(
    queue, raw, seen, python_server
):
    count = 300 if python_server else 2_500
    created = datetime.now(UTC)
    ran: list[Any] = []

    @queue.handler("mail")
    async def mail(job):
        ran.append(job.id)

    raw.insert_many([document(created=created) for _ in range(count)])
    async with queue.running("w", concurrency=50):
        await seen.wait("try", count=count, outcome="success", timeout=60)
    assert len(ran) == len(set(ran)) == count


async def test_sync_handlers_run_as_many_at_once_as_there_are_slots(queue, seen):
    together = threading.Barrier(4)
    queue.handler("mail")(lambda job: together.wait(10))
    async with queue.running("w", concurrency=4):
        await queue.put_many([queue.job("mail") for _ in range(4)])
        await seen.wait("try", count=4, outcome="success", timeout=20)


async def test_the_stream_is_read_on_after_the_claim_that_its_event_has_woken(
    uri, namespace, seen, monkeypatch, python_server
):
    """Guard: Claimer.turn. Beside the claim it would take time from it, on the same loop."""
    if python_server:
        pytest.skip(
            "a read ends there without an event, at a write that does not match: the next may meet the claim"
        )
    monkeypatch.setattr("streamjobs.runner.runner._UNDER_WAY", 0.0)  # both reads at once
    monkeypatch.setattr(claim, "_TURN", 5.0)  # a slow server's claim may take longer than it is waited for
    commands: list[str] = []

    class Order(monitoring.CommandListener):
        def started(self, event):
            commands.append(event.command_name)

        def succeeded(self, event):
            commands.append(f"{event.command_name} done")

        def failed(self, event):
            pass

    def connect(cls, **options):
        return cls(uri, event_listeners=[Order()], **options)

    database, _, name = namespace.partition(".")
    async with Queue(uri, namespace) as queue, AsyncMongoClient(uri) as client:
        await queue.create_indexes()
        source = Source(client[database][name], None, connect)
        settings = Settings(interval=60, lease=20, beat=5)
        async with Runner("one", source, {"mail": Handler.of("mail", lambda job: None)}, settings).running():
            for _ in range(8):
                one = document()
                await client[database][name].insert_one(one)
                await seen.wait("try", job=one["_id"], outcome="success")
    claims = [at for at, name in enumerate(commands) if name == "findAndModify"]
    assert len(claims) == 8
    until = [commands[: commands.index("findAndModify done", at)] for at in claims]
    beside = [told.count("getMore") > told.count("getMore done") for told in until]  # the stream's, under way
    assert sum(beside) <= 2  # one may come during each of the two reads at the start, and is claimed after it
