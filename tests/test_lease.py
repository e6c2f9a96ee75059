"""Holding a job: trust, take-back, orphans, lost records."""

from __future__ import annotations

import asyncio
import threading
from datetime import UTC, datetime, timedelta

import pytest
from bson import Binary, Int64, ObjectId

from streamjobs import ASAP, Job, LeaseLost, current_job
from streamjobs.clock import boot
from streamjobs.runner import lease
from streamjobs.runner.lease import record_id

#: A lease that tests can wait for.
FAST = {"lease": 1.5, "beat": 0.3, "margin": 0.3, "interval": 1.0, "stop_deadline": 5}


def dead_runner(raw, *, ends_in: float = -1.0, owner: str = "gone:1:abc", **more) -> str:
    raw.insert_one(
        {
            "_id": record_id(owner), "control": "runner", "name": "gone", "kinds": ["mail"],
            "ends": datetime.now(UTC) + timedelta(seconds=ends_in), **more,
        }
    )  # fmt: skip
    return owner


def held_job(
    raw, owner: str, *, retries: int = 3, tries=(), runat=ASAP, kind: str = "mail", **more
) -> ObjectId:
    job = {
        "_id": ObjectId(), "status": 2, "tries": list(tries), "created": datetime.now(UTC), "runat": runat, "data": {},
        "retries": retries, "retryinterval": Int64(0), "kind": kind,
        "lease": {"owner": owner, "token": f"t{ObjectId()}", "claimed": datetime.now(UTC)}, **more,
    }  # fmt: skip
    raw.insert_one(job)
    return job["_id"]


async def test_a_dead_runners_jobs_are_taken_back_and_run_with_the_loss_recorded_and_charged(
    queue, raw, seen
):
    ids = [held_job(raw, dead_runner(raw)) for _ in range(1)] + [
        held_job(raw, "gone:1:abc") for _ in range(4)
    ]

    @queue.handler("mail")
    async def mail(job):
        assert job.number == 2

    async with queue.running("w", **FAST):
        await seen.wait("takeback", taken="gone:1:abc", count=1)
        await seen.wait("try", count=5, outcome="success")
    for id_ in ids:
        after = await queue.get(id_)
        assert (after.state, after.retries, [one.outcome for one in after.history]) == (
            "success",
            2,
            ["lost", None],
        )
        assert after.history[0].err.startswith("lost: gone:1:abc")
        assert after.history[0].runner == "gone:1:abc"


async def test_a_lost_job_that_may_start_only_once_ends_failed_as_lost(queue, raw, seen):
    ran = []
    queue.handler("mail")(lambda job: ran.append(job))
    dead_runner(raw)
    one, none = held_job(raw, "gone:1:abc", retries=1), held_job(raw, "gone:1:abc", retries=0)
    async with queue.running("w", **FAST):
        await seen.wait("takeback")
        await queue.put("mail")
        await seen.wait("try", outcome="success")
    for id_, left in ((one, 0), (none, -1)):
        after = await queue.get(id_)
        assert (after.state, after.retries, after.history[0].outcome) == ("failed", left, "lost")
    assert len(ran) == 1


async def test_a_second_loss_in_a_row_waits_at_least_a_second(queue, raw, seen):
    queue.handler("mail")(lambda job: None)
    dead_runner(raw)
    lost = {"runner": "x", "when": datetime.now(UTC), "err": "lost: x", "outcome": "lost"}
    id_ = held_job(raw, "gone:1:abc", tries=[lost])
    async with queue.running("w", **FAST):
        await seen.wait("takeback")
        after = await queue.get(id_)
        assert after.state == "waiting"
        (ran,) = await seen.wait("try", job=id_, outcome="success")
    again = await queue.get(id_)
    assert again.runat - again.history[1].when >= timedelta(seconds=1)
    assert ran["started_ms"] >= 0


async def test_jobs_of_kinds_that_this_runner_does_not_serve_are_freed_too(queue, raw, seen):
    queue.handler("mail")(lambda job: None)
    dead_runner(raw)
    id_ = held_job(raw, "gone:1:abc", kind="other", retries=2)
    async with queue.running("w", **FAST):
        await seen.wait("takeback")
    after = await queue.get(id_)
    assert (after.state, "lease" in after.extra) == ("new", False)


async def test_a_live_runners_jobs_are_left_alone_and_freed_when_its_lease_ends(queue, raw, seen):
    queue.handler("mail")(lambda job: None)
    dead_runner(raw, ends_in=2.5)
    id_ = held_job(raw, "gone:1:abc")
    ends = raw.find_one({"control": "runner"})["ends"]
    async with queue.running("w", **{**FAST, "interval": 30}):
        await seen.wait("takeback", count=1)
        await seen.wait("try", job=id_, outcome="success")
    after = await queue.get(id_)
    freed = after.history[0].when - ends
    assert timedelta() <= freed <= timedelta(seconds=1)


async def test_a_working_job_without_a_lease_is_the_originals_and_never_taken_back(queue, raw, seen):
    queue.handler("mail")(lambda job: None)
    dead_runner(raw)
    theirs = held_job(raw, "gone:1:abc")
    raw.update_one({"_id": theirs}, {"$unset": {"lease": 1}})
    ours = held_job(raw, "gone:1:abc")
    async with queue.running("w", **FAST):
        await seen.wait("try", job=ours)
        await seen.wait("lease.registered")
    assert (await queue.get(theirs)).state == "working"


async def test_a_runner_that_fenced_and_died_before_it_freed_is_finished_by_another(queue, raw, seen):
    queue.handler("mail")(lambda job: None)
    dead_runner(raw, fenced=datetime.now(UTC))
    id_ = held_job(raw, "gone:1:abc")
    async with queue.running("w", **FAST):
        await seen.wait("try", job=id_, outcome="success")


async def test_jobs_whose_owner_has_no_record_are_freed_after_a_lease(queue, raw, seen):
    queue.handler("mail")(lambda job: None)
    id_ = held_job(raw, "norecord:1:abc")
    began = boot()
    async with queue.running("w", **FAST):
        await seen.wait("takeback", reason="it has no record")
        await seen.wait("try", job=id_, outcome="success")
    assert boot() - began >= FAST["lease"]


async def test_a_claim_that_lands_after_the_sweep_is_found_by_the_next(queue, raw, seen):
    queue.handler("mail")(lambda job: None)
    dead_runner(raw)
    held_job(raw, "gone:1:abc")
    async with queue.running("w", **FAST):
        await seen.wait("takeback")
        late = held_job(raw, "gone:1:abc")
        await seen.wait("try", job=late, outcome="success")


async def test_a_fenced_record_is_deleted_after_two_empty_sweeps_a_lease_apart(
    queue, raw, seen, client, namespace
):
    queue.handler("mail")(lambda job: None)
    database, _, name = namespace.partition(".")
    gone = asyncio.Event()

    async def watch() -> None:
        async with await client[database][name].watch([{"$match": {"operationType": "delete"}}]) as stream:
            opened.set()
            async for change in stream:
                if change["documentKey"]["_id"] == "runner:gone:1:abc":
                    gone.set()

    opened = asyncio.Event()
    watcher = asyncio.create_task(watch())
    await opened.wait()
    dead_runner(raw)
    began = boot()
    async with queue.running("w", **FAST):
        await asyncio.wait_for(gone.wait(), 20)
    assert boot() - began >= FAST["lease"]
    watcher.cancel()
    await asyncio.wait([watcher])


async def test_nobody_is_fenced_before_a_beat_and_margin_after_the_first_renewal(queue, raw, seen):
    """Guard: Trust.may_fence. After an outage all leases look over; their owners come first."""
    queue.handler("mail")(lambda job: None)
    dead_runner(raw)
    held_job(raw, "gone:1:abc")
    began = boot()
    async with queue.running("w", **{**FAST, "beat": 1.0, "lease": 4.0, "margin": 0.8}):
        await seen.wait("takeback")
    assert boot() - began >= 1.8


async def test_own_orphans_are_released_uncharged_and_run(queue, raw, seen):
    queue.handler("mail")(lambda job: None)
    async with queue.running("w", **FAST) as runner:
        id_ = held_job(raw, runner.owner, retries=1)
        await seen.wait("orphans.released")
        await seen.wait("try", job=id_, outcome="success")
    after = await queue.get(id_)
    assert (after.retries, [one.outcome for one in after.history]) == (1, ["released", None])


@pytest.mark.parametrize("owner", ["dead", "own"])
async def test_a_held_document_that_cannot_be_decoded_harms_no_runner(owner, queue, raw, seen):
    """Guard: Store.held_by. A UUID of five bytes in a try, as a foreign writer may leave it."""
    queue.handler("mail")(lambda job: None)
    bad = {"runner": "x", "when": datetime.now(UTC), "id": Binary(b"12345", 4)}
    async with queue.running("w", **FAST) as runner:
        name = runner.owner if owner == "own" else dead_runner(raw)
        id_ = held_job(raw, name, retries=3, tries=[bad])
        await seen.wait("orphans.released" if owner == "own" else "takeback")
        await seen.wait("try", job=(await queue.put("mail")).id, outcome="success")
    assert raw.find_one({"_id": id_}, {"status": 1})["status"] == 5


async def test_a_registration_that_was_fenced_before_its_answer_is_not_trusted_and_leaves_no_record(
    queue, raw, failpoint, monkeypatch
):
    """Guards: a fresh owner after each failed registration; Beat._bury, or slots are a ghost's for a lease."""
    queue.handler("mail")(lambda job: None)
    owners: list[str] = []
    monkeypatch.setattr(
        lease, "fresh_owner", lambda make=lease.fresh_owner: owners.append(make()) or owners[-1]
    )
    fault = {"code": 64, "errmsg": "waiting for replication timed out"}
    failpoint({"times": 2}, "streamjobs/beat", ["update"], writeConcernError=fault)
    async with queue.running("w", **FAST) as runner:
        assert len(owners) >= 3
        assert runner.owner == owners[-1]
        assert [one["_id"] for one in raw.find({"control": "runner"})] == [record_id(runner.owner)]


async def test_a_running_job_is_no_orphan(queue, seen):
    go = asyncio.Event()

    @queue.handler("mail")
    async def mail(job):
        await go.wait()

    async with queue.running("w", **{**FAST, "interval": 0.2}):
        job = await queue.put("mail")
        await seen.wait("try.started")
        await queue.put("mail", delay=0.7)
        await seen.wait("try.started", count=2)
        go.set()
        await seen.wait("try", count=2, outcome="success")
    assert not seen.of("orphans.released")
    assert len((await queue.get(job.id)).tries) == 1


async def test_a_runner_that_cannot_renew_gives_up_in_time_cancels_and_tells(queue, seen, failpoint):
    """Trust ends margin before the lease does; the async handler is cancelled, the sync one told."""
    told, cancelled = threading.Event(), asyncio.Event()
    began = threading.Event()

    @queue.handler("async", retries=3)
    async def one(job):
        if job.number > 1:
            return
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    @queue.handler("sync", retries=3)
    def two(job):
        if job.number > 1:
            return
        began.set()
        while not job.lost:
            threading.Event().wait(0.01)
        with pytest.raises(LeaseLost):
            job.check()
        with pytest.raises(LeaseLost):
            queue.sync.count()
        assert current_job() is job
        told.set()

    async with queue.running("w", **FAST):
        jobs = [await queue.put("async"), await queue.put("sync")]
        await seen.wait("try.started", count=2)
        failpoint("alwaysOn", "streamjobs/beat", ["update"], closeConnection=True)
        await seen.wait("lease.untrusted")
        await asyncio.wait_for(cancelled.wait(), 5)
        await asyncio.to_thread(told.wait, 5)
        assert seen.of("lease.late")
        failpoint("off", "streamjobs/beat", ["update"])
        await seen.wait("try", count=2, outcome="success")
    for job in jobs:
        after = await queue.get(job.id)
        assert (after.state, [one.outcome for one in after.history], after.retries) == (
            "success",
            ["lost", None],
            2,
        )


async def test_a_fenced_runner_loses_what_it_holds_and_goes_on_under_a_fresh_owner(queue, raw, seen):
    @queue.handler("mail", retries=3)
    async def mail(job):
        if job.number == 1:
            await asyncio.Event().wait()

    async with queue.running("w", **FAST) as runner:
        before = runner.owner
        job = await queue.put("mail")
        await seen.wait("try.started")
        raw.update_one({"_id": record_id(before)}, {"$set": {"fenced": datetime.now(UTC)}})
        await seen.wait("lease.lost")
        await seen.wait("try", job=job.id, outcome="success")
        assert runner.owner != before
    after = await queue.get(job.id)
    assert [one.outcome for one in after.history] == ["lost", None]


async def test_a_runner_whose_record_was_deleted_registers_afresh_within_a_beat(queue, raw, seen):
    queue.handler("mail")(lambda job: None)
    async with queue.running("w", **{**FAST, "beat": 2.0, "lease": 10}) as runner:
        raw.delete_one({"_id": record_id(runner.owner)})
        began = boot()
        await seen.wait("lease.registered", count=2)
        assert boot() - began < 2.5
        job = await queue.put("mail")
        await seen.wait("try", job=job.id, outcome="success")


async def test_a_try_that_lost_its_job_can_not_record_an_outcome(queue, raw, seen):
    """The race that the token decides: the handler ends after another runner took the job back."""
    go = asyncio.Event()

    @queue.handler("mail", retries=5)
    async def mail(job):
        if job.number == 1:
            await go.wait()

    async with queue.running("w", **FAST):
        job = await queue.put("mail")
        await seen.wait("try.started")
        raw.update_one({"_id": job.id}, {"$set": {"lease": {"owner": "other", "token": "theirs"}}})
        go.set()
        (event,) = await seen.wait("outcome.lost", job=job.id)
        assert event["reason"] == "another try has the job"
        after = await queue.get(job.id)
        assert (after.state, after.tries, after.extra["lease"]["token"]) == ("working", [], "theirs")


async def test_a_handler_that_blocks_the_loop_keeps_its_lease(queue, seen):
    @queue.handler("mail")
    async def mail(job):
        threading.Event().wait(2.0)  # blocks the event loop for longer than the lease, on purpose

    async with queue.running("w", **FAST):
        job = await queue.put("mail")
        await seen.wait("try", job=job.id, outcome="success")
    assert not seen.of("lease.lost")
    assert not seen.of("lease.untrusted")


async def test_the_record_is_gone_after_a_clean_stop(queue, raw):
    queue.handler("mail")(lambda job: None)
    async with queue.running("w", **FAST):
        record = raw.find_one({"control": "runner"})
        assert {"name", "kinds", "slots", "host", "pid", "version", "started", "ends"} <= set(record)
    assert raw.find_one({"control": "runner"}) is None


def test_a_job_outside_a_handler_has_no_log_and_is_not_lost():
    job = Job.new("mail")
    assert not job.lost
    with pytest.raises(AttributeError, match="only inside a handler"):
        _ = job.log
    with pytest.raises(LookupError):
        current_job()
