"""Runners that share slots when some are full, poll, or stop."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

import pytest
from pymongo.errors import AutoReconnect

from streamjobs.clock import boot
from streamjobs.runner import fleet
from streamjobs.runner.lease import record_id
from streamjobs.runner.slots import COUNT
from tests.crew import CALM, crew, document, in_slot, stop_for_good

# each change of a fleet opens streams again, and a read that is cancelled now and then leaves its socket to the collector
pytestmark = pytest.mark.usefixtures("driver_litter")


class FailingOnce:
    """A store whose first bulk write fails."""

    def __init__(self, store):
        self._store, self.jobs, self._failed = store, self, False
        self.rows = store.rows

    async def bulk_write(self, writes, **options):
        if not self._failed:
            self._failed = True
            raise AutoReconnect("cut")
        return await self._store.jobs.bulk_write(writes, **options)


@pytest.mark.parametrize("how", ["due", "dated", "claim under way", "write fails"])
async def test_a_full_holder_passes_a_job_on_once_to_one_with_a_free_slot(how, queue, raw, seen, monkeypatch):
    """Guards: Fleet.holding, and Fleet.due for a timer; what waits is kept while a slot seems free, and after an error.

    The watcher is full too, so without them the job waits for a slot or the fallback.
    """
    monkeypatch.setattr(fleet, "WATCH", 20.0)
    go = asyncio.Event()

    @queue.handler("mail")
    async def mail(job):
        if job.data.get("hold"):
            await go.wait()

    async with crew(queue, 6, concurrency=2) as runners:
        holder, watcher = runners.of(40)
        held = [
            document(_id=in_slot(next(iter(one._fleet._shares["mail"].holds))), data={"hold": True})
            for one in (holder, watcher)
            for _ in range(2)
        ]
        for one in held:  # one after the other, so that none of them has to be passed on
            raw.insert_one(one)
            await seen.wait("try.started", job=one["_id"], timeout=30)
        assert {one["owner"] for one in seen.of("try.started")} == {holder.owner, watcher.owner}
        async with asyncio.timeout(30):  # their beats have said so
            while raw.count_documents({"control": "runner", "free": 0}) < 2:
                await asyncio.sleep(0.05)
        holder._fleet._passing._stale = 0.0  # what was read before that is old by now
        more = {}
        if how == "dated":
            more = {"runat": datetime.now(UTC) + timedelta(seconds=1), "status": 3}
        elif how == "claim under way":
            free, real = iter([1, 1]), holder._fleet._free
            holder._fleet._free = lambda: next(free, None) or real()
        elif how == "write fails":
            holder._fleet._passing._store = FailingOnce(holder._store)
        raw.insert_one(one := document(_id=in_slot(40), **more))
        (passed,) = await seen.wait("job.passed", job=one["_id"], timeout=15)
        await seen.wait("try", job=one["_id"], outcome="success", timeout=15)
        assert seen.of("try", job=one["_id"])[0]["owner"] == passed["to"]
        assert passed["owner"] == holder.owner
        assert "passed" not in raw.find_one({"_id": one["_id"]})
        go.set()
        await seen.wait("try", outcome="success", count=5, timeout=30)
    assert len(seen.of("job.passed")) == 1


@pytest.mark.parametrize("known", [True, False], ids=["free ones are known", "records must be read"])
async def test_a_full_watcher_passes_on_what_a_dead_holder_has_left(known, queue, raw, seen):
    """Guards: the holding and the asking in Fleet._look, without which only the fallback finds the job."""
    go = asyncio.Event()

    @queue.handler("mail")
    async def mail(job):
        if job.data.get("hold"):
            await go.wait()

    async with crew(queue, 6, concurrency=2) as runners:
        holder, watcher = runners.of(40)
        slot = next(iter(watcher._fleet._shares["mail"].holds))
        for _ in range(2):
            raw.insert_one(each := document(_id=in_slot(slot), data={"hold": True}))
            await seen.wait("try.started", job=each["_id"], timeout=30)
        assert {one["owner"] for one in seen.of("try.started")} == {watcher.owner}
        stop_for_good(holder)
        holder._fleet._free = lambda: 0  # nor is it one that a job could be passed to
        async with asyncio.timeout(30):
            while holder.owner in (passing := watcher._fleet._passing)._room or not passing._room:
                watcher._sweeper.wake()
                await asyncio.sleep(0.1)
        passing._stale = boot() + 60 if known else 0.0
        raw.insert_one(one := document(_id=in_slot(40)))
        (passed,) = await seen.wait("job.passed", job=one["_id"], timeout=15)
        assert passed["owner"] == watcher.owner
        await seen.wait("try", job=one["_id"], outcome="success", owner=passed["to"], timeout=15)
        go.set()
        await seen.wait("try", outcome="success", count=3, timeout=30)


async def test_a_full_fleet_writes_nothing_and_whoever_gets_a_slot_asks(queue, raw, seen, monkeypatch):
    """Guards: a free slot in the records; Fleet.freed, without which a job waits at its full holder."""
    monkeypatch.setattr(fleet, "WATCH", 20.0)  # each job is its holder's, however busy the machine
    go = asyncio.Event()
    quick = asyncio.Event()

    @queue.handler("mail")
    async def mail(job):
        await (quick if job.data.get("quick") else go).wait()

    async with crew(queue, 6, concurrency=1) as runners:
        holder, _ = runners.of(8)
        for one in runners.runners:
            slot = next(iter(one._fleet._shares["mail"].holds))
            quickly = one is not holder and one is not runners.of(8)[1]
            raw.insert_one(each := document(_id=in_slot(slot), data={"quick": quickly}))
            await seen.wait("try.started", job=each["_id"], timeout=30)
        async with asyncio.timeout(30):  # all beats have said that nobody is free
            while raw.count_documents({"control": "runner", "free": {"$gt": 0}}):
                await asyncio.sleep(0.05)
        holder._fleet._passing._stale = 0.0  # what was read before that is old by now
        waiting = [document(_id=in_slot(8), data={"quick": True}) for _ in range(3)]
        raw.insert_many(waiting)
        reads = []
        real = holder._sweeper.wake
        holder._fleet._passing._sweeper = type(
            "Counting", (), {"wake": lambda _: (reads.append(1), real())}
        )()
        async with asyncio.timeout(30):
            while len(reads) < 2:
                await asyncio.sleep(0.05)
        assert not seen.of("job.passed")
        assert raw.count_documents({"passed": {"$exists": True}}) == 0
        holder._fleet._passing._waiting.clear()  # nor shall the beats tell it of them
        quick.set()  # four slots become free, none of them the holder's or the watcher's
        for one in waiting:
            await seen.wait("try", job=one["_id"], outcome="success", timeout=15)
        go.set()
        await seen.wait("try", outcome="success", count=9, timeout=30)


async def test_a_job_is_passed_on_at_most_once(queue, raw, seen, client, namespace):
    """Guard: the filter of transitions.pass_on."""
    from streamjobs import transitions

    raw.insert_one(one := document())
    first = raw.update_one(*transitions.pass_on(one["_id"], "a", "b", 1))
    second = raw.update_one(*transitions.pass_on(one["_id"], "b", "c", 2))
    assert (first.modified_count, second.modified_count) == (1, 0)
    after = raw.find_one({"_id": one["_id"]})
    assert {key: after["passed"][key] for key in ("kind", "by", "to", "status")} == {
        "kind": "mail", "by": "a", "to": "b", "status": 1,
    }  # fmt: skip
    raw.update_one({"_id": one["_id"]}, {"$set": {"status": 2}, "$unset": {"passed": 1}})
    assert raw.update_one(*transitions.pass_on(one["_id"], "b", "c", 2)).matched_count == 0


async def test_a_job_that_was_cancelled_or_retried_can_be_passed_on_again(raw):
    """Guard: both remove ``passed``; a job that keeps it waits for its holder, however many others are free."""
    from streamjobs import transitions

    raw.insert_one(one := document())
    raw.update_one(*transitions.pass_on(one["_id"], "a", "b", 1))
    raw.update_one(*transitions.cancel(one["_id"], "not now"))
    assert "passed" not in raw.find_one({"_id": one["_id"]})
    raw.update_one(*transitions.retry(one["_id"], "me", 2))
    assert raw.update_one(*transitions.pass_on(one["_id"], "a", "b", 3)).modified_count == 1
    raw.update_one(*transitions.retry(one["_id"], "me", 4))
    assert "passed" not in raw.find_one({"_id": one["_id"]})
    assert raw.update_one(*transitions.pass_on(one["_id"], "a", "c", 5)).modified_count == 1


async def test_a_put_in_the_same_process_costs_no_claim_more(queue, seen):
    """Guard: the slot is asked of a local put too. Taken at once, each costs its holder a lost claim."""
    queue.handler("mail")(lambda job: None)
    async with crew(queue, 6):
        before = len(seen.of("claim"))
        for _ in range(30):
            job = await queue.put("mail")
            await seen.wait("try", job=job.id, outcome="success", timeout=15)
        assert sum(event["asked"] for event in seen.of("claim")[before:]) <= 33


async def test_a_polling_runner_is_given_no_slots_and_takes_what_it_finds(queue, raw, seen):
    queue.handler("mail")(lambda job: None)
    async with crew(queue, 5) as runners, queue.running("polls", **{**CALM, "poll": 0.3}) as polls:
        assert raw.find_one({"_id": record_id(polls.owner)})["away"] == "polling"
        for one in runners.runners:
            one._fleet.seen(await one._store.records())
        assert sum(len(one._fleet._shares["mail"].holds) for one in runners.runners) == COUNT
        raw.insert_one(one := document())
        await seen.wait("try", job=one["_id"], outcome="success", timeout=15)


async def test_a_runner_that_stops_says_so_before_it_drains(queue, raw, seen):
    """Guard: the renewal at the beginning of a stop; its slots move while its handlers end."""
    go = asyncio.Event()

    @queue.handler("mail")
    async def mail(job):
        if job.data.get("hold"):
            await go.wait()

    async with crew(queue, 6, beat=9, margin=0.5) as runners:
        leaver, _ = runners.of(8)
        raw.insert_one(held := document(_id=in_slot(8), data={"hold": True}))
        await seen.wait("try.started", job=held["_id"], timeout=30)
        leaver.stop()
        async with asyncio.timeout(30):
            await runners.agreed()
        assert raw.find_one({"_id": record_id(leaver.owner)})["away"] == "stopping"
        go.set()
        await seen.wait("try", job=held["_id"], outcome="success", timeout=30)


async def test_a_stream_is_read_until_the_one_with_another_filter_is_open(queue, raw, seen, monkeypatch):
    """Guard: the ``beside`` of Stream.reopen, without which the holder is deaf meanwhile and its watcher comes first."""
    monkeypatch.setattr(fleet, "WATCH", 20.0)  # it is the holder's, however busy the machine
    queue.handler("mail")(lambda job: None)
    async with crew(queue, 6) as runners:
        holder, _ = runners.of(40)
        stream, go, asked = holder._stream, asyncio.Event(), asyncio.Event()
        real = stream._collection

        class Slow:
            async def watch(self, *args, **options):
                asked.set()
                await go.wait()
                return await real.watch(*args, **options)

        stream._collection = Slow()
        opening = asyncio.create_task(stream.reopen(quietly=True))
        await asked.wait()
        for _ in range(3):
            raw.insert_one(one := document(_id=in_slot(40)))
            await seen.wait("try", job=one["_id"], outcome="success", owner=holder.owner, timeout=15)
        assert len(stream._readers) == 2
        go.set()
        await opening
        assert len(stream._readers) == 1
        raw.insert_one(one := document(_id=in_slot(40)))
        await seen.wait("try", job=one["_id"], outcome="success", owner=holder.owner, timeout=15)
    assert not seen.of("stream.state", state="gap")
    assert len(seen.of("try")) == 4
