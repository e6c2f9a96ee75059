"""Beyond the free slots only what begins in a moment is claimed, and given back if it does not begin."""

from __future__ import annotations

import asyncio

import pytest

from streamjobs.runner import execute
from tests.documents import plain

QUICK, LONG = 200, 60


def document(*, retries: int, **data):
    return plain(retries=retries, data=data, kind="mail")


@pytest.fixture
def handled(queue):
    """A handler that is quick with some jobs and waits with others, and how many it ran at most."""

    class Handled:
        now = most = 0
        free = asyncio.Event()

    @queue.handler("mail")
    async def mail(job):
        Handled.now += 1
        Handled.most = max(Handled.most, Handled.now)
        try:
            if job.data.get("waits"):
                await Handled.free.wait()
        finally:
            Handled.now -= 1

    return Handled


async def look_again(queue):
    """Have the claim loop look, for a few round trips, for what may be claimed."""
    for _ in range(5):
        await queue.put("mail", {"waits": True})


@pytest.mark.parametrize("retries", [0, 1, 5])
async def test_without_a_pace_only_the_free_slots_are_claimed(retries, queue, raw, seen, handled):
    raw.insert_many([document(retries=retries, waits=True) for _ in range(40)])
    async with queue.running("w", concurrency=3, stop_deadline=0.1):
        await seen.wait("try.started", count=3)
        await look_again(queue)
        assert raw.count_documents({"status": 2}) == 3


async def test_one_quick_job_is_no_pace_for_a_backlog_of_long_ones(queue, raw, seen, handled):
    """Guard: no more is claimed ahead than has ended lately."""
    raw.insert_many([document(retries=5), *(document(retries=5, waits=True) for _ in range(LONG))])
    async with queue.running("w", concurrency=3, stop_deadline=0.1):
        await seen.wait("try", outcome="success")
        await seen.wait("try.started", count=4)
        await look_again(queue)
        assert 3 <= raw.count_documents({"status": 2}) <= 5
        handled.free.set()


@pytest.mark.parametrize("retries", [1, 5])
async def test_a_runner_never_executes_more_than_its_slots(retries, queue, raw, seen, handled):
    raw.insert_many([document(retries=retries) for _ in range(QUICK)])
    async with queue.running("w", concurrency=3):
        await seen.wait("try", count=QUICK, outcome="success", timeout=60)
    assert 1 <= handled.most <= 3


async def test_what_was_claimed_ahead_and_does_not_begin_is_given_back_uncharged(queue, raw, seen, handled):
    """Guard: Executor._give_back."""
    raw.insert_many([document(retries=5) for _ in range(QUICK)])
    raw.insert_many([document(retries=5, waits=True) for _ in range(LONG)])
    async with queue.running("w", concurrency=4, stop_deadline=0.1):
        released = await seen.wait("try", outcome="released", timeout=60)
        assert all("started_ms" not in one for one in released)
        while raw.count_documents({"status": 2}) > 4:
            await seen.wait("try", outcome="released", count=len(seen.of("try", outcome="released")) + 1)
        given = raw.find({"tries.outcome": "released"}).to_list()
        assert given
        for one in given:
            assert one["retries"] == 5
            assert (one["status"], one["tries"][0]["err"]) == (1, "released: no slot was free within 1 s")
    assert handled.most <= 4


async def test_what_was_claimed_ahead_is_given_back_at_stop(queue, raw, seen, handled, monkeypatch):
    """Guard: Executor.close."""
    monkeypatch.setattr(execute, "LONG", 3600.0)
    raw.insert_many([document(retries=5) for _ in range(QUICK)])
    raw.insert_many([document(retries=5, waits=True) for _ in range(LONG)])
    runner = queue.runner("w", concurrency=4)
    async with runner.running():
        await seen.wait("try", count=QUICK, outcome="success", timeout=60)
        await seen.wait("try.started", count=QUICK + 4)
        runner.stop()
        released = await seen.wait("try", outcome="released")
        handled.free.set()
    assert raw.count_documents({"status": 2}) == 0
    assert {one["status"] for one in released} == {"new"}
    assert raw.count_documents({"status": 4}) == QUICK + 4


async def test_a_job_that_may_start_only_once_is_never_claimed_ahead(queue, raw, seen, handled):
    """Guards: Backlog.next and, for what has changed since it was read, the pipeline of the claim."""
    raw.insert_many([document(retries=5) for _ in range(QUICK)])
    raw.insert_many([document(retries=n % 2, waits=True) for n in range(LONG)])
    async with queue.running("w", concurrency=4, stop_deadline=0.1):
        await seen.wait("try", count=QUICK, outcome="success", timeout=60)
        await seen.wait("try.started", count=QUICK + 4)
        await look_again(queue)
        assert raw.count_documents({"status": 2}) == 4
    assert not seen.of("try", outcome="released")
