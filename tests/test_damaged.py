"""What somebody has damaged by hand is freed, reported, or can be forced: leases, records, held documents."""

from __future__ import annotations

import pytest

from streamjobs import JobState, Status
from streamjobs.clock import boot
from tests.documents import stored
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
}


@pytest.mark.parametrize("how", DAMAGED)
async def test_force_retries_a_working_job_whose_lease_is_damaged(how, queue, raw):
    """No runner can take such a job back: its fence is a token, and a record is found by a text."""
    id_ = stored(raw, status=2, lease=DAMAGED[how])
    with pytest.raises(JobState, match="force the retry"):
        await queue.retry(id_)
    assert (await queue.retry(id_, force=True)).status == Status.NEW
    assert "lease" not in raw.find_one({"_id": id_})
