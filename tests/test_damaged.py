"""What somebody has damaged by hand is freed, reported, or can be forced: leases, records, held documents."""

from __future__ import annotations

from datetime import timedelta

import pytest
from pymongo.errors import OperationFailure

from streamjobs import JobState, Queue, Status
from streamjobs.clock import boot
from tests.documents import FAR, stored
from tests.proxy import Drop
from tests.test_lease import FAST, dead_runner, held_job


@pytest.mark.parametrize("ends", [None, "soon", 7])
async def test_jobs_whose_owners_record_has_no_date_are_freed_after_a_lease(ends, queue, raw, seen):
    """Such a record vouches for nobody; its runner, if it lives, dates it again with its next beat."""
    queue.handler("mail")(lambda job: None)
    dead_runner(raw)
    raw.update_one({"_id": "runner:gone:1:abc"}, {"$set": {"ends": ends}})
    id_ = held_job(raw, "gone:1:abc")
    began = boot()
    async with queue.running("w", **FAST):
        await seen.wait("takeback", reason="it has no record")
        await seen.wait("try", job=id_, outcome="success")
    assert boot() - began >= FAST["lease"]


@pytest.mark.parametrize("damage", [{"lease.token": 7}, {"kind": 7}])
async def test_a_held_document_that_cannot_be_freed_is_reported_once(damage, queue, raw, seen):
    queue.handler("mail")(lambda job: None)
    dead_runner(raw)
    id_, other = held_job(raw, "gone:1:abc"), held_job(raw, "gone:1:abc")
    raw.update_one({"_id": id_}, {"$set": damage})
    async with queue.running("w", **FAST):
        (told,) = await seen.wait("job.unreadable", job=id_)
        await seen.wait("try", job=other, outcome="success")
        later = held_job(raw, "gone:1:abc")
        await seen.wait("try", job=later, outcome="success")
    assert len(seen.of("job.unreadable", job=id_)) == 1
    assert ("force" in told["reason"]) == ("lease.token" in damage)
    assert raw.find_one({"_id": id_})["status"] == 2


DAMAGED = {
    "no token": {"owner": "o"},
    "a number for a token": {"owner": "o", "token": 7},
    "a number for an owner": {"owner": 7, "token": "t"},
    "nothing": {},
    "a text": "o",
    "null": None,
    "an array": [{"owner": "o", "token": "t"}],
    "an array for an owner": {"owner": ["o"], "token": "t"},
    "an array for a token": {"owner": "o", "token": ["t"]},
    "an empty owner": {"owner": "", "token": "t"},
    "an empty token": {"owner": "o", "token": ""},
}


@pytest.mark.parametrize("how", DAMAGED)
async def test_force_retries_a_working_job_whose_lease_is_damaged(how, queue, raw):
    """No runner can take such a job back: its fence is a token, and a record is found by a text."""
    id_ = stored(raw, status=2, lease=DAMAGED[how])
    with pytest.raises(JobState, match="force the retry"):
        await queue.retry(id_)
    assert (await queue.retry(id_, force=True)).status == Status.NEW
    after = await queue.get(id_)
    assert "lease" not in after.extra
    assert [(one.outcome, one.err) for one in after.history] == [("lost", "lost: its retry was forced")]
    assert after.number == 2  # its handler may have begun, and fences itself by this


async def test_a_held_job_without_room_for_its_lost_try_is_failed_and_holds_up_no_other(queue, raw, seen):
    """Guard: Sweeper._overflow."""
    queue.handler("mail")(lambda job: None)
    dead_runner(raw)
    full, other = held_job(raw, "gone:1:abc"), held_job(raw, "gone:1:abc")
    raw.update_one({"_id": full}, {"$set": {"data": {"pad": b"x" * (16 * 1024 * 1024 - 370)}}})
    dead_runner(raw, owner="gone:2:abc")
    third = held_job(raw, "gone:2:abc")
    async with queue.running("w", **FAST):
        for id_ in (other, third):
            await seen.wait("try", job=id_, outcome="success", timeout=20)
        await seen.wait("outcome.overflow", job=full, timeout=20)
    after = await queue.get(full)
    assert (after.state, after.history[0].err) == ("failed", "outcome not stored: the document is full")


async def test_a_held_job_that_a_validator_keeps_is_reported_and_holds_up_no_other(queue, raw, seen):
    queue.handler("mail")(lambda job: None)
    dead_runner(raw)
    kept, other = held_job(raw, "gone:1:abc"), held_job(raw, "gone:1:abc")
    raw.update_one({"_id": kept}, {"$set": {"data": {"kept": True}}})
    try:
        rule = {"$or": [{"data.kept": {"$ne": True}}, {"status": 2}]}
        raw.database.command("collMod", raw.name, validator=rule)
    except OperationFailure as error:
        pytest.skip(f"no validators here: {error.code}")
    async with queue.running("w", **FAST):
        await seen.wait("try", job=other, outcome="success", timeout=20)
        (told,) = await seen.wait("job.unreadable", job=kept, timeout=20)
    assert "refuses to free it" in told["reason"]
    assert raw.find_one({"_id": kept})["status"] == 2


async def test_a_registration_anew_that_fails_is_told(proxied, namespace, raw, seen):
    def registers(command):
        return command["updates"][0].get("upsert") is True

    async with Queue(proxied.uri, namespace) as through:
        through.handler("mail")(lambda job: None)
        async with through.running("w", **FAST):
            rule = proxied.fault(Drop(), commands=("update",), app="streamjobs/beat", where=registers)
            raw.delete_one({"control": "runner"})
            await seen.wait("lease.lost")
            await seen.wait("lease.late")
            rule.remove()
            await seen.wait("lease.registered", count=2)
            job = await through.put("mail")
            await seen.wait("try", job=job.id, outcome="success")


async def test_a_record_whose_id_is_not_a_runners_is_left_alone(queue, raw, seen):
    queue.handler("mail")(lambda job: None)
    raw.insert_one({"_id": "odd", "control": "runner", "ends": FAR - timedelta(days=36_500)})
    async with queue.running("w", lease=20, beat=1) as runner:
        assert await runner._sweeper.sweep() > 1
    assert raw.find_one({"_id": "odd"})
