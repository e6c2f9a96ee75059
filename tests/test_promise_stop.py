"""Promise 4: a clean stop, in time and leaving nothing, whatever the wire does meanwhile."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections import Counter
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path

import pytest
from pymongo import MongoClient

from streamjobs import Queue
from streamjobs.clock import boot
from tests.proxy import Drop, Hold
from tests.test_promise_nothing_lost import is_claim

CLAIMS = {"commands": ("update", "findAndModify"), "app": "streamjobs/runner", "where": is_claim}
FILES = Path("/proc/self/fd")
FAST = {"lease": 2.0, "beat": 0.4, "margin": 0.4}


@pytest.fixture
async def through(proxied, namespace, queue):
    async with Queue(proxied.uri, namespace) as one:
        yield one


@asynccontextmanager
async def lost_claim(proxied, through, seen, jobs, **settings):
    """A runner whose first claim is looked for before it lands; later ones do not get through."""
    hold = Hold(drop=True)
    await through.put_many(jobs)  # before it comes, so that one claim takes them all
    rule = proxied.fault(hold, **CLAIMS, times=1)
    later = proxied.fault(Drop(), **CLAIMS)
    async with through.running("w", concurrency=20, **settings) as runner:
        await rule.hit()
        await seen.wait("claim.settled", count=1)
        assert {(await through.get(job.id)).state for job in jobs} == {"new"}  # looked for, and not there
        hold.release()
        assert await asyncio.to_thread(hold.delivered.wait, 10)
        assert {(await through.get(job.id)).state for job in jobs} == {"working"}  # it has landed
        yield runner, later


@pytest.mark.parametrize("count", [2, 9])
async def test_a_claim_that_lands_after_it_was_looked_for_is_released_as_an_orphan(
    through, proxied, seen, count
):
    """Guard: Sweeper.release_orphans at the fallback. Its owner lives, so nobody else takes it back."""
    ran = Counter()

    @through.handler("mail", retries=1)
    async def mail(job):
        ran[job.id] += 1

    jobs = [through.job("mail") for _ in range(count)]
    async with lost_claim(proxied, through, seen, jobs, interval=1.0) as (_, later):
        landed = boot()
        await seen.wait("orphans.released")
        print(f"FIGURE orphan released {boot() - landed:.2f} s after it landed, period 1 s")
        later.remove()
        await seen.wait("try", count=count, outcome="success")
    for job in jobs:
        after = await through.get(job.id)
        assert (after.state, after.retries, ran[job.id]) == ("success", 1, 1)
        assert [one.outcome for one in after.history] == ["released", None]


async def all_released(through, jobs):
    """Each was claimed and put back, uncharged."""
    for job in jobs:
        after = await through.get(job.id)
        assert (after.state, after.retries, [one.outcome for one in after.history]) == (
            "new",
            1,
            ["released"],
        )


async def test_such_a_claim_is_released_at_stop(through, proxied, seen):
    """Guard: release_orphans in Runner._close. The fallback is far, and stop comes first."""
    ran = []
    through.handler("mail", retries=1)(lambda job: ran.append(job.id))
    jobs = [through.job("mail") for _ in range(4)]
    async with lost_claim(proxied, through, seen, jobs, interval=60) as (runner, _):
        runner.stop()
        await seen.wait("runner.stopped")
    assert not ran
    await all_released(through, jobs)


async def test_a_claim_that_is_under_way_when_stop_is_asked_is_released_unbegun(through, proxied, seen):
    ran = []
    through.handler("mail", retries=1)(lambda job: ran.append(job.id))
    hold = Hold()
    jobs = await through.put_many([through.job("mail") for _ in range(4)])
    rule = proxied.fault(hold, **CLAIMS, times=1)
    async with through.running("w", concurrency=20) as runner:
        await rule.hit()
        runner.stop()
        await seen.wait("runner.stopping")
        hold.release()
        await seen.wait("runner.stopped", held=0)
    assert not ran
    await all_released(through, jobs)


async def test_a_claim_that_lands_after_its_runner_has_gone_comes_back_by_the_lease(
    through, proxied, queue, raw, seen
):
    """Guard: Sweeper._free_missing. Its owner's record went at the clean stop."""
    through.handler("mail", retries=3)(lambda job: None)
    queue.handler("mail", retries=3)(lambda job: None)
    hold = Hold(drop=True)
    jobs = await through.put_many([through.job("mail") for _ in range(4)])
    rule = proxied.fault(hold, **CLAIMS, times=1)
    proxied.fault(Drop(), **CLAIMS)
    async with through.running("w", stop_deadline=0.1, concurrency=20, **FAST):
        await rule.hit()
    assert raw.find_one({"control": "runner"}) is None
    hold.release()
    assert await asyncio.to_thread(hold.delivered.wait, 10)
    assert raw.count_documents({"status": 2}) == 4
    async with queue.running("other", interval=0.5, **FAST):
        await seen.wait("try", count=4, runner="other", outcome="success")
    for job in jobs:
        after = await queue.get(job.id)
        assert (after.retries, [one.outcome for one in after.history]) == (2, ["lost", None])


@pytest.mark.parametrize("handlers", ["none", "async", "threads"])
@pytest.mark.parametrize("state", ["up", "black-holed", "no-primary", "stepped-down"])
async def test_stop_returns_within_its_deadline_and_a_second(through, proxied, seen, state, handlers):
    """``tests/test_stop.py`` has the server killed and frozen."""
    go = threading.Event()

    @through.handler("async", retries=3)
    async def asynchronous(job):
        await asyncio.Event().wait()

    through.handler("threads", retries=3)(lambda job: go.wait(60))
    deadline = 0.5
    async with through.running("w", stop_deadline=deadline, concurrency=20, **FAST) as runner:
        if handlers != "none":
            await through.put_many([through.job(handlers) for _ in range(20)])
            await seen.wait("try.started", count=20)
        with proxied.black_hole() if state == "black-holed" else nullcontext():
            if state == "no-primary":
                proxied.step_down(20)
            elif state == "stepped-down":
                proxied.step_down()
            runner.stop()
            (stopped,) = await seen.wait("runner.stopped")
    print(f"FIGURE stop {state} {handlers}: {stopped['took_ms'] / 1000:.2f} s, deadline {deadline}")
    assert stopped["took_ms"] <= (deadline + 1.0) * 1000
    go.set()
    if state == "no-primary":
        proxied.step_down()  # elect one: what was left running is recorded
    for thread in threading.enumerate():
        if thread.name.startswith("streamjobs beat"):
            await asyncio.to_thread(thread.join, 20)
    if state in ("up", "stepped-down") and handlers == "async":
        assert (await through.count())["async"] == {"new": 20}


def inside():
    """What this process has open: threads by name, tasks, sockets, other files."""
    open_files = Counter()
    for fd in FILES.iterdir():
        try:
            target = str(fd.readlink())
        except OSError:
            continue  # the listing's own
        open_files[target.partition(":")[0] if ":" in target else target] += 1
    return {
        # not those of the loop's own pool, which fills as it is used
        "threads": Counter(one.name for one in threading.enumerate() if not one.name.startswith("asyncio_")),
        "tasks": Counter(task.get_name().rstrip("-0123456789") for task in asyncio.all_tasks()),
        "files": open_files,
    }


@pytest.mark.skipif(not FILES.is_dir(), reason="needs /proc")
async def test_a_hundred_starts_and_stops_leave_no_task_thread_socket_cursor_or_file(
    queue, uri, namespace, seen
):
    queue.handler("mail")(lambda job: None)

    async def once():
        async with queue.running("w"):
            job = await queue.put("mail")
            await seen.wait("try", job=job.id, outcome="success")

    async def settled():
        """What is open, here and at the server, with no client left but one that looks."""
        await queue.close()
        with MongoClient(uri) as looks:
            cursors = looks.admin.command("serverStatus")["metrics"]["cursor"]["open"]["total"]
        for thread in threading.enumerate():
            if thread.name.startswith("pymongo_"):
                await asyncio.to_thread(thread.join, 2)  # the driver's end a turn after close()
        gc.collect()
        return inside(), cursors

    await once()  # what is made once: the loop's threads, the database
    before, open_before = await settled()
    for _ in range(100):
        await once()
    until = boot() + 10
    while True:
        after, open_after = await settled()
        more = {sort: after[sort] - before[sort] for sort in after}
        if (not any(more.values()) and open_after <= open_before) or boot() > until:
            break
        await asyncio.sleep(0.1)  # a server frees a closed connection's things when it notices
    assert more == {"threads": {}, "tasks": {}, "files": {}}
    assert open_after <= open_before
    database, _, name = namespace.partition(".")
    with MongoClient(uri) as looks:
        assert looks[database][name].find_one({"control": "runner"}) is None
