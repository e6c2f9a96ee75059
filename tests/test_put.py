"""Putting jobs: what is stored, whose clock it goes by, what is refused, and a put without an answer."""

from __future__ import annotations

import gc
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from typing import Any

import bson
import pytest
from bson import DatetimeMS, Int64, ObjectId
from bson.raw_bson import RawBSONDocument
from pymongo.errors import OperationFailure, PyMongoError

from streamjobs import ASAP, BadArgument, IdTaken, Job, PutUnknown, Queue, clock, job, putting
from streamjobs.clock import boot
from streamjobs.job import CODEC
from tests.bad_values import VALUES
from tests.documents import FAR, server_now

NINE = ["_id", "status", "tries", "created", "runat", "data", "retries", "retryinterval", "kind"]
NOWHERE = "mongodb://127.0.0.1:1/"


class NoOffset(tzinfo):
    """A zone that does not know where it lies: the datetime is as naive as without one."""

    def utcoffset(self, _when): ...


@pytest.fixture(params=[-300, 0, 300], ids=lambda shift: f"host {shift:+} s")
def shifted(request, monkeypatch):
    """The host's clock is wrong by so much."""
    real = clock.wall
    for module in (clock, job, putting):
        monkeypatch.setattr(module, "wall", lambda: real() + request.param)


async def test_a_put_job_is_the_originals_document_and_comes_back_equal(queue, raw, python_server):
    data = {
        "to": "ann",
        "n": 7,
        "at": datetime(2026, 1, 1, tzinfo=UTC),
        **({} if python_server else {"far": DatetimeMS(2**60)}),  # which that server's own decoder refuses
        "nested": [{"a": None}],
    }
    put = await queue.put("mail", data, retries=5, retry_interval=1.5)
    document = raw.find_one()
    assert list(document) == NINE
    assert document["_id"] == put.id
    assert type(document["retryinterval"]) is Int64
    assert (document["status"], document["tries"], document["retries"]) == (1, [], 5)
    assert (document["retryinterval"], document["kind"], document["runat"]) == (1_500_000_000, "mail", ASAP)
    assert document["data"] == data
    back = await queue.get(put.id)
    assert bson.encode(back.to_document(), codec_options=CODEC) == bson.encode(
        put.to_document(), codec_options=CODEC
    )
    assert (back.created, back.runat, back.asap) == (put.created, put.runat, True)


async def test_created_and_delay_are_by_the_servers_clock_whatever_the_hosts_says(shifted, queue, raw):
    before = server_now(raw)
    plain = await queue.put("mail")
    delayed = await queue.put("mail", delay=60)
    spanned = await queue.put("mail", delay=timedelta(hours=1))
    made = Job.new("mail")
    await queue.put(made)
    many = await queue.put_many([queue.job("mail", delay=5), queue.job("mail")])
    after = server_now(raw)
    slack = timedelta(seconds=2)
    for one, seconds in (
        (plain, None),
        (delayed, 60),
        (spanned, 3600),
        (made, None),
        (many[0], 5),
        (many[1], None),
    ):
        document = raw.find_one({"_id": one.id})
        assert before - slack <= document["created"] <= after + slack
        assert (document["created"], document["runat"]) == (one.created, one.runat)
        if seconds is None:
            assert document["runat"] == ASAP
        else:
            assert document["runat"] - document["created"] == timedelta(seconds=seconds)


@pytest.mark.parametrize("delay", [0, 0.25, 0.0001])
async def test_a_small_delay_is_a_date_not_asap(delay, queue, raw):
    put = await queue.put("mail", delay=delay)
    document = raw.find_one()
    rounded = timedelta(milliseconds=1)  # of both dates, each by itself
    assert timedelta(0) <= document["runat"] - document["created"] <= timedelta(seconds=delay) + rounded
    assert not put.asap


@pytest.mark.parametrize(
    "at",
    [
        FAR,
        datetime(2026, 5, 1, 12, 30, 0, 123_999, tzinfo=timezone(timedelta(hours=-7))),
        datetime(1900, 1, 1, tzinfo=UTC),
    ],
)
async def test_at_is_a_moment_in_any_zone_cut_to_milliseconds(at, queue, raw):
    put = await queue.put("mail", at=at)
    wanted = at.astimezone(UTC).replace(microsecond=at.microsecond // 1000 * 1000)
    assert raw.find_one()["runat"] == put.runat == wanted
    assert (await queue.get(put.id)).runat == wanted


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("kind", {"kind": ""}),
        ("kind", {"kind": {"a": 1}}),
        ("kind", {"kind": None}),
        ("data", {"data": [1]}),
        ("data", {"data": ""}),
        ("data", {"data": {"a": {1, 2}}}),
        ("data", {"data": {"a": [{"b": VALUES["bad RawBSONDocument"]}]}}),
        ("at", {"at": datetime(2026, 1, 1)}),  # noqa: DTZ001 - what is refused
        ("at", {"at": datetime(2026, 1, 1, tzinfo=NoOffset())}),
        ("at", {"at": "tomorrow"}),
        ("at", {"at": datetime(9999, 12, 31, 23, tzinfo=timezone(timedelta(hours=-5)))}),
        ("at", {"at": datetime(1, 1, 1, tzinfo=timezone(timedelta(hours=5)))}),
        ("delay", {"delay": -1}),
        ("delay", {"delay": "5"}),
        ("delay", {"delay": float("nan")}),
        ("delay", {"delay": 5, "at": FAR}),
        ("retries", {"retries": -1}),
        ("retries", {"retries": 2**31}),
        ("retries", {"retries": True}),
        ("retry_interval", {"retry_interval": -1}),
        ("retry_interval", {"retry_interval": True}),
        ("id", {"id": "0123456789abcdef01234567"}),
        ("delay", {"kind": Job.new("mail"), "delay": 5}),
        ("data", {"kind": Job.new("mail"), "data": {}}),
        ("retries", {"kind": Job.new("mail"), "retries": 5}),
    ],
)
async def test_an_argument_that_cannot_work_is_refused_by_name_and_nothing_is_sent(name, arguments, seen):
    nowhere = Queue(NOWHERE, "app.jobs")
    given = {"kind": "mail", **arguments}
    with pytest.raises(BadArgument) as caught:
        await nowhere.put(**given)
    assert caught.value.name == name
    for call in (nowhere.sync.put, nowhere.job):
        with pytest.raises(BadArgument) as caught:
            call(**given)
        assert caught.value.name == name
    assert not seen.all


async def test_a_handlers_options_are_puts_defaults(queue, raw):
    queue.handler("mail", retries=5, retry_interval=timedelta(seconds=30))(lambda job: None)
    await queue.put("mail")
    await queue.put("mail", retries=2)
    await queue.put("mail", retry_interval=0.001)
    await queue.put("mail", retries=0, retry_interval=0)
    await queue.put("post")
    found = [(one["retries"], one["retryinterval"]) for one in raw.find().sort("_id")]
    assert found == [(5, 30 * 10**9), (2, 30 * 10**9), (5, 10**6), (0, 0), (0, 0)]


async def test_the_same_job_with_an_id_of_its_own_is_put_once_also_when_it_has_run(queue, raw):
    id_ = ObjectId()
    first = await queue.put("mail", {"n": 1, "deep": {"a": 1, "b": [1]}}, id=id_)
    raw.update_one({"_id": id_}, {"$set": {"status": 4, "data": {"deep": {"b": [1], "a": 1}, "n": 1}}})
    await queue.put("mail", {"n": 1, "deep": {"a": 1, "b": [1]}}, id=id_)
    assert first.id == id_
    assert [(one["status"], one["data"]["n"]) for one in raw.find()] == [(4, 1)]


@pytest.mark.parametrize("other", [("mail", {"n": 2}), ("post", {"n": 1}), ("mail", {"n": 1, "m": None})])
async def test_an_id_that_another_job_has_is_refused_and_that_job_stays_as_it_is(other, queue, raw):
    """Guard: ``_is_same``. A put that returned would else have stored nothing."""
    kind, data = other
    job = await queue.put("mail", {"n": 1})
    before = raw.find_one({"_id": job.id})
    with pytest.raises(IdTaken, match=r"another job has _id .*: 1 job\(s\) not put.*leave id out") as caught:
        await queue.put(kind, data, id=job.id)
    assert [one.data for one in caught.value.jobs] == [data]
    await queue.put_many([])
    many = [queue.job("mail", {"n": n}) for n in range(5)]
    many[3].id = job.id
    many[4].id = many[0].id  # within one call
    with pytest.raises(IdTaken, match="the other 3 of the call are stored") as caught:
        await queue.put_many(many)
    assert caught.value.jobs == many[3:]
    assert raw.find_one({"_id": job.id}) == before
    assert raw.count_documents({}) == 4


async def test_an_id_whose_job_has_become_something_else_is_refused(queue, raw):
    one = await queue.put("mail", {"n": 1})
    broken = RawBSONDocument(bson.encode({"n": "AA"}).replace(b"AA", b"\xff\xfe"))
    for data in ("a text", None, broken):
        try:
            raw.update_one({"_id": one.id}, {"$set": {"data": data}})
        except OperationFailure:
            continue  # the Rust server refuses what mongod stores
        with pytest.raises(IdTaken):
            await queue.put(one)


async def test_a_thousand_jobs_are_put_in_one_call_in_their_order(queue, raw, seen):
    jobs = [queue.job("mail", {"n": n}) for n in range(1_000)]
    assert await queue.put_many(iter(jobs)) == jobs
    assert [one["data"]["n"] for one in raw.find().sort([("created", 1), ("_id", 1)])] == list(range(1_000))
    (event,) = seen.of("job.put")
    assert (event["count"], event["kinds"], event.get("job")) == (1_000, ["mail"], None)
    assert await queue.put_many([]) == []


async def test_one_bad_job_of_many_keeps_all_from_being_sent(queue, raw):
    bad = queue.job("mail")
    bad.retries = -1
    with pytest.raises(BadArgument, match=r"^retries"):
        await queue.put_many([queue.job("mail"), bad])
    with pytest.raises(BadArgument):
        await queue.put_many([queue.job("mail"), 5])
    assert raw.count_documents({}) == 0


@pytest.mark.parametrize("delay", ["soon", 1e300, float("nan"), -1, True])
async def test_a_bad_job_of_many_is_told_and_the_others_keep_what_they_were(delay, queue, raw):
    """Also when the server's clock is known, so that they are dated at once."""
    await queue.put("mail")
    good, late, bad = queue.job("mail", delay=60), queue.job("mail"), queue.job("mail")
    bad.delay = delay
    for _ in range(2):
        with pytest.raises(BadArgument, match="delay"):
            await queue.put_many([good, late, bad])
    bad.delay, bad.data = None, {"x": {1}}
    with pytest.raises(BadArgument, match="data"):
        await queue.put_many([good, late, bad])
    assert (good.estimated, good.asap, late.estimated) == (True, True, True)
    assert raw.count_documents({}) == 1
    before = server_now(raw)
    await queue.put_many([good, late])
    assert raw.find_one({"_id": good.id})["runat"] >= before + timedelta(seconds=59.9)


async def test_a_delay_of_a_job_may_be_a_timedelta(queue, raw):
    for _ in range(2):
        job = queue.job("mail")
        job.delay = timedelta(minutes=5)
        await queue.put_many([job])
        assert raw.find_one({"_id": job.id})["runat"] > server_now(raw) + timedelta(minutes=4)


async def test_a_job_that_is_put_again_is_one_document_with_its_first_dates(queue, raw):
    one = queue.job("mail", {"n": 1}, delay=50)
    await queue.put(one)
    dates = one.created, one.runat
    raw.update_one({"_id": one.id}, {"$set": {"status": 4}})
    await queue.put(one)
    await queue.put_many([one, one])
    await queue.put_many([one, other := queue.job("mail", {"n": 2})])
    assert (one.created, one.runat) == dates
    assert {one["_id"]: one["status"] for one in raw.find()} == {one.id: 4, other.id: 1}


async def test_a_unique_index_of_the_users_own_is_told_of_and_not_taken_for_the_same_job(queue, raw):
    raw.create_index("data.order", unique=True, sparse=True)
    await queue.put("mail", {"order": 1})
    with pytest.raises(PyMongoError):
        await queue.put("mail", {"order": 1})
    with pytest.raises(PyMongoError):
        await queue.put_many([queue.job("mail", {"order": 2}), queue.job("mail", {"order": 1})])


# ---- a put without an answer

LOST_REPLY = {
    "writeConcernError": {"code": 64, "errmsg": "waiting for replication timed out"}
}  # it was written


@pytest.mark.parametrize("count", [1, 3])
async def test_after_a_put_whose_reply_was_lost_the_same_jobs_are_put_again_and_are_there_once(
    count, queue, raw, failpoint
):
    await queue.put("warm")
    jobs = [queue.job("mail", {"n": n}, delay=60) for n in range(count)]
    failpoint({"times": 1}, "streamjobs/put", ["insert"], **LOST_REPLY)
    with pytest.raises(PutUnknown, match=f"no answer for {count} job") as caught:
        await (queue.put(jobs[0]) if count == 1 else queue.put_many(jobs))
    assert caught.value.jobs == jobs
    assert isinstance(caught.value.__cause__, PyMongoError)
    assert raw.count_documents({"kind": "mail"}) == count
    dates = [(one.created, one.runat) for one in jobs]
    done = await (queue.put(caught.value.jobs[0]) if count == 1 else queue.put_many(caught.value.jobs))
    assert done in (jobs[0], jobs)
    assert raw.count_documents({"kind": "mail"}) == count
    assert [(raw.find_one({"_id": one.id})["created"], one.runat) for one in jobs] == dates


@pytest.mark.parametrize("count", [1, 3])
async def test_after_a_put_whose_connection_broke_the_same_jobs_are_put_again_and_are_there_once(
    count, uri, namespace, raw, failpoint
):
    def connect(cls: Any, **options: Any) -> Any:
        return cls(uri, **{**options, "timeoutMS": 400})

    async with Queue("mongodb://unused/", namespace, connect=connect) as queue:
        await queue.put("warm")
        jobs = [queue.job("mail", {"n": n}) for n in range(count)]
        failpoint("alwaysOn", "streamjobs/put", ["insert"], closeConnection=True)
        with pytest.raises(PutUnknown) as caught:
            await queue.put_many(jobs)
        failpoint("alwaysOn", "nobody", ["insert"], closeConnection=True)
        await queue.put_many(caught.value.jobs)
    assert raw.count_documents({"kind": "mail"}) == count


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
async def test_a_put_to_a_server_that_is_not_there_is_unknown_and_its_error_shows_no_password(seen):
    """And it waits for a server once, not for the clock and for the insert each."""

    def connect(cls: Any, **options: Any) -> Any:
        return cls("mongodb://user:s3cret@127.0.0.1:1/", **{**options, "timeoutMS": 1_000})

    async with Queue("mongodb://unused/", "app.jobs", connect=connect) as queue:
        began = boot()
        with pytest.raises(PutUnknown) as caught:
            await queue.put("mail")
        assert boot() - began < 2.5
    assert "s3cret" not in str(caught.value)
    assert not seen.all
    del caught
    gc.collect()  # the driver leaves a connection that it was making to the collector, with a warning
