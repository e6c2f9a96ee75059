"""Many runners: an insert is noticed by few and claimed by one, whoever dies, comes, goes or is full."""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from bson import Int64, ObjectId
from pymongo.errors import AutoReconnect

from streamjobs import ASAP
from streamjobs.clock import boot
from streamjobs.runner import fleet
from streamjobs.runner.lease import record_id
from streamjobs.runner.passing import Passing
from streamjobs.runner.slots import COUNT, slot_of
from tests.crew import crew, document, in_slot, stop_for_good

# each change of a fleet opens streams again, and a read that is cancelled now and then leaves its socket to the collector
pytestmark = pytest.mark.usefixtures("driver_litter")


async def test_an_insert_is_noticed_by_two_and_claimed_by_one(queue, raw, seen, monkeypatch, python_server):
    """Guard: the slots in the stream's $match. Without them each of the runners sees and claims each job."""
    monkeypatch.setattr(fleet, "WATCH", 20.0)  # each job is its holder's, however busy the machine
    queue.handler("mail")(lambda job: None)
    async with crew(queue, 7) as runners:
        runners.told.clear()
        before = len(seen.of("claim"))
        documents = [document() for _ in range(30 if python_server else 60)]
        for one in documents:
            raw.insert_one(one)
            await seen.wait("try", job=one["_id"], outcome="success", timeout=15)
        tried = sum(event["asked"] for event in seen.of("claim")[before:])
        assert tried <= 1.25 * len(documents)
        for one in documents:
            await runners.noticed(one["_id"])
            holder, _ = runners.of(slot_of(one["_id"]))
            assert seen.of("try", job=one["_id"])[0]["owner"] == holder.owner
    assert {runners.told[str(one["_id"])] for one in documents} == {2}


async def test_a_burst_is_shared_out_fairly(queue, raw, seen, monkeypatch, python_server):
    """Each gets its slots' part. Guard: the slots are dealt evenly, and each runner takes those it holds."""
    for name in ("WATCH", "ASIDE"):
        monkeypatch.setattr(fleet, name, 60.0)  # each job is its holder's, however busy the machine
    queue.handler("mail")(lambda job: None)
    share = 32 if python_server else 128
    async with crew(queue, 8, concurrency=20) as runners:
        raw.insert_many([document(_id=in_slot(number % COUNT)) for number in range(8 * share)])
        await seen.wait("try", outcome="success", count=8 * share, timeout=60)
        ran = Counter(event["owner"] for event in seen.of("try"))
        assert len(ran) == len(runners.runners)
        assert share / 2 <= min(ran.values()) <= max(ran.values()) <= 2 * share


@pytest.mark.parametrize("slot", [0, 77])
async def test_a_dead_holders_job_is_claimed_by_its_watcher(slot, queue, raw, seen):
    """Guard: Fleet.watch. Without it only the fallback finds the job."""
    queue.handler("mail")(lambda job: None)
    async with crew(queue, 6) as runners:
        holder, watcher = runners.of(slot)
        stop_for_good(holder)
        one = document(_id=in_slot(slot))
        began = boot()
        raw.insert_one(one)
        (event,) = await seen.wait("try", job=one["_id"], outcome="success", timeout=30)
        assert event["owner"] == watcher.owner
        assert fleet.WATCH <= boot() - began < 5
        assert seen.of("job.woken", job=one["_id"], source="look")


async def test_a_look_that_fails_is_done_again(queue, raw, seen):
    """Guard: Fleet._look's except, without which only the fallback is left."""
    queue.handler("mail")(lambda job: None)
    async with crew(queue, 6) as runners:
        holder, watcher = runners.of(7)
        stop_for_good(holder)
        rows, looks, again = watcher._store.rows, 0, asyncio.Event()
        one = document(_id=in_slot(7))

        async def fail_once(ids):
            nonlocal looks
            looks += one["_id"] in ids
            if looks == 1:
                raise AutoReconnect("cut")
            if looks == 2:
                again.set()
            return await rows(ids)

        watcher._store.rows = fail_once
        raw.insert_one(one)
        await asyncio.wait_for(again.wait(), 15)
        await seen.wait("try", job=one["_id"], outcome="success", timeout=15)


async def test_a_full_watcher_whose_slots_become_free_at_once_asks_for_what_it_left_out(
    queue, raw, seen, monkeypatch
):
    """Guard: Fleet._skipped. Outcomes of one write make it free by several slots at a time."""
    monkeypatch.setattr(Passing, "room", False)  # nobody whom it knows of has a free slot
    slot, free = 7, asyncio.Event()

    @queue.handler("mail")
    async def mail(job):
        if job.data.get("waits"):
            await free.wait()

    async with crew(queue, 6) as runners:
        holder, watcher = runners.of(slot)
        stop_for_good(holder)
        home = min(watcher._fleet._shares["mail"].holds)
        while len(seen.of("try.started", owner=watcher.owner)) < 4:  # some may go to that slot's watcher
            raw.insert_one(filling := document(_id=in_slot(home), data={"waits": True}))
            await seen.wait("try.started", job=filling["_id"])
        raw.insert_one(one := document(_id=in_slot(slot)))
        async with asyncio.timeout(20):
            while not watcher._fleet._skipped:
                await asyncio.sleep(0.01)
        free.set()
        (event,) = await seen.wait("try", job=one["_id"], outcome="success", timeout=20)
        assert event["owner"] == watcher.owner


async def test_a_dated_jobs_watcher_looks_after_it_was_due(queue, raw, seen):
    queue.handler("mail")(lambda job: None)
    async with crew(queue, 6) as runners:
        holder, watcher = runners.of(9)
        stop_for_good(holder)
        runat = datetime.now(UTC) + timedelta(seconds=1)
        raw.insert_one(one := document(_id=in_slot(9), runat=runat, status=3))
        (event,) = await seen.wait("try", job=one["_id"], outcome="success", timeout=30)
        assert event["owner"] == watcher.owner
        assert event["started_ms"] >= fleet.WATCH * 1000 - 5


async def test_a_dated_job_that_all_have_read_concerns_the_runners_of_its_slot_alone(queue, raw, seen):
    """Guard: Fleet.sift. Each runner's fallback reads what falls due soon."""
    queue.handler("mail")(lambda job: None)
    async with crew(queue, 6) as runners:
        documents = [document(runat=datetime.now(UTC) + timedelta(seconds=2), status=3) for _ in range(20)]
        raw.insert_many(documents)
        for one in runners.runners:
            one._waker.restart("mail")
        await seen.wait("try", outcome="success", count=20, timeout=15)
        for one in documents:
            holder, watcher = runners.of(slot_of(one["_id"]))
            assert seen.of("try", job=one["_id"])[0]["owner"] in (holder.owner, watcher.owner)


async def test_with_holder_and_watcher_dead_the_fallback_finds_it(queue, raw, seen):
    """Guard: the fallback, which reads whatever slot."""
    queue.handler("mail")(lambda job: None)
    async with crew(queue, 6, interval=3) as runners:
        for one in runners.of(5):
            stop_for_good(one)
        raw.insert_one(one := document(_id=in_slot(5)))
        await seen.wait("try", job=one["_id"], outcome="success", timeout=30)
        assert seen.of("try", job=one["_id"])[0]["owner"] not in {each.owner for each in runners.of(5)}


async def test_a_dead_runners_slots_move_when_its_lease_is_over(queue, raw, seen):
    queue.handler("mail")(lambda job: None)
    async with crew(queue, 7, lease=3, beat=0.5, margin=0.5) as runners:
        holder, watcher = runners.of(5)
        for one in (holder, watcher):
            raw.update_one({"_id": record_id(one.owner)}, {"$set": {"fenced": datetime.now(UTC)}})
            stop_for_good(one)
            one._fleet.seen = lambda records: None
            one._fleet._shares = {"mail": fleet.Share(frozenset(), frozenset())}
            one._beat.now = lambda: None
        live = [one for one in runners.runners if one not in (holder, watcher)]
        for one in live:
            one._sweeper.wake()
        async with asyncio.timeout(30):
            while sum(len(one._fleet._shares["mail"].holds) for one in live) < COUNT:
                await asyncio.sleep(0.02)


async def test_a_slot_that_was_lost_a_while_ago_is_left_to_its_watcher(queue, monkeypatch):
    """Guard: _FRESH. In a fleet that grows the first runners have lost all slots, and took four times their share."""
    queue.handler("mail")(lambda job: None)
    async with crew(queue, 6) as runners:
        one = runners.runners[0]._fleet
        one.seen = lambda records: None
        mine = one._shares["mail"]
        lost = min(mine.holds)
        monkeypatch.setattr(fleet, "_FRESH", 60.0)
        one._take({"mail": fleet.Share(mine.holds - {lost}, mine.watches - {lost})})
        assert lost in one._hears()["mail"]
        assert one.lag("mail", in_slot(lost)) == fleet.WATCH
        monkeypatch.setattr(fleet, "_FRESH", 0.0)
        assert lost in one._hears()["mail"]
        assert one.lag("mail", in_slot(lost)) == fleet.ASIDE
        assert one.lag("mail", in_slot(min(mine.watches - {lost}))) == fleet.WATCH


async def test_slots_gained_while_a_stream_opens_are_read_once_their_own_filter_is_open(queue):
    """Guard: Fleet.heard, which binds what was gained to the filter that has it. Else the read comes too early."""
    queue.handler("mail")(lambda job: None)
    async with crew(queue, 6) as runners:
        one = runners.runners[0]
        one._fleet.seen = lambda records: None
        one._fleet._left = {"mail": {}}
        mine = one._fleet._shares["mail"]
        first, second = sorted(set(range(COUNT)) - mine.heard)[:2]
        did: list[str] = []
        real, asked, go, done = one._stream._collection, asyncio.Event(), asyncio.Event(), asyncio.Event()

        class Slow:
            async def watch(self, *args, **options):
                did.append("open")
                asked.set()
                await go.wait()
                return await real.watch(*args, **options)

        class Noting:
            def restart(self, kind: str) -> None:
                did.append(f"read {kind}")
                if len(did) == 4:
                    done.set()

        one._stream._collection, one._fleet._waker = Slow(), Noting()
        one._fleet._take({"mail": fleet.Share(mine.holds | {first}, mine.watches)})
        await asked.wait()
        one._fleet._take({"mail": fleet.Share(mine.holds | {first, second}, mine.watches)})
        go.set()
        async with asyncio.timeout(20):
            await done.wait()
        assert did == ["open", "read mail", "open", "read mail"]


async def test_runners_that_come_and_go_under_inserts_lose_no_wake(queue, raw, seen):
    """Guard: the grace, and the read after a wider filter is open. Every job far below the fallback of 60 s."""
    queue.handler("mail")(lambda job: None)
    put: list[Any] = []
    done = asyncio.Event()

    async def insert() -> None:
        while not done.is_set():
            one = document()
            await asyncio.to_thread(raw.insert_one, one)
            put.append(one["_id"])
            await asyncio.sleep(0.01)

    async with crew(queue, 5) as runners:
        inserting = asyncio.create_task(insert())
        for _ in range(3):
            await runners.come()
        await runners.agreed()
        for one in runners.runners[:2]:  # at once: some slots lose both
            one.stop()
        await runners.agreed()
        await runners.come()
        await runners.agreed()
        done.set()
        await inserting
        await seen.wait("try", outcome="success", count=len(put), timeout=30)
    late = {fields["job"]: fields["started_ms"] for fields in seen.of("try", outcome="success")}
    assert set(late) == {str(id_) for id_ in put}
    assert max(late.values()) < 5_000
    assert not seen.of("stream.state", state="gap")


async def test_runners_whose_stop_was_over_before_they_could_tell_of_it_are_missed_at_once(queue, raw, seen):
    """Guard: deletes of others' records in the stream's filter. Their leases would run for 30 s yet."""
    queue.handler("mail")(lambda job: None)
    async with crew(queue, 6) as runners:
        for one in runners.of(5):
            one._beat.now = lambda: (
                None
            )  # asked for too late: the beat had a renewal under way, and then ended
            one.stop()
        async with asyncio.timeout(15):
            await runners.agreed()
        raw.insert_one(one := document(_id=in_slot(5)))
        await seen.wait("try", job=one["_id"], outcome="success", timeout=15)


async def test_who_loses_a_slot_watches_it_for_a_while(queue, raw, seen):
    """Guard: the grace. The newcomer is deaf and nobody else knows: who had its slots looks after them."""
    queue.handler("mail")(lambda job: None)
    async with crew(queue, 6, beat=3, margin=1) as runners:
        before = {slot: runners.of(slot) for slot in range(COUNT)}
        newcomer = await runners.come(beat=3, margin=1)
        stop_for_good(newcomer)
        await runners.agreed()
        mine = newcomer._fleet._shares["mail"]
        taken = min(mine.holds)
        stop_for_good(runners.of(taken)[1])
        raw.insert_one(one := document(_id=in_slot(taken)))
        await seen.wait("try", job=one["_id"], outcome="success", timeout=3)
        assert seen.of("try", job=one["_id"])[0]["owner"] in {each.owner for each in before[taken]}


@pytest.mark.parametrize(
    "id_",
    [
        "text",
        "x" * 22 + "ab",
        17,
        {"a": {"b": 1}},
        uuid.UUID(int=7),
        b"bytes",
        datetime(2026, 1, 1, tzinfo=UTC),
    ],
    ids=["text", "long text", "int", "document", "uuid", "bytes", "date"],
)
async def test_foreign_ids_wake_and_harm_no_stream(id_, queue, namespace, uri, seen):
    """Guard: $convert behind a look at the type."""
    from pymongo import MongoClient

    queue.handler("mail")(lambda job: None)
    database, _, name = namespace.partition(".")
    with MongoClient(uri, uuidRepresentation="standard") as client:
        async with crew(queue, 5):
            client[database][name].insert_one(document(_id=id_))
            await seen.wait("try", outcome="success", timeout=15)
            client[database][name].insert_one(document(_id=in_slot(5)))
            await seen.wait("try", outcome="success", count=2, timeout=15)
    assert not seen.of("stream.state", state="gap")


@pytest.mark.parametrize("form", ["update", "replace", "hand"])
async def test_a_put_back_follows_the_slot_in_each_form(form, queue, raw, seen):
    queue.handler("mail")(lambda job: None)
    raw.insert_one(one := document(status=2))
    wake = {"kind": "mail", "by": "another", "n": 7, "runat": ASAP, "created": one["created"]}
    async with crew(queue, 6) as runners:
        if form == "update":
            raw.update_one({"_id": one["_id"]}, [{"$set": {"status": 1, "wake": {"$literal": wake}}}])
        elif form == "replace":
            raw.replace_one({"_id": one["_id"]}, {**one, "status": 1, "wake": wake})
        else:
            raw.update_one({"_id": one["_id"]}, {"$set": {"status": 1}})
        await seen.wait("try", job=one["_id"], outcome="success", timeout=15)
        await runners.noticed(one["_id"])
    assert runners.told[str(one["_id"])] == 2


async def test_a_retry_concerns_the_runners_of_its_slot_alone(queue, raw, seen):
    @queue.handler("mail")
    async def mail(job):
        if job.number == 1:
            raise ValueError("again")

    async with crew(queue, 6) as runners:
        for slot in range(0, COUNT, 16):
            raw.insert_one(document(_id=in_slot(slot), retryinterval=Int64(400_000_000)))
        await seen.wait("try", outcome="success", count=16, timeout=30)
        for event in seen.of("try", outcome="success"):
            pair = {one.owner for one in runners.of(slot_of(ObjectId(event["job"])))}
            woken = seen.of(
                "job.woken", job=event["job"], source=lambda source: source in ("stream", "timer")
            )
            assert {one["owner"] for one in woken} <= pair
