"""The public API as a user would write it; only type-checked, by ``mypy --strict tests/typing_api.py``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, assert_type

from bson import ObjectId
from bson.datetime_ms import DatetimeMS
from pymongo import AsyncMongoClient, MongoClient

import streamjobs
from streamjobs import (
    ASAP,
    BadArgument,
    Cancel,
    Handler,
    Job,
    JobState,
    PutUnknown,
    Queue,
    Runner,
    Settings,
    Snooze,
    Status,
    StreamJobsError,
    SyncQueue,
    Try,
    UnreadableJob,
    current_job,
    subscribe,
)


@dataclass
class Address:
    street: str


jobs = Queue("mongodb://localhost/?replicaSet=rs0", "app.jobs")


@jobs.handler("resize", retries=5, retry_interval=timedelta(seconds=30))
async def resize(job: Job) -> None:
    job.log.info("resizing", image=job.data["image"])
    job.check()


@jobs.handler("mail", retry_interval=1.5)
def mail(to: str, address: Address, *, copies: int = 1) -> Snooze | Cancel | None:
    if current_job().lost:
        return None
    return Snooze(5) if copies else Cancel("no copies")


async def handlers_keep_their_types() -> None:
    assert_type(await resize(Job.new("resize")), None)
    assert_type(mail("ann", Address("s"), copies=2), Snooze | Cancel | None)
    assert_type(jobs.handlers, Mapping[str, Handler])


async def putting() -> None:
    assert_type(await jobs.put("resize", {"image": 7}, delay=60), Job)
    await jobs.put("resize", delay=timedelta(hours=1), retries=3, retry_interval=2.5, id=ObjectId())
    await jobs.put("resize", at=datetime.now(UTC) + timedelta(hours=1))
    try:
        await jobs.put(Job.new("resize"))
    except PutUnknown as unknown:
        assert_type(unknown.jobs, list[Job])
        await jobs.put_many(unknown.jobs)
    except BadArgument as wrong:
        assert_type(wrong.name, str)
    assert_type(await jobs.put_many(jobs.job("resize", {"n": n}) for n in range(3)), list[Job])


async def looking() -> None:
    job = await jobs.get(ObjectId())
    assert_type(job, Job)
    assert_type(job.id, ObjectId | Any)
    assert_type(job.status, int)
    assert_type(job.state, str)
    assert_type(job.data, dict[str, Any])
    assert_type(job.runat, datetime | DatetimeMS)
    assert_type(job.history, list[Try])
    assert_type(job.number, int)
    assert_type(job.asap, bool)
    assert_type(Status.parse("new"), Status)
    assert_type(await jobs.list(kind="resize", status="new", due=True, limit=5), list[Job])
    assert_type(await jobs.list(status=Status.FAILED), list[Job])
    assert_type(await jobs.count(), dict[str, dict[str, int]])
    try:
        assert_type(await jobs.retry(job.id, force=True), Job)
        assert_type(await jobs.cancel(job.id, "why"), Job)
    except (JobState, UnreadableJob) as error:
        raise StreamJobsError from error
    for index in [*await jobs.missing_indexes(), *await jobs.create_indexes()]:
        assert_type(index.name, str)


async def running() -> None:
    async with jobs, jobs.running("worker-1", concurrency=20, interval=5.0) as runner:
        assert_type(runner, Runner)
    await jobs.run("worker-1", concurrency=20)
    Settings(concurrency=5, poll=None)


async def transactions(client: AsyncMongoClient[dict[str, Any]]) -> None:
    own = Queue(client.app.jobs, connect="mongodb://localhost/")
    async with client.start_session() as session, await session.start_transaction():
        await own.put("resize", session=session)
        await own.put_many([own.job("resize")], session=session)


def without_a_loop(client: MongoClient[dict[str, Any]]) -> None:
    queue = Queue(client.app.jobs).sync
    assert_type(queue, SyncQueue)
    with client.start_session() as session, session.start_transaction():
        assert_type(queue.put("resize", {"image": 7}, delay=1, session=session), Job)
    assert_type(queue.put_many([Job.new("resize")]), list[Job])
    assert_type(queue.get(ObjectId()), Job)
    assert_type(queue.list(status="failed"), list[Job])
    assert_type(queue.count(), dict[str, dict[str, int]])
    assert_type(queue.retry(ObjectId()), Job)
    assert_type(queue.cancel(ObjectId(), "why"), Job)
    queue.close()


def connected_by_a_function(client: AsyncMongoClient[dict[str, Any]]) -> Queue:
    def connect(cls: type[Any], **options: Any) -> Any:
        return cls("mongodb://localhost/", **options)

    return Queue(client.app.jobs, connect=connect)


def listening() -> None:
    def told(name: str, level: str, fields: dict[str, Any]) -> None:
        print(name, level, fields)

    with subscribe(told):
        pass


assert_type(ASAP, datetime)
assert_type(streamjobs.__version__, str)
