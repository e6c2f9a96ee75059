"""Documents that can't be jobs, and those that only look as if they could not."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta

import bson
import pytest
from bson.decimal128 import Decimal128
from bson.raw_bson import RawBSONDocument
from pymongo.errors import OperationFailure

from streamjobs import Queue, clock
from tests.proxy import Hold
from tests.test_wake import document

BAD = {
    "no kind": {"kind": None},
    "status a text": {"status": "1"},
    "status an array": {"status": [1, 2]},
    "status a decimal": {"status": Decimal128("1")},
    "kind an array": {"kind": ["mail"]},
    "runat missing": {"runat": None},
    "runat a text": {"runat": "now"},
    "runat an array": {"runat": [datetime(2020, 1, 1, tzinfo=UTC)]},
    "data a text": {"data": "x"},
    "data missing": {"data": None},
    "data an array": {"data": [1]},
}


@pytest.mark.parametrize("name", list(BAD))
@pytest.mark.parametrize("when", ["before", "while"])
async def test_a_document_that_cannot_be_a_job_is_left_as_it_is_and_reported_once(
    name, when, queue, raw, seen
):
    ran = []
    queue.handler("mail")(lambda job: ran.append(job.id))
    bad = {key: value for key, value in document(**BAD[name]).items() if value is not None}
    bad["created"] = bad["created"].replace(microsecond=0)
    if when == "before":
        raw.insert_one(bad)
    async with queue.running("w", interval=0.2):
        if when == "while":
            raw.insert_one(bad)
        for _ in range(3):
            good = await queue.put("mail")
            await seen.wait("try", job=good.id, outcome="success")
        retried = await queue.put("mail", delay=0.5)  # some fallbacks later
        await seen.wait("try", job=retried.id, outcome="success")
    assert list(raw.find_one({"_id": bad["_id"]}).items()) == list(bad.items())
    assert bad["_id"] not in ran
    reports = seen.of("job.unreadable", job=bad["_id"])
    assert len(reports) <= 1
    # what neither the stream's filter nor a page of this kind can match is not met
    if when == "while" and name not in ("no kind", "kind an array"):
        assert len(reports) == 1


@pytest.mark.parametrize("slots", [1, 8])
async def test_a_document_that_the_server_refuses_to_claim_holds_up_no_other(slots, queue, raw, seen):
    queue.handler("mail")(lambda job: None)
    raw.insert_many([document(data={"good": True}) for _ in range(3)])
    bad = document(created=datetime(2020, 1, 1, tzinfo=UTC))
    raw.insert_one(bad)
    raw.insert_many([document(data={"good": True}) for _ in range(20)])
    try:
        raw.database.command("collMod", raw.name, validator={"$or": [{"kind": None}, {"data.good": True}]})
    except OperationFailure as error:
        pytest.skip(f"no validators here: {error.code}")
    async with queue.running("w", concurrency=slots):
        await seen.wait("try", count=23, outcome="success", timeout=20)
        await seen.wait("job.unreadable", job=bad["_id"])
    assert raw.find_one({"_id": bad["_id"]})["status"] == 1
    assert len(seen.of("claim.unknown")) <= 3


async def test_a_status_that_a_shell_stored_as_a_double_is_a_status(queue, raw, seen):
    queue.handler("mail")(lambda job: None)
    raw.insert_one(one := document(status=1.0, retries=2.0))
    async with queue.running("w"):
        await seen.wait("try", job=one["_id"], outcome="success")


@pytest.mark.parametrize("status", [math.nan, math.inf, -math.inf, 1.5])
async def test_a_status_that_is_no_whole_number_stops_nobody(status, proxied, namespace, raw, seen, queue):
    """Guard: is_integer in candidate_of. Only a claim that misses its job meets one: no page or stream does."""
    hold = Hold()
    async with Queue(proxied.uri, namespace) as through:
        through.handler("mail")(lambda job: None)
        async with through.running("w"):
            with proxied.fault(hold, commands=("findAndModify",), app="streamjobs/runner", times=1) as claim:
                bad = await through.put("mail")
                await claim.hit()
                raw.update_one({"_id": bad.id}, {"$set": {"status": status}})
                hold.release()
                await seen.wait("job.unreadable", job=bad.id)
            good = await through.put("mail")
            await seen.wait("try", job=good.id, outcome="success")
    assert len(seen.of("job.unreadable", job=bad.id)) == 1


async def test_a_page_of_unreadable_documents_does_not_hide_the_jobs_behind_it(queue, raw, seen):
    """Guard: the cursor goes past rows that can't be jobs."""
    queue.handler("mail")(lambda job: None)
    early = datetime(2026, 1, 1, tzinfo=UTC)
    raw.insert_many([document(status=[1], created=early) for _ in range(1_100)])
    raw.insert_one(good := document())
    async with queue.running("w"):
        await seen.wait("try", job=good["_id"], outcome="success", timeout=20)
    assert len(seen.of("job.unreadable")) == 1_100


async def test_a_job_that_is_retried_later_was_not_due_all_the_time(queue, raw, seen):
    queue.handler("mail")(lambda job: None)
    raw.insert_one(old := document(status=5, created=datetime(2020, 1, 1, tzinfo=UTC)))
    async with queue.running("w"):
        await queue.retry(old["_id"])
        (event,) = await seen.wait("try", job=old["_id"])
    assert event["started_ms"] < 60_000


async def test_a_document_whose_data_is_no_utf8_fails_its_try_with_the_reason(queue, raw, seen):
    ran = []
    queue.handler("mail")(lambda job: ran.append(job.id))
    one = document(data={"text": "AAAA"})
    broken = bson.encode(one).replace(b"AAAA", b"\xff\xfe\xff\xfe")
    try:
        raw.insert_one(RawBSONDocument(broken))
    except OperationFailure as error:  # the Rust server refuses what mongod stores
        pytest.skip(f"this server does not store it: {error.code}")
    async with queue.running("w"):
        await seen.wait("try", job=one["_id"], error="UnreadableJob", status="failed", timeout=10)
    assert not ran


@pytest.mark.parametrize("field", ["created", "retries", "retryinterval", "lease", "wake", "other"])
@pytest.mark.parametrize("when", ["before", "while"])
async def test_bytes_that_are_no_utf8_in_any_field_stop_nobody(field, when, queue, raw, seen):
    """Guard: the replacing codecs. A page that can't be decoded would be read again for ever."""
    queue.handler("mail")(lambda job: None)
    one = document(**{field: "AAAA"})
    record = {"_id": "runner:odd:1:a", "control": "runner", "name": "AAAA", "ends": one["created"]}
    broken = [bson.encode(found).replace(b"AAAA", b"\xff\xfe\xff\xfe") for found in (one, record)]
    try:
        if when == "before":
            raw.insert_many([RawBSONDocument(found) for found in broken])
    except OperationFailure as error:  # the Rust server refuses what mongod stores
        pytest.skip(f"this server does not store it: {error.code}")
    async with queue.running("w", interval=0.3):
        try:
            if when == "while":
                raw.insert_many([RawBSONDocument(found) for found in broken])
        except OperationFailure as error:
            pytest.skip(f"this server does not store it: {error.code}")
        for _ in range(3):
            good = await queue.put("mail")
            await seen.wait("try", job=good.id, outcome="success", timeout=10)
        raw.insert_one(later := document(runat=datetime.now(UTC) + timedelta(seconds=0.5), status=3))
        await seen.wait("try", job=later["_id"], outcome="success", timeout=10)
    assert not seen.of("server.away")
    assert not seen.of("runner.failed")


@pytest.mark.parametrize("mend", ["data", "kind"])
async def test_a_document_that_is_mended_runs_within_a_period(mend, queue, raw, seen):
    """Guard: Claimer.look_again. No stream tells of such an update."""
    queue.handler("mail")(lambda job: None)
    raw.insert_one(bad := document(data="x"))
    async with queue.running("w", interval=0.3):
        await seen.wait("job.unreadable", job=bad["_id"])
        if mend == "kind":  # to one that is not served, and back: nothing is left behind
            raw.update_one({"_id": bad["_id"]}, {"$set": {"kind": "other"}})
            raw.update_one({"_id": bad["_id"]}, {"$set": {"kind": "mail"}})
        raw.update_one({"_id": bad["_id"]}, {"$set": {"data": {}}})
        await seen.wait("try", job=bad["_id"], outcome="success", timeout=10)
    assert len(seen.of("job.unreadable", job=bad["_id"])) == 1


@pytest.mark.parametrize("lease", ["o", 7, [1], [{"token": "t"}]])
async def test_an_odd_lease_on_a_job_that_is_claimed_too_early_stops_nobody(
    lease, queue, raw, seen, monkeypatch
):
    """The claim's reply is then the document as it was."""
    real = clock.ServerClock.now_ms
    queue.handler("mail")(lambda job: None)
    async with queue.running("w"):
        monkeypatch.setattr(clock.ServerClock, "now_ms", lambda self: real(self) + 300)
        runat = datetime.now(UTC) + timedelta(seconds=0.6)
        raw.insert_one(one := document(runat=runat, status=3, lease=lease))
        await seen.wait("try", job=one["_id"], outcome="success", timeout=10)
    assert any(claim["count"] < claim["asked"] for claim in seen.of("claim"))
