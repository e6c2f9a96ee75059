"""Promises 1, 2, 3 and 5 across changes of primary, and across a partition of one runner."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import AsyncExitStack

import pytest

from streamjobs import PutUnknown, Queue
from streamjobs.clock import boot
from tests.pace import pace

FAST = {"lease": 3.0, "beat": 0.5, "margin": 0.5, "interval": 2.0}


@pytest.fixture
async def through(proxied, namespace, queue):
    async with Queue(proxied.uri, namespace) as one:
        yield one


@pytest.mark.slow
@pytest.mark.parametrize(
    "how", [{}, {"crash": True}, {"streams": True}], ids=["step-down", "crash", "streams"]
)
async def test_an_election_of_twelve_seconds_cancels_no_handler_and_runs_none_twice(
    through, proxied, seen, how
):
    ran, cancelled, go = Counter(), [], asyncio.Event()

    @through.handler("mail", retries=3)
    async def mail(job):
        ran[job.id] += 1
        try:
            await go.wait()
        except asyncio.CancelledError:
            cancelled.append(job.id)
            raise

    async with through.running("w", concurrency=20), through.running("other", concurrency=20):
        jobs = await through.put_many([through.job("mail") for _ in range(20)])
        await seen.wait("try.started", count=20)
        proxied.step_down(12.0, **how)
        ends = boot() + 12.0
        await asyncio.sleep(ends - boot() - 1.0)
        go.set()  # they end before there is a primary again
        await asyncio.sleep(ends - boot())
        elected = boot()
        await seen.wait("try", count=20, outcome="success")
        print(f"FIGURE election 12 s {how}: outcomes written {boot() - elected:.2f} s after it")
    assert not cancelled
    assert set(ran.values()) == {1}
    assert len(ran) == 20
    for job in jobs:
        after = await through.get(job.id)
        assert (after.state, after.retries, len(after.tries)) == ("success", 3, 1)
    assert not seen.of("lease.untrusted")
    assert not seen.of("takeback")


@pytest.mark.slow
async def test_ten_changes_of_primary_under_load_lose_nothing_and_pickup_resumes_within_two_seconds(
    through, proxied, raw, seen
):
    ran, put, stop = Counter(), [], asyncio.Event()
    started = {}

    @through.handler("mail", retries=3)
    async def mail(job):
        ran[job.id] += 1
        started[job.id] = boot()

    async def produce(queue):
        while not stop.is_set():
            job = queue.job("mail")
            while True:
                try:
                    await queue.put(job)
                    break
                except PutUnknown:
                    continue
            put.append(job.id)
            await asyncio.sleep(0.005)

    async def picked_up(id_):
        while id_ not in started:
            await asyncio.sleep(0.005)
        return started[id_]

    waits = []
    async with AsyncExitStack() as fleet:
        for name in ("a", "b", "c"):
            await fleet.enter_async_context(through.running(name, interval=3.0))
        await seen.wait("runner.started", count=3)
        producers = [asyncio.create_task(produce(through)) for _ in range(3)]
        for n in range(10):
            count = len(put)
            how = [{}, {"streams": True}, {"seconds": 0.5}, {"seconds": 0.5, "crash": True}][n % 4]
            proxied.step_down(**how)
            await asyncio.sleep(how.get("seconds", 0.0))
            elected = boot()
            async with pace() as machine:
                while len(put) == count:
                    await asyncio.sleep(0.005)
                fresh = raw.insert_one(through.job("mail").to_document()).inserted_id  # nobody here is told
                waits.append(await picked_up(fresh) - elected - machine.lost)
            put.append(fresh)
            await asyncio.sleep(0.5)
        stop.set()
        await asyncio.gather(*producers)
        await seen.wait("try", count=len(put), outcome="success", timeout=60)
    print(f"FIGURE ten changes of primary: {len(put)} jobs, pickup resumed within {max(waits):.2f} s of each")
    assert max(waits) <= 2.0
    assert set(ran) == set(put)
    assert set(ran.values()) == {1}
    for job in raw.find({"kind": "mail"}):
        assert (job["status"], job["retries"]) == (4, 3)
        # the default server does not know a driver's repeat of a claim again: that one is released first
        assert [one.get("outcome") for one in job["tries"] if one.get("outcome") != "released"] == [None]
    assert not seen.of("outcome.lost")


@pytest.mark.parametrize(
    "settings", [FAST, pytest.param({}, marks=pytest.mark.slow)], ids=["quick", "default"]
)
async def test_a_runner_alone_behind_a_partition_stops_trusting_before_another_starts_its_jobs(
    proxied, namespace, queue, raw, seen, settings
):
    """Guard: Runner._watch_trust. Its own handlers are told before the lease is over for the others."""
    lease, margin = settings.get("lease", 30.0), settings.get("margin", 2.0)
    cut, rerun, ends = {}, {}, {}

    def connect(cls, **options):
        return cls(proxied.uri, **{**options, "appname": "parted"})

    parted = Queue("mongodb://not.used", namespace, connect=connect)

    @parted.handler("mail", retries=3)
    async def mail(job):
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cut[job.id] = boot()
            raise

    @queue.handler("mail", retries=3)
    async def other(job):
        rerun[job.id] = boot()

    async with parted.running("parted", concurrency=10, stop_deadline=0.1, **settings) as runner:
        jobs = await queue.put_many([queue.job("mail") for _ in range(10)])
        await seen.wait("try.started", count=10, runner="parted")
        async with queue.running("other", concurrency=10, **settings):
            await asyncio.sleep(settings.get("beat", 5.0) + margin)  # it may judge others by now
            hole = proxied.black_hole("parted")
            began = boot()
            trusted = runner._beat.trust.until
            while raw.count_documents({"status": 2}):
                await asyncio.sleep(0.05)
            ends = boot() - began
            await seen.wait("try", count=10, runner="other", outcome="success", timeout=60)
        assert set(cut) == set(rerun) == {job.id for job in jobs}
        told, first = max(cut.values()), min(rerun.values())
        print(
            f"FIGURE partition, lease {lease} s: told {told - began:.2f} s, out of working {ends:.2f} s, run again "
            f"{first - began:.2f} s after it; {first - told:.2f} s between"
        )
        assert told < first
        assert told <= trusted + margin / 2
        assert ends <= lease + 1.0 + margin
        (untrusted,) = seen.of("lease.untrusted", runner="parted")
        assert untrusted["held"] == 10
        hole.end()
        await seen.wait("lease.lost", runner="parted")  # it goes on under a fresh owner
    for job in jobs:
        after = await queue.get(job.id)
        assert (after.state, after.retries, [one.outcome for one in after.history]) == (
            "success",
            2,
            ["lost", None],
        )
    await parted.close()
