"""A program that ends while a runner still runs in it: ``asyncio.run`` cancels all tasks at once, the runner's own too."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace

import pytest

from streamjobs import Queue
from streamjobs.job import Job
from streamjobs.runner import runner, stop
from streamjobs.runner.execute import Executor
from streamjobs.runner.held import Held
from tests.documents import plain

FAST = {"lease": 10, "beat": 0.3, "margin": 0.3}


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """Stop's steps may take a moment on a busy machine."""
    monkeypatch.setattr(stop, "FLUSHED", 20.0)
    monkeypatch.setattr(stop, "CLOSED", 20.0)
    monkeypatch.setattr(runner, "CLOSED", 20.0)


def cut_short(uri, namespace, seen, handler, *, before=lambda: None, count=1, begun=None):
    """``asyncio.run`` of a program that returns when ``count`` handlers have begun, and leaves its runner to the end of the loop."""
    tasks = set()

    async def program():
        jobs = Queue(uri, namespace)
        jobs.handler("mail", retries=3)(handler)
        tasks.add(asyncio.create_task(jobs.run("w", stop_deadline=20, **FAST)))
        await seen.wait("runner.started")
        before()
        job = await jobs.put("mail")
        await seen.wait("try.started", count=count)
        while begun is not None and not begun.is_set():
            await asyncio.sleep(0)
        await jobs.close()
        return job.id

    return asyncio.run(program())


def beats_over():
    for thread in threading.enumerate():
        if thread.name.startswith("streamjobs beat"):
            thread.join(10)


def outcomes(raw, id_):
    found = raw.find_one({"_id": id_})
    return found["status"], found["retries"], [one.get("outcome", one.get("err")) for one in found["tries"]]


def test_a_handler_that_was_cancelled_with_the_runner_is_interrupted_and_not_charged(
    uri, namespace, raw, seen
):
    """Guards: the handler waits a turn to hear of a stop; the outcome is written though its task was cancelled."""

    async def forever(job):
        await asyncio.Event().wait()

    def others():  # all are cancelled in the order of a set: some before the runner
        raw.insert_many([plain(kind="mail", retries=3) for _ in range(9)])

    cut_short(uri, namespace, seen, forever, before=others, count=10)
    assert [outcomes(raw, one["_id"]) for one in raw.find({"kind": "mail"})] == 10 * [(1, 3, ["interrupted"])]
    beats_over()
    assert raw.count_documents({"control": "runner"}) == 0


@pytest.mark.parametrize("wait", [0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3])
def test_a_stop_that_is_itself_cancelled_is_done_again(wait, uri, namespace, raw, seen, failpoint):
    """Guard: surely_done. The end of asyncio.run comes so many seconds after the runner's cancellation."""

    async def forever(job):
        await asyncio.Event().wait()

    async def program():
        jobs = Queue(uri, namespace)
        jobs.handler("mail", retries=3)(forever)
        running = asyncio.create_task(jobs.run("w", stop_deadline=20, **FAST))
        await seen.wait("runner.started")
        job = await jobs.put("mail")
        await seen.wait("try.started")
        await jobs.close()
        # the stop is under way for as long as its outcome is
        failpoint({"times": 1}, "streamjobs/runner", ["update"], blockConnection=True, blockTimeMS=500)
        running.cancel()
        await asyncio.sleep(wait)
        return job.id

    id_ = asyncio.run(program())
    beats_over()
    assert outcomes(raw, id_) == (1, 3, ["interrupted"])
    assert raw.count_documents({"control": "runner"}) == 0
    assert len(seen.of("runner.stopped")) == 1


def test_an_outcome_on_its_way_is_written_all_the_same(uri, namespace, raw, seen, failpoint):
    """Guard: Finisher.begin_again."""
    ended = threading.Event()

    async def short(job):
        ended.set()

    def slow():
        failpoint({"times": 1}, "streamjobs/runner", ["update"], blockConnection=True, blockTimeMS=300)

    id_ = cut_short(uri, namespace, seen, short, before=slow)
    assert ended.is_set()
    assert outcomes(raw, id_) == (4, 3, [None])
    assert len(seen.of("try", job=id_, outcome="success")) == 1


def test_a_thread_keeps_its_job_until_it_ends(uri, namespace, raw, seen):
    """Guard: the task of a thread outlasts its cancellation, so that the stop leaves it to the beat."""
    go, begun, ran = threading.Event(), threading.Event(), []

    def slow(job):
        ran.append(job.id)
        begun.set()
        go.wait(30)

    id_ = cut_short(uri, namespace, seen, slow, begun=begun)
    assert seen.of("handler.stuck", job=id_)
    assert seen.of("runner.stopped", held=1)
    found = raw.find_one({"_id": id_})
    assert found["status"] == 2
    assert raw.count_documents({"control": "runner", "_id": f"runner:{found['lease']['owner']}"}) == 1
    go.set()
    beats_over()
    assert outcomes(raw, id_) == (4, 3, [None])
    assert ran == [id_]


def test_a_thread_whose_task_alone_was_cancelled_ends_as_it_does(uri, namespace, raw, seen):
    """Guard: the same, while the runner goes on; its slot stays taken."""
    go, loops = threading.Event(), []

    async def program():
        jobs = Queue(uri, namespace)

        @jobs.handler("mail", retries=3)
        def slow(job):
            loops.append(job.id)
            go.wait(30)

        async with jobs.running("w", concurrency=1, **FAST):
            job = await jobs.put("mail")
            await seen.wait("try.started", job=job.id)
            while not loops:
                await asyncio.sleep(0)
            task = next(one for one in asyncio.all_tasks() if one.get_name().startswith("streamjobs try"))
            task.cancel()
            other = await jobs.put("mail")
            await seen.wait("job.woken", job=other.id)
            assert not task.done()
            go.set()
            await seen.wait("try", count=2, outcome="success")
        await jobs.close()
        return job.id

    assert outcomes(raw, asyncio.run(program())) == (4, 3, [None])


async def test_a_handlers_own_cancellation_is_its_failure_while_the_runner_goes_on(queue, seen):
    @queue.handler("mail", retries=1)
    async def mail(job):
        asyncio.current_task().cancel()
        await asyncio.sleep(0)

    async with queue.running("w"):
        job = await queue.put("mail")
        await seen.wait("try", job=job.id, outcome="failure", error="CancelledError")


@pytest.mark.parametrize("asynchronous", [True, False], ids=["async", "thread"])
async def test_one_that_was_cancelled_before_its_first_line_is_released(asynchronous):
    """Guard: Executor._unbegun. Its coroutine never ran, so that nothing in it could give the slot back."""
    ended, ran = [], []
    executor = Executor(1, lambda held, how: ended.append((held, how.outcome)), lambda *_: None)
    handler = SimpleNamespace(
        asynchronous=asynchronous, function=ran.append, arguments=lambda job: ((job,), {})
    )
    held = made(handler)
    executor.start(held)
    held.task.cancel()
    await executor.empty()
    assert executor.room()[0] == 1
    assert ended == [(held, "released")]
    assert not executor.abandon()
    assert not ran


async def test_a_thread_that_has_not_begun_does_not(monkeypatch):
    """Guard: what is withdrawn before a thread has it is not called any more."""
    ended, ran = [], []
    executor = Executor(1, lambda held, how: ended.append((held, how.outcome, held.started)), lambda *_: None)
    late = []

    async def queued(call, **_):
        late.append(call)
        await asyncio.Event().wait()

    monkeypatch.setattr("streamjobs.runner.execute.to_thread.run_sync", queued)
    held = made(SimpleNamespace(asynchronous=False, function=ran.append, arguments=lambda job: ((job,), {})))
    executor.start(held)
    while not late:
        await asyncio.sleep(0)
    held.task.cancel()
    await executor.empty()
    assert ended == [(held, "released", None)]
    assert late[0]().outcome == "released"
    assert not ran


@pytest.mark.parametrize("cancelled", [True, False], ids=["cancelled", "begun late"])
async def test_a_thread_that_stop_left_behind_before_it_began_is_released_once(cancelled, monkeypatch):
    """Guard: what is abandoned is told of although its handler is never called; the beat would wait for ever."""
    ran, told, late, go = [], [], [], asyncio.Event()

    async def queued(call, **_):
        late.append(call)
        await go.wait()
        return call()

    monkeypatch.setattr("streamjobs.runner.execute.to_thread.run_sync", queued)
    executor = Executor(1, lambda *_: told.append("ended"), lambda _held, how: told.append(how.outcome))
    held = made(SimpleNamespace(asynchronous=False, function=ran.append, arguments=lambda job: ((job,), {})))
    executor.start(held)
    while not late:
        await asyncio.sleep(0)
    assert executor.abandon() == [held]
    if cancelled:
        held.task.cancel()
    go.set()
    await executor.empty()
    if cancelled:
        late[0]()  # a thread has it after all
    assert told == ["released"]
    assert not ran


def made(handler):
    """A job in hand whose lease always holds."""
    return Held(
        job=Job.from_document(plain(kind="mail", retries=3)), handler=handler, runner="w", owner="o", token="t",
        claimed_at=None, due=0.0, seen=0.0, claimed=0.0, vouch=SimpleNamespace(holds=lambda _owner: True),
    )  # fmt: skip
