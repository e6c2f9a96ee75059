"""What an operator may do to a job: retry it, cancel it, and in which status."""

from __future__ import annotations

import re
from datetime import timedelta

import pytest
from bson import ObjectId

from streamjobs import BadArgument, JobState, Status
from tests.documents import FAR, server_now, stored


@pytest.mark.parametrize("status", [1, 3, 4, 5, 6])
async def test_retry_makes_a_job_new_due_now_with_at_least_one_attempt(status, queue, raw, seen):
    tries = [{"runner": "r", "when": FAR, "err": "x"}]
    id_ = stored(raw, status=status, runat=FAR, retries=-1, tries=tries, cancel={"when": FAR, "reason": "x"})
    back = await queue.retry(id_)
    assert (back.status, back.asap, back.retries, back.tries) == (Status.NEW, True, 1, tries)
    assert "cancel" not in back.extra
    assert seen.of("job.retried", job=id_, status="new")
    richer = stored(raw, status=status, retries=7)
    assert (await queue.retry(richer)).retries == 7


@pytest.mark.parametrize(
    ("status", "text"), [(2, "working"), (0, "invalid"), (7, "unknown (7)"), (99, "unknown (99)")]
)
async def test_retry_of_another_status_is_refused_with_its_text(status, text, queue, raw, seen):
    id_ = stored(raw, status=status)
    with pytest.raises(JobState, match=re.escape(f"cannot retry job {id_}: it is {text}; ")) as caught:
        await queue.retry(id_)
    assert ("force the retry" in str(caught.value)) == (status == 2)
    assert raw.find_one()["status"] == status
    assert not seen.of("job.retried")


async def test_force_retries_a_working_job_only_where_no_lease_names_its_holder(queue, raw):
    free = stored(raw, status=2)
    assert (await queue.retry(free, force=True)).status == Status.NEW
    held = stored(raw, status=2, lease={"owner": "o", "token": "t", "claimed": FAR})
    for force in (True, False):
        with pytest.raises(JobState, match="its holder is running it"):
            await queue.retry(held, force=force)
    for status in (1, 3, 4, 5, 6, 7):
        other = stored(raw, status=status)
        with pytest.raises(JobState, match="force only for working ones"):
            await queue.retry(other, force=True)


@pytest.mark.parametrize("status", [1, 3])
async def test_a_new_or_waiting_job_can_be_cancelled_with_a_reason(status, queue, raw, seen):
    id_ = stored(raw, status=status, runat=FAR)
    before = server_now(raw)
    back = await queue.cancel(id_, "$data.secret")
    assert (back.status, back.state) == (Status.CANCELLED, "cancelled")
    assert back.extra["cancel"]["reason"] == "$data.secret"
    assert abs(back.extra["cancel"]["when"] - before) < timedelta(seconds=2)
    assert seen.of("job.cancelled", job=id_, reason="$data.secret", status="cancelled")
    assert (await queue.cancel(stored(raw))).extra["cancel"]["reason"] == ""


@pytest.mark.parametrize(
    ("status", "text"), [(2, "working"), (4, "success"), (5, "failed"), (6, "cancelled"), (8, "unknown (8)")]
)
async def test_a_job_in_another_status_cannot_be_cancelled(status, text, queue, raw):
    id_ = stored(raw, status=status)
    with pytest.raises(
        JobState, match=re.escape(f"cannot cancel job {id_}: it is {text}; only new and waiting")
    ):
        await queue.cancel(id_)
    assert raw.find_one()["status"] == status


@pytest.mark.parametrize("reason", [None, 5, b"x"])
async def test_a_reason_is_a_text(reason, queue):
    with pytest.raises(BadArgument, match=r"^reason: "):
        await queue.cancel(ObjectId(), reason)


async def test_a_reason_that_bson_cannot_hold_is_stored_as_well_as_it_can_be(queue, raw):
    back = await queue.cancel(stored(raw), "a\udc80" + "b" * 10_000)
    assert back.extra["cancel"]["reason"].startswith("a?bbb")
    assert len(back.extra["cancel"]["reason"]) == 4_000
