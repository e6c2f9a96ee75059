"""A handler that blocks the event loop is named, its stack shown, and its runner's lease renewed all the same."""

from __future__ import annotations

import asyncio
import threading

import pytest

from streamjobs import Settings, subscribe
from streamjobs.runner import turns
from streamjobs.runner.turns import Turns
from tests.command import Place

FAST = {"lease": 2.0, "beat": 0.4, "margin": 0.2}
BLOCKED = """
import threading
from streamjobs import Queue
jobs = Queue("mongodb://127.0.0.1:1", "app.jobs")

@jobs.handler("greedy", retries=3)
async def greedy(job):
    threading.Event().wait(1000)
"""


async def test_a_handler_that_blocks_the_loop_is_named_within_a_beat(queue, raw, seen):
    told, renewed = threading.Event(), []

    @queue.handler("mail")
    async def mail(job):
        before = raw.find_one({"control": "runner"})["ends"]
        assert told.wait(20)
        waited = threading.Event()
        while not renewed:
            waited.wait(0.05)  # on purpose: the beat's thread goes on
            if raw.find_one({"control": "runner"})["ends"] > before:
                renewed.append(True)

    def listen(name, level, fields):
        if name == "loop.blocked":
            told.set()

    with subscribe(listen):
        async with queue.running("w", **FAST):
            job = await queue.put("mail")
            await seen.wait("try", job=job.id, outcome="success")
            await seen.wait("loop.turned")
    (blocked,) = seen.of("loop.blocked")
    assert (blocked["job"], blocked["kind"], blocked["number"]) == (str(job.id), "mail", 1)
    assert renewed
    assert not seen.of("loop.stuck")


async def test_after_max_block_the_stack_is_shown_and_health_turns_bad(queue, seen, tmp_path):
    told, called = threading.Event(), []

    def greedy_part():
        assert told.wait(20)

    @queue.handler("mail")
    async def mail(job):
        greedy_part()

    runner = queue.runner("w", **FAST, max_block=0.8)
    runner.health = str(tmp_path / "health")
    runner.on_stuck = lambda: (called.append(threading.current_thread()), told.set())
    async with runner.running():
        job = await queue.put("mail")
        await seen.wait("try", job=job.id, outcome="success")
    (stuck,) = seen.of("loop.stuck")
    assert stuck["job"] == str(job.id)
    assert stuck["since_ms"] >= 800
    assert "greedy_part" in stuck["stack"]
    assert called
    assert called[0] is not threading.current_thread()


async def test_a_thread_that_was_held_up_itself_accuses_nobody(seen, monkeypatch):
    """A machine that was suspended, or a process that was stopped."""
    now = 100.0
    monkeypatch.setattr(turns, "boot", lambda: now)
    one = Turns(Settings(beat=5), dict, lambda: None)
    one.look()  # asked, and the loop has not turned since
    now += 3600
    one.look()
    assert one.good
    now += 2.0
    one.look()
    assert not seen.all
    await asyncio.sleep(0)


@pytest.mark.parametrize("stay", [False, True])
def test_streamjobs_run_exits_when_it_is_blocked_unless_told_to_stay(
    stay, uri, namespace, raw, tmp_path, seen
):
    with Place(tmp_path, uri, namespace) as place:
        (tmp_path / "app.py").write_text(BLOCKED)
        place.put("greedy", "{}", "--retries", "3")
        health = tmp_path / "health"
        options = ["--lease", "2", "--beat", "0.4", "--margin", "0.2", "--max-block", "0.6", "--log", "json"]
        running = place.run(
            *options, "--health-file", str(health), *(["--stay-when-blocked"] if stay else [])
        )
        told = running.event("loop.stuck")
        assert "greedy" in told["stack"]
        if stay:
            assert running.process.poll() is None
            return
        assert running.wait() == 6
        assert not health.exists()
        assert raw.find_one({"kind": "greedy"})["status"] == 2  # comes back by the lease
