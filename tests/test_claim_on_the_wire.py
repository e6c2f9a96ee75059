"""Claims whose replies tell of trouble."""

from __future__ import annotations

import asyncio

from pymongo.errors import AutoReconnect

from streamjobs import ASAP, Queue
from tests.documents import plain
from tests.proxy import Answer


async def test_a_claim_that_a_stepdown_keeps_from_a_majority_runs_once_and_its_runner_goes_on(
    proxied, namespace, seen, driver_litter
):
    ran = asyncio.Event()
    async with Queue(proxied.uri, namespace) as queue:
        await queue.create_indexes()

        @queue.handler("mail")
        async def mail(job) -> None:
            ran.set()

        async with queue.running("r1"):
            # what mongod answers to a write that is under way: done, with a writeConcernError and its labels
            told = Answer(91, write_concern=True)
            with proxied.fault(told, commands=("findAndModify",), app="streamjobs/runner", times=1):
                await queue.put("mail")
                await asyncio.wait_for(ran.wait(), 20)
            await seen.wait("try", outcome="success")
        assert len(seen.of("try")) == 1
        assert not seen.of("runner.failed")


async def test_a_put_back_told_of_while_its_candidate_is_looked_at_is_not_forgotten(queue, raw, seen):
    """Guard: ``before`` of Backlog.drop. The look says that another has the job, its event that it is to be had."""
    free, told = asyncio.Event(), asyncio.Event()

    @queue.handler("mail")
    async def mail(job) -> None:
        if job.data.get("waits"):
            await free.wait()

    missed, back = plain(kind="mail", retries=0), plain(kind="mail", retries=0)
    async with queue.running("w", concurrency=1) as runner:
        change, rows = runner._stream._change, runner._store.rows

        def hear(event):
            change(event)
            if event["documentKey"]["_id"] == back["_id"] and event["operationType"] == "update":
                told.set()

        async def look(ids):
            found = await rows(ids)
            if back["_id"] in ids and not told.is_set():
                wake = {"kind": "mail", "by": "another", "n": 7, "runat": ASAP, "created": back["created"]}
                raw.update_one({"_id": back["_id"]}, {"$set": {"status": 1, "wake": wake}})
                await asyncio.wait_for(told.wait(), 20)
            return found

        runner._stream._change, runner._store.rows = hear, look
        raw.insert_one(plain(kind="mail", retries=0, data={"waits": True}))
        await seen.wait("try.started")
        raw.insert_many([missed, back])
        await seen.wait("job.woken", job=back["_id"])
        raw.update_many({"_id": {"$in": [missed["_id"], back["_id"]]}}, {"$set": {"status": 2}})
        free.set()
        await seen.wait("try", job=back["_id"], outcome="success", timeout=10)
    assert told.is_set()


async def test_a_job_that_was_given_another_kind_while_it_was_a_candidate_ends_no_runner(queue, raw, seen):
    """Guard: the look at the kind in Backlog.again."""
    free = asyncio.Event()

    @queue.handler("mail")
    async def mail(job) -> None:
        if job.data.get("waits"):
            await free.wait()

    async with queue.running("w", concurrency=1):
        raw.insert_one(plain(kind="mail", retries=0, data={"waits": True}))
        await seen.wait("try.started")
        raw.insert_one(one := plain(kind="mail", retries=0))
        await seen.wait("job.woken", job=one["_id"])
        raw.update_one({"_id": one["_id"]}, {"$set": {"kind": "post"}})
        free.set()
        await seen.wait("claim", count=2)
        raw.insert_one(after := plain(kind="mail", retries=0))
        await seen.wait("try", job=after["_id"], outcome="success", timeout=10)
    assert not seen.of("runner.failed")
    assert raw.find_one({"_id": one["_id"]})["status"] == 1


async def test_what_a_claim_has_missed_is_not_forgotten_when_the_look_at_it_fails(
    queue, raw, seen, monkeypatch
):
    """Guard: the except around Claimer._judge."""
    monkeypatch.setattr("streamjobs.runner.runner._UNDER_WAY", 0.0)
    queue.handler("mail")(lambda job: None)
    async with queue.running("w", interval=60) as runner:
        claim, rows, calls = runner._store.claim, runner._store.rows, []

        async def early(ids, *about, **more):
            calls.append("claim")
            return [] if len(calls) == 1 else await claim(ids, *about, **more)

        async def fail(ids):
            calls.append("look")
            if calls.count("look") == 1:
                raise AutoReconnect("cut")
            return await rows(ids)

        runner._store.claim, runner._store.rows = early, fail
        raw.insert_one(one := plain(kind="mail", retries=0))
        await seen.wait("try", job=one["_id"], outcome="success", timeout=10)
    assert calls[:2] == ["claim", "look"]


async def test_a_claim_that_is_still_looked_at_is_no_orphan(queue, raw, seen):
    """Guard: Claimer.in_flight until the look is over. Else what the look then begins was put back meanwhile."""
    queue.handler("mail")(lambda job: None)
    async with queue.running("w", concurrency=1) as runner:
        store, claim, rows = runner._store, runner._store.claim, runner._store.rows

        async def unheard(ids, *args, **more):
            """Carried out, its reply lost; the driver's repetition found nothing to claim."""
            await claim(ids, *args, **more)
            store.claim = claim
            return []

        async def look(ids):
            found = await rows(ids)
            store.rows = rows
            await runner._sweeper.release_orphans()
            return found

        store.claim, store.rows = unheard, look
        job = await queue.put("mail", retries=3)
        await seen.wait("try", job=job.id, outcome="success")
    assert [one.outcome for one in (await queue.get(job.id)).history] == [None]
    assert not seen.of("orphans.released")
