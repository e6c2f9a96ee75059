"""The queue for programs without a loop: the same calls, without await."""

from __future__ import annotations

import inspect
import threading
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from bson import Int64, ObjectId
from pymongo import MongoClient
from pymongo.errors import DuplicateKeyError

from streamjobs import (
    ASAP,
    BadArgument,
    ConfigError,
    Job,
    JobNotFound,
    JobState,
    PutUnknown,
    Queue,
    Status,
    SyncQueue,
    clock,
    job,
    putting,
)
from streamjobs.indexes import INDEXES

FAR = datetime(2126, 1, 1, tzinfo=UTC)


def server_now(raw: Any) -> datetime:
    return raw.database.client.admin.command("hello")["localTime"].replace(tzinfo=UTC)


@pytest.fixture
def jobs(uri, namespace):
    """A queue used without a loop."""
    queue = Queue(uri, namespace)
    queue.sync.create_indexes()
    yield queue.sync
    queue.sync.close()


@pytest.mark.parametrize(
    "name",
    [
        "put",
        "put_many",
        "get",
        "list",
        "count",
        "retry",
        "cancel",
        "missing_indexes",
        "create_indexes",
        "close",
    ],
)
def test_each_call_takes_what_the_asynchronous_one_takes(name):
    def shape(cls: Any) -> list[Any]:
        parameters = inspect.signature(getattr(cls, name)).parameters.values()
        return [(one.name, one.kind, one.default) for one in parameters]

    assert shape(SyncQueue) == shape(Queue)
    assert inspect.iscoroutinefunction(getattr(Queue, name))
    assert not inspect.iscoroutinefunction(getattr(SyncQueue, name))


def test_a_put_job_comes_back_as_it_was_put(jobs, raw):
    put = jobs.put("mail", {"to": "ann"}, retries=5, retry_interval=timedelta(seconds=2))
    document = raw.find_one()
    assert document == put.to_document()
    assert (document["retries"], document["retryinterval"], document["runat"]) == (5, 2_000_000_000, ASAP)
    assert jobs.get(put.id).to_document() == document


@pytest.mark.parametrize("shift", [-300, 300])
def test_created_and_delay_are_by_the_servers_clock_whatever_the_hosts_says(shift, jobs, raw, monkeypatch):
    real = clock.wall
    for module in (clock, job, putting):
        monkeypatch.setattr(module, "wall", lambda: real() + shift)
    before = server_now(raw)
    jobs.put("mail", delay=60)
    jobs.put(Job.new("mail"))
    after = server_now(raw)
    slack = timedelta(seconds=2)
    delayed, asap = raw.find().sort("_id")
    for one in (delayed, asap):
        assert before - slack <= one["created"] <= after + slack
    assert delayed["runat"] - delayed["created"] == timedelta(seconds=60)
    assert asap["runat"] == ASAP


def test_the_queues_handlers_give_put_its_defaults(uri, namespace, raw):
    queue = Queue(uri, namespace)
    queue.handler("mail", retries=5, retry_interval=30)(lambda job: None)
    queue.sync.put("mail", at=FAR)
    queue.sync.close()
    (one,) = raw.find()
    assert (one["retries"], one["retryinterval"], one["runat"]) == (5, 30 * 10**9, FAR)


def test_a_thousand_jobs_are_put_in_one_call(jobs, raw, seen):
    made = [Job.new("mail") for _ in range(1_000)]
    assert jobs.put_many(made) == made
    assert jobs.put_many([]) == []
    assert raw.count_documents({}) == 1_000
    assert [one["count"] for one in seen.of("job.put")] == [1_000]
    assert len({one["created"] for one in raw.find()}) == 1


def test_a_job_that_is_put_again_is_one_document(jobs, raw):
    one = Job.new("mail")
    for _ in range(2):
        jobs.put(one)
    jobs.put_many([one, Job.new("mail")])
    assert raw.count_documents({}) == 2


@pytest.mark.parametrize("count", [1, 3])
def test_after_a_put_whose_reply_was_lost_the_same_jobs_are_put_again_and_are_there_once(
    count, jobs, raw, failpoint
):
    jobs.put("warm")
    made = [Job.new("mail") for _ in range(count)]
    lost = {"code": 64, "errmsg": "waiting for replication timed out"}
    failpoint({"times": 1}, "streamjobs/put", ["insert"], writeConcernError=lost)
    with pytest.raises(PutUnknown) as caught:
        jobs.put(made[0]) if count == 1 else jobs.put_many(made)
    assert caught.value.jobs == made
    jobs.put(caught.value.jobs[0]) if count == 1 else jobs.put_many(caught.value.jobs)
    assert raw.count_documents({"kind": "mail"}) == count


def test_an_argument_that_cannot_work_is_refused_by_name_and_nothing_is_sent(jobs, raw):
    for name, arguments in (
        ("data", {"data": {1: 2}}),
        ("delay", {"delay": -1}),
        ("delay", {"delay": 1, "at": FAR}),
        ("at", {"at": datetime(2026, 1, 1)}),  # noqa: DTZ001 - what is refused
        ("retries", {"retries": -1}),
        ("id", {"id": 5}),
    ):
        with pytest.raises(BadArgument, match=f"^{name}: "):
            jobs.put("mail", **arguments)
    assert raw.count_documents({}) == 0


def test_a_put_in_a_transaction_is_there_after_the_commit_and_not_after_an_abort(jobs, raw, uri):
    own = Queue(raw, connect=uri).sync
    client = raw.database.client
    with client.start_session() as session:
        with session.start_transaction():
            own.put("mail", session=session)
            own.put_many([Job.new("mail"), Job.new("mail")], session=session)
            assert raw.count_documents({}) == 0
        assert raw.count_documents({}) == 3
        session.start_transaction()
        own.put("mail", session=session)
        session.abort_transaction()
        session.start_transaction()
        with pytest.raises(DuplicateKeyError):
            own.put(Job.from_document(raw.find_one()), session=session)
        session.abort_transaction()
    assert raw.count_documents({}) == 3


def test_a_session_of_another_client_is_refused(jobs, raw, uri):
    with MongoClient(uri) as other, other.start_session() as session:
        for one in (jobs, Queue(raw).sync):
            with pytest.raises(ConfigError, match="belongs to another client"):
                one.put("mail", session=session)


def test_jobs_are_looked_at_retried_and_cancelled(jobs, raw):
    first, later = jobs.put("mail"), jobs.put("post", delay=3600)
    assert [one.id for one in jobs.list()] == [later.id, first.id]
    assert [one.id for one in jobs.list(due=True)] == [first.id]
    assert [one.id for one in jobs.list(due=False)] == [later.id]
    assert [one.id for one in jobs.list(kind="mail", status="new", limit=1)] == [first.id]
    assert jobs.count() == {"mail": {"new": 1}, "post": {"new": 1}}
    assert jobs.cancel(first.id, "why").extra["cancel"]["reason"] == "why"
    with pytest.raises(JobState, match=r"cannot cancel job .* it is cancelled"):
        jobs.cancel(first.id)
    assert jobs.retry(first.id).status == Status.NEW
    raw.update_one({"_id": later.id}, {"$set": {"status": 2}})
    with pytest.raises(JobState, match=r"cannot retry job .* it is working"):
        jobs.retry(later.id)
    assert jobs.retry(later.id, force=True).asap
    for call in (jobs.get, jobs.retry, jobs.cancel):
        with pytest.raises(JobNotFound):
            call(ObjectId())


def test_indexes_are_made_once(uri, namespace):
    one = Queue(uri, namespace).sync
    assert one.missing_indexes() == list(INDEXES)
    assert one.create_indexes() == list(INDEXES)
    assert one.create_indexes() == one.missing_indexes() == []
    one.close()


def test_a_closed_queue_opens_again_when_it_is_used(jobs, raw):
    jobs.put("mail")
    jobs.close()
    jobs.close()
    jobs.put("mail")
    assert raw.count_documents({}) == 2


def test_threads_may_share_a_queue(jobs, raw):
    errors: list[BaseException] = []

    def put() -> None:
        try:
            for n in range(10):
                jobs.put("mail", {"n": n})
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=put) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    assert raw.count_documents({}) == 40


async def test_a_sync_put_wakes_a_runner_of_the_same_process(queue, seen):
    queue.handler("mail")(lambda job: None)
    async with queue.running("worker"):
        put = queue.sync.put("mail")
        await seen.wait("try", job=put.id, outcome="success")
    assert seen.of("job.woken", job=put.id)[0]["source"] == "put"


async def test_a_sync_retry_wakes_a_runner_of_the_same_process(queue, seen, raw):
    queue.handler("mail")(lambda job: None)
    id_ = ObjectId()
    raw.insert_one(
        {"_id": id_, "status": 5, "tries": [], "created": FAR, "runat": FAR, "data": {}, "retries": 0,
         "retryinterval": Int64(0), "kind": "mail"}
    )  # fmt: skip
    async with queue.running("worker"):
        queue.sync.retry(id_)
        await seen.wait("try", job=id_, outcome="success")
