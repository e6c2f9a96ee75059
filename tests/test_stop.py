"""Stopping: in order, within its deadline and a second."""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress

import pytest
from pymongo.errors import AutoReconnect

from streamjobs import ConnectError, HandlerError, Queue
from streamjobs.clock import boot
from streamjobs.embedded import Server


async def test_running_handlers_may_end_until_the_deadline(queue, seen):
    go = asyncio.Event()

    @queue.handler("mail")
    async def mail(job):
        await go.wait()

    async with queue.running("w", stop_deadline=20) as runner:
        job = await queue.put("mail")
        await seen.wait("try.started")
        runner.stop()
        await seen.wait("runner.stopping")
        late = await queue.put("mail")
        go.set()
        await seen.wait("runner.stopped")
    assert (await queue.get(job.id)).state == "success"
    assert (await queue.get(late.id)).state == "new"


async def test_a_handler_ended_by_its_cancellation_is_put_back_uncharged(queue, seen):
    @queue.handler("mail", retries=3)
    async def mail(job):
        await asyncio.Event().wait()

    async with queue.running("w", stop_deadline=0.2) as runner:
        job = await queue.put("mail")
        await seen.wait("try.started")
        began = boot()
        runner.stop()
        await seen.wait("runner.stopped")
        assert boot() - began < 1.2
    after = await queue.get(job.id)
    assert (after.state, after.retries, [one.outcome for one in after.history]) == ("new", 3, ["interrupted"])
    assert "lease" not in after.extra
    assert after.history[0].err.startswith("interrupted")


async def test_what_a_claim_brings_after_stop_is_released_unbegun_and_uncharged(queue, seen, failpoint):
    """Guard: Executor.close. The claim is under way when stop is asked for."""
    ran = []
    queue.handler("mail", retries=1)(lambda job: ran.append(job.id))
    async with queue.running("w") as runner:
        await seen.wait("runner.started")
        failpoint({"times": 1}, "streamjobs/runner", ["findAndModify"], blockConnection=True, blockTimeMS=500)
        job = await queue.put("mail")
        while not runner._claimer.in_flight:
            await asyncio.sleep(0)
        runner.stop()
        await seen.wait("runner.stopped")
    after = await queue.get(job.id)
    assert (after.state, after.retries, [one.outcome for one in after.history]) == ("new", 1, ["released"])
    assert not ran


async def test_a_job_that_may_start_once_and_was_interrupted_is_failed(queue, seen):
    @queue.handler("mail", retries=1)
    async def mail(job):
        await asyncio.Event().wait()

    async with queue.running("w", stop_deadline=0.1):
        job = await queue.put("mail")
        await seen.wait("try.started")
    after = await queue.get(job.id)
    assert (after.state, [one.outcome for one in after.history]) == ("failed", ["interrupted"])


async def test_a_second_stop_cancels_at_once(queue, seen):
    @queue.handler("mail", retries=3)
    async def mail(job):
        await asyncio.Event().wait()

    async with queue.running("w", stop_deadline=60) as runner:
        await queue.put("mail")
        await seen.wait("try.started")
        began = boot()
        runner.stop()
        runner.stop()
        await seen.wait("runner.stopped")
        assert boot() - began < 1.5


async def test_a_thread_that_outlasts_stop_stays_held_and_is_recorded_when_it_ends(queue, raw, seen):
    go = threading.Event()
    queue.handler("mail", retries=3)(lambda job: go.wait(30))
    fast = {"lease": 10, "beat": 0.3, "margin": 0.3}
    async with queue.running("w", stop_deadline=0.1, **fast) as runner:
        job = await queue.put("mail")
        await seen.wait("try.started")
        began = boot()
        runner.stop()
        await seen.wait("runner.stopped", held=1)
        assert boot() - began < 1.1
        await seen.wait("handler.stuck", job=job.id)
    ends = raw.find_one({"control": "runner"})["ends"]
    async with queue.running("other", interval=0.3, **fast):
        while raw.find_one({"control": "runner", "name": "w"})["ends"] == ends:  # the beat goes on
            await seen.wait("lease.registered")
            await asyncio.sleep(0)
        assert (await queue.get(job.id)).state == "working"
        go.set()
        await seen.wait("try", job=job.id, outcome="success")
    after = await queue.get(job.id)
    assert (after.state, len(after.tries)) == ("success", 1)
    for thread in threading.enumerate():
        if thread.name.startswith("streamjobs beat"):
            await asyncio.to_thread(thread.join, 5)
    assert raw.find_one({"control": "runner"}) is None


async def test_a_handler_that_swallows_its_cancellation_is_named_and_stays_held(queue, seen):
    go = asyncio.Event()

    @queue.handler("mail", retries=3)
    async def mail(job):
        while not go.is_set():
            with suppress(asyncio.CancelledError):
                await go.wait()

    async with queue.running("w", stop_deadline=0.1) as runner:
        job = await queue.put("mail")
        await seen.wait("try.started")
        runner.stop()
        await seen.wait("runner.stopped", held=1)
    assert (await queue.get(job.id)).state == "working"
    go.set()
    await seen.wait("try", job=job.id)
    assert (await queue.get(job.id)).state == "success"


async def test_a_cancelled_handler_may_await_its_cleanup(queue, seen):
    cleaned = asyncio.Event()

    @queue.handler("mail", retries=3)
    async def mail(job):
        try:
            await asyncio.Event().wait()
        finally:
            for _ in range(3):
                await asyncio.sleep(0)
            cleaned.set()

    async with queue.running("w", stop_deadline=0.1):
        job = await queue.put("mail")
        await seen.wait("try.started")
    assert cleaned.is_set()
    assert [one.outcome for one in (await queue.get(job.id)).history] == ["interrupted"]


async def test_a_handler_whose_task_somebody_else_cancels_is_a_failed_try(queue, seen):
    """Guard: Executor._one. The slot is free again, and the job does not stay in hand."""

    @queue.handler("mail")
    async def mail(job):
        if job.data.get("bad"):
            asyncio.current_task().cancel()
            await asyncio.Event().wait()

    async with queue.running("w", concurrency=1):
        bad = await queue.put("mail", {"bad": True})
        await seen.wait("try", job=bad.id, outcome="failure")
        good = await queue.put("mail")
        await seen.wait("try", job=good.id, outcome="success")


async def test_a_run_that_is_cancelled_while_it_drains_still_ends_what_it_held(queue, seen):
    """Guard: Stopper.drained. stop(), then a wait that gives up: the usual idiom."""
    ended = asyncio.Event()

    @queue.handler("mail", retries=3)
    async def mail(job):
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    runner = queue.runner("w", stop_deadline=60)
    task = asyncio.create_task(runner.run())
    await seen.wait("runner.started")
    job = await queue.put("mail")
    await seen.wait("try.started")
    runner.stop()
    await seen.wait("runner.stopping")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()
    assert [one.outcome for one in (await queue.get(job.id)).history] == ["interrupted"]


async def test_a_claim_without_an_answer_is_released_at_stop(queue, seen, failpoint):
    """Guard: Claimer.tokens after the end. The claim was carried out, its reply lost, and stop came first."""
    ran = []
    queue.handler("mail", retries=1)(lambda job: ran.append(job.id))
    async with queue.running("w") as runner:
        await seen.wait("runner.started")
        fault = {"code": 64, "errmsg": "waiting for replication timed out"}
        failpoint({"times": 5}, "streamjobs/runner", ["findAndModify"], writeConcernError=fault)
        job = await queue.put("mail")
        await seen.wait("claim.unknown")
        runner.stop()
        await seen.wait("runner.stopped")
    after = await queue.get(job.id)
    assert not ran
    assert (after.state, after.retries) == ("new", 1)


async def test_the_end_of_a_lifespan_by_an_error_stops_in_order(queue, seen):
    @queue.handler("mail", retries=3)
    async def mail(job):
        await asyncio.Event().wait()

    with pytest.raises(ZeroDivisionError):
        async with queue.running("w", stop_deadline=0.1):
            job = await queue.put("mail")
            await seen.wait("try.started")
            raise ZeroDivisionError
    assert (await queue.get(job.id)).state == "new"


async def test_a_cancelled_run_puts_back_what_it_held(queue, seen):
    @queue.handler("mail", retries=3)
    async def mail(job):
        await asyncio.Event().wait()

    task = asyncio.create_task(queue.run("w", signals=False))
    await seen.wait("runner.started")
    job = await queue.put("mail")
    await seen.wait("try.started")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    after = await queue.get(job.id)
    assert (after.state, [one.outcome for one in after.history]) == ("new", ["interrupted"])


@pytest.mark.parametrize("moment", ["try.started", "runner.started", "lease.registered", "stream.state"])
@pytest.mark.parametrize("running", [False, True], ids=["run", "running"])
async def test_a_run_that_is_cancelled_again_and_again_leaves_nothing(queue, raw, seen, moment, running):
    """Guard: to_the_end. What cancels once may do so again: two timeouts, a task group, an impatient program."""

    @queue.handler("mail", retries=3)
    async def mail(job):
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)

    async def run():
        if not running:
            await queue.run("w", signals=False)
            return
        async with queue.running("w", stop_deadline=60):
            await asyncio.Event().wait()

    def threads():  # of the loop's pool there may be more
        return {one.name for one in threading.enumerate() if not one.name.startswith("asyncio_")}

    before = threads()
    job = await queue.put("mail")
    task = asyncio.create_task(run())
    await seen.wait(moment)
    while not task.done():
        task.cancel()
        await asyncio.sleep(0)
    assert task.cancelled()
    assert [one for one in asyncio.all_tasks() if "streamjobs" in one.get_name()] == []
    assert threads() <= before
    assert seen.of("runner.stopped")
    assert raw.count_documents({"control": "runner"}) == 0
    assert (await queue.get(job.id)).state == "new"


@pytest.mark.parametrize("how", ["killed", "paused"])
async def test_stop_returns_in_time_though_the_server_is_away_or_silent(how, own_server: Server, seen):
    async with Queue(own_server.uri, "app.jobs") as queue:
        await queue.create_indexes()

        @queue.handler("mail", retries=3)
        async def mail(job):
            await asyncio.Event().wait()

        async with queue.running("w", stop_deadline=0.5) as runner:
            await queue.put("mail")
            await seen.wait("try.started")
            (own_server.kill if how == "killed" else own_server.pause)()
            began = boot()
            runner.stop()
            await seen.wait("runner.stopped")
            assert boot() - began < 1.8  # deadline and a second, and what a busy machine takes
        own_server.resume()
    for thread in threading.enumerate():
        if thread.name.startswith("streamjobs beat"):
            await asyncio.to_thread(thread.join, 10)


async def test_a_runner_without_a_server_says_so(monkeypatch, driver_litter):
    monkeypatch.setattr("streamjobs.clients.COMMAND_TIMEOUT", 0.5)
    queue = Queue("mongodb://127.0.0.1:1/?serverSelectionTimeoutMS=300", "app.jobs")
    queue.handler("mail")(lambda job: None)
    with pytest.raises(ConnectError, match="no MongoDB server answers"):
        await queue.run("w", signals=False)


async def test_a_runner_that_is_still_connecting_stops_when_asked(driver_litter):
    queue = Queue("mongodb://127.0.0.1:1/", "app.jobs")
    queue.handler("mail")(lambda job: None)
    runner = queue.runner("w")
    task = asyncio.create_task(runner.run())
    await asyncio.sleep(0)
    began = boot()
    runner.stop()
    await task
    assert boot() - began < 5  # not the ten seconds that connecting gets


async def test_a_queue_without_handlers_does_not_run(queue):
    with pytest.raises(HandlerError, match="register"):
        await queue.run("w", signals=False)


@pytest.mark.parametrize("role", ["sweeper", "fleet", "finisher"])
async def test_a_role_whose_cancellation_the_driver_makes_an_error_of_ends_all_the_same(queue, seen, role):
    """Guard: going, in each role's loop; stop waits for a role for no longer than a moment."""
    inside = asyncio.Event()

    async def swallow(*_):
        inside.set()
        until = boot() + 0.6
        while (left := until - boot()) > 0:
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(60 if not asyncio.current_task().cancelling() else left)
        raise AutoReconnect("operation cancelled")

    queue.handler("mail")(lambda job: None)
    before = asyncio.all_tasks()
    async with queue.running("w", stop_deadline=1) as runner:
        if role == "sweeper":
            runner._sweeper.sweep = swallow
            runner._sweeper.wake()
        elif role == "fleet":
            runner._fleet._look = swallow
            runner._fleet._work.set()
        else:
            runner._finisher._write = swallow
            await queue.put("mail")
        await asyncio.wait_for(inside.wait(), 10)
    left = {one for one in asyncio.all_tasks() - before if one.get_name().startswith("streamjobs")}
    if left:
        _, left = await asyncio.wait(left, timeout=5)
    assert not left
