"""Many runners: an insert is noticed by few and claimed by one, whoever dies, comes, goes or is full."""

from __future__ import annotations

import asyncio
import secrets
import uuid
from collections import Counter
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from bson import Int64, ObjectId

from streamjobs import ASAP, Queue
from streamjobs.clock import boot
from streamjobs.runner import fleet
from streamjobs.runner.lease import record_id
from streamjobs.runner.slots import COUNT, slot_of

#: A fallback that no test waits for, and leases that outlive the test.
CALM = {"interval": 60, "lease": 30, "beat": 0.5, "margin": 0.5, "concurrency": 4, "stop_deadline": 5}


def document(kind: str = "mail", **more: Any) -> dict[str, Any]:
    return {
        "_id": ObjectId(), "status": 1, "tries": [], "created": datetime.now(UTC), "runat": ASAP, "data": {},
        "retries": 3, "retryinterval": Int64(0), "kind": kind, **more,
    }  # fmt: skip


def in_slot(slot: int) -> ObjectId:
    return ObjectId(ObjectId().binary[:4] + secrets.token_bytes(7) + bytes([slot]))


class Crew:
    """Runners of one queue in this process, each with its own stream, and what each was told."""

    def __init__(self, queue: Queue, stack: AsyncExitStack) -> None:
        self._queue = queue
        self._stack = stack
        self.runners: list[Any] = []
        self.told: Counter[Any] = Counter()

    async def come(self, **settings: Any) -> Any:
        runner = await self._stack.enter_async_context(
            self._queue.running(f"w{len(self.runners)}", **{**CALM, **settings})
        )
        inner = runner._stream._change

        def count(change: dict[str, Any]) -> None:
            self.told[str(change["documentKey"]["_id"])] += 1
            inner(change)

        runner._stream._change = count
        self.runners.append(runner)
        return runner

    async def agreed(self) -> None:
        """Wait until every slot has one holder and one watcher, in the runners' own eyes, and filters say so."""
        live = [one for one in self.runners if not one._stopper.asked.is_set()]

        def done() -> bool:
            shares = [one._fleet._shares["mail"] for one in live]
            if len(live) <= 4:
                return all(share.holds is None for share in shares)
            return all(
                sum(len(share.holds or ()) for share in shares) == COUNT == sum(len(part) for part in parts)
                and frozenset().union(*parts) == frozenset(range(COUNT))
                for parts in ([share.holds or () for share in shares], [share.watches for share in shares])
            )

        async with asyncio.timeout(20):
            while not done():
                await asyncio.sleep(0.02)

    async def settled(self) -> None:
        """The same, and nobody listens any more to what it has lost."""
        await self.agreed()
        async with asyncio.timeout(20):
            for one in self.runners:
                while not one._stopper.asked.is_set() and _wider(one):
                    await asyncio.sleep(0.02)

    def of(self, slot: int) -> tuple[Any, Any]:
        """The holder and the watcher of a slot."""
        holder = next(one for one in self.runners if slot in one._fleet._shares["mail"].holds)
        return holder, next(one for one in self.runners if slot in one._fleet._shares["mail"].watches)


def _wider(runner: Any) -> bool:
    mine = runner._fleet._shares["mail"].heard
    (_, slots), *_ = runner._fleet._filter
    return runner._stream.state != "live" or (slots is None) != (mine is None) or (
        slots is not None and len(slots) != len(mine)
    )  # fmt: skip


@asynccontextmanager
async def crew(queue: Queue, count: int, **settings: Any):
    async with AsyncExitStack() as stack:
        one = Crew(queue, stack)
        await asyncio.gather(*(one.come(**settings) for _ in range(count)))
        await one.settled()
        yield one


def stop_for_good(runner: Any) -> None:
    """As if its process had been killed: nothing more is heard, read, claimed or said, and its lease runs on."""
    runner._stream._change = lambda change: None
    runner._claimer.stop()
    runner._waker.restart_next = lambda: None
    runner._fleet._waker = type("Nobody", (), {"offer": lambda *_: None, "restart": lambda *_: None})()


async def test_an_insert_is_noticed_by_two_and_claimed_by_one(queue, raw, seen):
    """Guard: the slots in the stream's $match. Without them each of the runners sees and claims each job."""
    queue.handler("mail")(lambda job: None)
    async with crew(queue, 7) as runners:
        runners.told.clear()
        before = len(seen.of("claim"))
        documents = [document() for _ in range(60)]
        for one in documents:
            raw.insert_one(one)
            await seen.wait("try", job=one["_id"], outcome="success", timeout=5)
        tried = sum(event["asked"] for event in seen.of("claim")[before:])
        assert tried <= 1.25 * len(documents)
        assert {runners.told[str(one["_id"])] for one in documents} == {2}
        for one in documents:
            holder, _ = runners.of(slot_of(one["_id"]))
            assert seen.of("try", job=one["_id"])[0]["owner"] == holder.owner


async def test_a_burst_is_shared_out_fairly(queue, raw, seen, python_server):
    queue.handler("mail")(lambda job: None)
    count = 256 if python_server else 1_024
    async with crew(queue, 8, concurrency=20) as runners:
        raw.insert_many([document() for _ in range(count)])
        await seen.wait("try", outcome="success", count=count, timeout=60)
        ran = Counter(event["owner"] for event in seen.of("try"))
        assert sorted(ran) == sorted(one.owner for one in runners.runners)


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
        (event,) = await seen.wait("try", job=one["_id"], outcome="success", timeout=10)
        assert event["owner"] == watcher.owner
        assert fleet.WATCH <= boot() - began < 5
        assert seen.of("job.woken", job=one["_id"], source="look")


async def test_a_dated_jobs_watcher_looks_after_it_was_due(queue, raw, seen):
    queue.handler("mail")(lambda job: None)
    async with crew(queue, 6) as runners:
        holder, watcher = runners.of(9)
        stop_for_good(holder)
        runat = datetime.now(UTC) + timedelta(seconds=1)
        raw.insert_one(one := document(_id=in_slot(9), runat=runat, status=3))
        (event,) = await seen.wait("try", job=one["_id"], outcome="success", timeout=10)
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
        await seen.wait("try", job=one["_id"], outcome="success", timeout=10)
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
        async with asyncio.timeout(10):
            while sum(len(one._fleet._shares["mail"].holds) for one in live) < COUNT:
                await asyncio.sleep(0.02)


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
        await seen.wait("try", outcome="success", count=len(put), timeout=10)
    late = {fields["job"]: fields["started_ms"] for fields in seen.of("try", outcome="success")}
    assert set(late) == {str(id_) for id_ in put}
    assert max(late.values()) < 5_000


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
            await seen.wait("try", outcome="success", timeout=5)
            client[database][name].insert_one(document(_id=in_slot(5)))
            await seen.wait("try", outcome="success", count=2, timeout=5)
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
        await seen.wait("try", job=one["_id"], outcome="success", timeout=5)
        assert runners.told[str(one["_id"])] == 2


async def test_a_retry_concerns_the_runners_of_its_slot_alone(queue, raw, seen):
    @queue.handler("mail")
    async def mail(job):
        if job.number == 1:
            raise ValueError("again")

    async with crew(queue, 6) as runners:
        for slot in range(0, COUNT, 16):
            raw.insert_one(document(_id=in_slot(slot), retryinterval=Int64(400_000_000)))
        await seen.wait("try", outcome="success", count=16, timeout=10)
        for event in seen.of("try", outcome="success"):
            pair = {one.owner for one in runners.of(slot_of(ObjectId(event["job"])))}
            woken = seen.of(
                "job.woken", job=event["job"], source=lambda source: source in ("stream", "timer")
            )
            assert {one["owner"] for one in woken} <= pair


async def test_a_full_holder_passes_a_job_on_once_to_one_with_a_free_slot(queue, raw, seen):
    """Guard: Fleet.holding. The watcher is full too, so without it the job waits for a slot or the fallback."""
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
            await seen.wait("try.started", job=one["_id"], timeout=10)
        assert {one["owner"] for one in seen.of("try.started")} == {holder.owner, watcher.owner}
        async with asyncio.timeout(10):  # their beats have said so
            while raw.count_documents({"control": "runner", "free": 0}) < 2:
                await asyncio.sleep(0.05)
        holder._fleet._stale = 0.0  # what was read before that is old by now
        raw.insert_one(one := document(_id=in_slot(40)))
        (passed,) = await seen.wait("job.passed", job=one["_id"], timeout=5)
        await seen.wait("try", job=one["_id"], outcome="success", timeout=5)
        assert seen.of("try", job=one["_id"])[0]["owner"] == passed["to"]
        assert passed["owner"] == holder.owner
        assert "passed" not in raw.find_one({"_id": one["_id"]})
        go.set()
        await seen.wait("try", outcome="success", count=5, timeout=10)
    assert len(seen.of("job.passed")) == 1


async def test_a_full_fleet_writes_nothing_and_whoever_gets_a_slot_asks(queue, raw, seen):
    """Guards: a free slot in the records; Fleet.freed, without which a job waits at its full holder."""
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
            await seen.wait("try.started", job=each["_id"], timeout=10)
        async with asyncio.timeout(10):  # all beats have said that nobody is free
            while raw.count_documents({"control": "runner", "free": {"$gt": 0}}):
                await asyncio.sleep(0.05)
        waiting = [document(_id=in_slot(8), data={"quick": True}) for _ in range(3)]
        raw.insert_many(waiting)
        reads = []
        real = holder._sweeper.wake
        holder._fleet._sweeper = type("Counting", (), {"wake": lambda _: (reads.append(1), real())})()
        async with asyncio.timeout(10):
            while len(reads) < 2:
                await asyncio.sleep(0.05)
        assert not seen.of("job.passed")
        assert raw.count_documents({"passed": {"$exists": True}}) == 0
        quick.set()  # four slots become free, none of them the holder's or the watcher's
        for one in waiting:
            await seen.wait("try", job=one["_id"], outcome="success", timeout=5)
        go.set()
        await seen.wait("try", outcome="success", count=9, timeout=10)


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


async def test_a_put_in_the_same_process_costs_no_claim_more(queue, seen):
    """Guard: the slot is asked of a local put too. Taken at once, each costs its holder a lost claim."""
    queue.handler("mail")(lambda job: None)
    async with crew(queue, 6):
        before = len(seen.of("claim"))
        for _ in range(30):
            job = await queue.put("mail")
            await seen.wait("try", job=job.id, outcome="success", timeout=5)
        assert sum(event["asked"] for event in seen.of("claim")[before:]) <= 33


async def test_a_polling_runner_is_given_no_slots_and_takes_what_it_finds(queue, raw, seen):
    queue.handler("mail")(lambda job: None)
    async with crew(queue, 5) as runners, queue.running("polls", **{**CALM, "poll": 0.3}) as polls:
        assert raw.find_one({"_id": record_id(polls.owner)})["away"] == "polling"
        for one in runners.runners:
            one._sweeper.wake()
        await runners.agreed()
        raw.insert_one(one := document())
        await seen.wait("try", job=one["_id"], outcome="success", timeout=5)


async def test_a_runner_that_stops_says_so_before_it_drains(queue, raw, seen):
    """Guard: the renewal at the beginning of a stop; its slots move while its handlers end."""
    go = asyncio.Event()

    @queue.handler("mail")
    async def mail(job):
        if job.data.get("hold"):
            await go.wait()

    async with crew(queue, 6) as runners:
        leaver, _ = runners.of(8)
        raw.insert_one(held := document(_id=in_slot(8), data={"hold": True}))
        await seen.wait("try.started", job=held["_id"], timeout=10)
        leaver.stop()
        await runners.agreed()
        assert raw.find_one({"_id": record_id(leaver.owner)})["away"] == "stopping"
        go.set()
        await seen.wait("try", job=held["_id"], outcome="success", timeout=10)
