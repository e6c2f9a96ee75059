"""What a handler has for itself: its context variables, its copy of the job, its task."""

from __future__ import annotations

import asyncio
import signal
import sys
from contextvars import ContextVar

import pytest
from pymongo import AsyncMongoClient, MongoClient, monitoring

from streamjobs import ConfigError, HandlerError
from tests.documents import plain

NOTE: ContextVar[str] = ContextVar("note", default="")


class Limits(monitoring.CommandListener):
    """The time limit of each command that a handler sends; None where it has none."""

    def __init__(self):
        self.told = []

    def started(self, event):
        if event.command_name == "find":
            self.told.append(event.command.get("maxTimeMS"))

    def succeeded(self, event): ...
    def failed(self, event): ...


@pytest.mark.parametrize("ahead", [False, True], ids=["in a free slot", "after another"])
@pytest.mark.parametrize("sort", ["async", "thread"])
async def test_a_handlers_own_commands_have_no_deadline_of_the_runners(sort, ahead, uri, queue, raw, seen):
    """Guard: the handler's context is not the claim loop's. A handler of over ten seconds could ask nothing else."""
    limits = Limits()

    async def work(job):
        async with AsyncMongoClient(uri, event_listeners=[limits]) as client:
            await client.other.things.find_one({"_id": 1})

    def work_in_thread(job):
        with MongoClient(uri, event_listeners=[limits]) as client:
            client.other.things.find_one({"_id": 1})

    queue.handler("mail")(work if sort == "async" else work_in_thread)
    raw.insert_many([plain(kind="mail", retries=5) for _ in range(4 if ahead else 1)])
    async with queue.running("w", concurrency=1):
        done = await seen.wait("try", count=4 if ahead else 1)
    assert {one["outcome"] for one in done} == {"success"}
    assert limits.told == [None] * len(done)


async def test_what_a_handler_sets_is_not_seen_by_the_next_and_what_the_program_set_is_by_all(
    queue, raw, seen
):
    """Guard: each has its own copy of the context in which the runner was started."""
    noted = []

    @queue.handler("mail")
    async def mail(job):
        noted.append(NOTE.get())
        NOTE.set(f"by {job.id}")

    NOTE.set("by the program")
    raw.insert_many([plain(kind="mail", retries=5) for _ in range(30)])
    async with queue.running("w", concurrency=2):
        await seen.wait("try", count=30)
    assert noted == ["by the program"] * 30


def _as_text(job):
    job.id = str(job.id)


def _no_id(job):
    job.id = object()


def _odd(job):
    job.kind, job.status, job.retries, job.retryinterval, job.runat = "other", "done", "x", None, None
    job.tries.clear()
    job.tries = None


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("change", [_as_text, _no_id, _odd])
async def test_what_a_handler_changes_in_its_job_changes_nothing_of_its_outcome(
    change, fails, queue, raw, seen
):
    """Guard: the handler's own copy. With the runner's a job stayed working for as long as its runner lived."""

    @queue.handler("mail", retries=2)
    async def mail(job):
        change(job)
        if fails:
            raise ValueError("no")

    async with queue.running("w") as runner:
        job = await queue.put("mail")
        (told,) = await seen.wait("try")
        assert told["job"] == str(job.id)
        if fails:
            await seen.wait("try", count=2)
        await runner._finisher.flushed()
        assert not runner._claimer.held
    after = await queue.get(job.id)
    assert after.state == ("failed" if fails else "success")
    assert len(after.tries) == (2 if fails else 1)
    assert (after.kind, after.retries) == ("mail", 0 if fails else 2)


@pytest.mark.skipif(sys.version_info < (3, 12), reason="there are no eager tasks before Python 3.12")
async def test_a_loop_with_eager_tasks_frees_the_slots(queue, seen):
    """Guard: the plain task. An eager one had ended before it was counted, and was counted for ever."""
    asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)
    queue.handler("mail", retries=1)(_nothing)
    async with queue.running("w", concurrency=2):
        await queue.put_many([queue.job("mail") for _ in range(8)])
        await seen.wait("try", outcome="success", count=8)


async def _nothing(job): ...


async def test_a_task_that_outlives_its_handler_may_put_after_the_lease_is_gone(queue, raw, seen):
    """Guard: only a try that has not ended is asked for its lease."""
    go, put = asyncio.Event(), []

    @queue.handler("mail")
    async def mail(job):
        async def later():
            await go.wait()
            return await queue.put("other")

        put.append(asyncio.create_task(later()))

    async with queue.running("w", lease=1.5, beat=0.3, margin=0.3) as runner:
        await queue.put("mail")
        await seen.wait("try", outcome="success")
        raw.delete_one({"_id": f"runner:{runner.owner}"})
        await seen.wait("lease.lost")
        go.set()
        assert (await put[0]).kind == "other"


async def _async_generator(job):
    yield 1


def _generator(job):
    yield 1


@pytest.mark.parametrize("function", [_async_generator, _generator])
async def test_a_generator_is_refused_since_a_call_of_it_runs_nothing(function, queue):
    with pytest.raises(HandlerError, match="generator"):
        queue.handler("mail")(function)


async def test_a_handler_that_returns_what_nobody_awaits_has_failed(queue, seen):
    queue.handler("mail")(lambda job: (one for one in ()))

    @queue.handler("other")
    async def other(job):
        return asyncio.get_running_loop().create_future()

    async with queue.running("w"):
        await queue.put("mail")
        await queue.put("other")
        failed = await seen.wait("try", count=2)
    assert {one["outcome"] for one in failed} == {"failure"}
    assert sorted(one["message"].split(":")[0] for one in failed) == [
        "the handler returned a Future",
        "the handler returned a generator",
    ]


async def test_a_runner_that_is_run_twice_is_refused_and_goes_on(queue, seen):
    queue.handler("mail")(_nothing)
    async with queue.running("w") as runner:
        with pytest.raises(ConfigError, match="has run already"):
            async with runner.running():
                pass
        job = await queue.put("mail")
        await seen.wait("try", job=job.id, outcome="success")


async def test_a_plain_handler_may_stop_its_runner(queue, seen):
    """Guard: stop goes through the loop. A loop in debug mode refuses it from another thread."""
    asyncio.get_running_loop().set_debug(True)
    queue.handler("mail")(lambda job: runner.stop("enough"))
    runner = queue.runner("w")
    running = asyncio.create_task(runner.run())
    await seen.wait("runner.started")
    await queue.put("mail")
    await asyncio.wait_for(running, 30)
    assert seen.of("runner.stopping")[0]["reason"] == "enough"


async def test_a_signal_stops_every_runner_of_the_process(queue, seen):
    """Guard: the runners that signals are told to. Only the last one that had begun was."""
    before = signal.getsignal(signal.SIGTERM)
    queue.handler("mail")(_nothing)
    both = [asyncio.create_task(queue.run(name)) for name in ("a", "b")]
    await seen.wait("runner.started", count=2)
    signal.raise_signal(signal.SIGTERM)
    await asyncio.wait_for(asyncio.gather(*both), 30)
    assert signal.getsignal(signal.SIGTERM) is before
