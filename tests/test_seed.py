"""Every behaviour that the original's own tests state, by its name, through both APIs."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import bson
import pytest

from streamjobs import Job, Queue, Status
from streamjobs.job import CODEC
from streamjobs.original import Runner, put

SEED = [
    json.loads(line) for line in (Path(__file__).parent / "seed" / "documents.jsonl").read_text().splitlines()
]


class Ours:
    """The queue's own names."""

    name = "queue"

    def __init__(self, queue: Queue, uri: str) -> None:
        self.queue = queue

    async def put(self, kind: str, retries: int = 0, interval_ms: float = 0, **data: Any) -> Job:
        return await self.queue.put(kind, data, retries=retries, retry_interval=interval_ms / 1000)

    @asynccontextmanager
    async def running(self, name: str, kind: str, fn: Callable[[Job], Any]) -> AsyncIterator[None]:
        self.queue.handler(kind)(fn)
        async with self.queue.running(name, concurrency=1):
            yield


class Originals:
    """The original's names."""

    name = "original"

    def __init__(self, queue: Queue, uri: str) -> None:
        self.queue, self.uri = queue, uri

    async def put(self, kind: str, retries: int = 0, interval_ms: float = 0, **data: Any) -> Job:
        job = Job.new(kind)
        job.data.update(data)
        job.retries, job.retryinterval = retries, int(interval_ms * 1_000_000)
        await put(self.queue, job)
        return job

    @asynccontextmanager
    async def running(self, name: str, kind: str, fn: Callable[[Job], Any]) -> AsyncIterator[None]:
        runner = Runner(name, self.queue, kind, fn)
        assert (runner.name, runner.kind, runner.err, runner.stopped.is_set()) == (name, kind, None, False)
        await runner.start()
        yield
        runner.stop()
        await runner.stopped.wait()
        assert runner.err is None


@pytest.fixture(params=[Ours, Originals], ids=["queue", "original"])
def api(request: pytest.FixtureRequest, queue: Queue, uri: str) -> Any:
    return request.param(queue, uri)


@pytest.mark.parametrize("one", SEED, ids=[one["name"] for one in SEED])
def test_each_document_of_the_original_is_written_back_to_the_same_bytes(one):
    raw = bytes.fromhex(one["bson_hex"])
    job = Job.from_document(bson.decode(raw, CODEC))
    assert bson.encode(job.to_document(), codec_options=CODEC) == raw


@pytest.mark.parametrize(
    "one", [one for one in SEED if one["name"].startswith("new")], ids=lambda one: one["name"]
)
async def test_documents_that_the_original_put_are_run_from_the_server(one, queue, raw, seen):
    document = bson.decode(bytes.fromhex(one["bson_hex"]), CODEC)
    raw.insert_one(document)

    @queue.handler("notifications")
    async def handle(job):
        assert job.data == document["data"]

    async with queue.running("runner-1"):
        await seen.wait("try", job=document["_id"], outcome="success")


async def test_a_new_job_has_empty_tries_status_1_and_its_data_back(api, raw):
    job = await api.put("mail", to="ann", n=7)
    stored = raw.find_one({"_id": job.id})
    assert stored["tries"] == []
    assert stored["status"] == 1
    assert stored["data"] == {"to": "ann", "n": 7}
    assert list(stored) == [
        "_id",
        "status",
        "tries",
        "created",
        "runat",
        "data",
        "retries",
        "retryinterval",
        "kind",
    ]


async def test_three_jobs_of_one_kind_run_in_the_order_they_were_put(api, seen):
    ran = []

    def handle(job):
        ran.append(job.data["n"])

    jobs = [await api.put("mail", n=n) for n in range(3)]
    async with api.running("runner-1", "mail", handle):
        await seen.wait("try", count=3)
    assert ran == [0, 1, 2]
    for job in jobs:
        after = await api.queue.get(job.id)
        assert after.state == "success"
        assert [(one.runner, one.err) for one in after.history] == [("runner-1", None)]


async def test_a_job_with_retries_5_that_fails_three_times_has_four_tries_and_success(api, seen):
    times = 0

    def handle(job):
        nonlocal times
        if job.data["n"] == 1:
            times += 1
            if times <= 3:
                raise ValueError("something went wrong")

    jobs = [await api.put("mail", retries=5, interval_ms=1, n=n) for n in range(3)]
    async with api.running("runner-1", "mail", handle):
        await seen.wait("try", count=3, outcome="success")
    first, flaky, last = [await api.queue.get(job.id) for job in jobs]
    assert [one.state for one in (first, flaky, last)] == ["success"] * 3
    assert [bool(one.err) for one in flaky.history] == [True, True, True, False]
    assert flaky.history[0].err == "something went wrong"
    assert len(first.tries) == len(last.tries) == 1


async def test_a_job_with_retries_5_that_always_fails_has_five_tries_and_failed(api, seen):
    def handle(job):
        if job.data["n"] == 1:
            raise ValueError("something went wrong")

    jobs = [await api.put("mail", retries=5, interval_ms=1, n=n) for n in range(3)]
    async with api.running("runner-1", "mail", handle):
        await seen.wait("try", job=jobs[1].id, status="failed")
        await seen.wait("try", count=2, outcome="success")
    after = await api.queue.get(jobs[1].id)
    assert (after.state, len(after.tries), after.retries) == ("failed", 5, 0)
    assert all(one.err for one in after.history)


async def test_a_runner_of_kind_thing_leaves_jobs_of_kind_anotherthing_alone(api, seen):
    other = await api.put("anotherthing")
    mine = await api.put("thing")
    async with api.running("runner-1", "thing", lambda job: None):
        await seen.wait("try", job=mine.id, outcome="success")
    after = await api.queue.get(other.id)
    assert (after.status, after.tries) == (Status.NEW, [])


@pytest.mark.parametrize("retries", [0, 1])
async def test_a_job_with_retries_0_or_1_is_tried_once_and_failed(api, seen, retries):
    def handle(job):
        raise ValueError("no")

    job = await api.put("mail", retries=retries, interval_ms=1)
    async with api.running("runner-1", "mail", handle):
        await seen.wait("try", status="failed")
    after = await api.queue.get(job.id)
    assert (after.state, len(after.tries), after.retries) == ("failed", 1, retries - 1)


async def test_a_job_with_a_future_date_runs_at_it(api, seen):
    job = await api.queue.put("mail", delay=0.4)
    async with api.running("runner-1", "mail", lambda job: None):
        (event,) = await seen.wait("try", job=job.id)
    assert event["started_ms"] >= 0
