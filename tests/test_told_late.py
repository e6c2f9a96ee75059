"""What others must learn, and what a runner must not forget, when a stop is quick, an answer is lost, or trust is."""

from __future__ import annotations

from pymongo.errors import AutoReconnect

from streamjobs.runner.lease import record_id
from tests.test_lease import FAST, dead_runner, held_job


async def test_a_record_that_stays_for_a_held_job_says_that_its_runner_stops(queue, raw):
    """Guard: the else of Stopper's forget. The beat came too late to say so, and others would wait for a lease."""
    queue.handler("mail")(lambda job: None)
    async with queue.running("w", **FAST) as runner:
        runner._beat.now = lambda: None
        runner._sweeper.release_orphans = never
        runner.stop()
        held_job(raw, runner.owner)
    assert raw.find_one({"_id": record_id(runner.owner)})["away"] == "stopping"


async def never():
    """Nothing."""


async def test_jobs_that_were_put_back_by_a_write_that_failed_are_offered_all_the_same(
    queue, raw, seen, monkeypatch
):
    """Guard: the finally of Sweeper._put_back. The stream hides a runner's own wakes from it."""
    monkeypatch.setattr("streamjobs.runner.runner._UNDER_WAY", 0.0)
    queue.handler("mail")(lambda job: None)
    async with queue.running("w", **{**FAST, "interval": 60, "lease": 3}) as runner:
        write, failed = runner._sweeper._write, []

        async def fail_once(claims, changes):
            done = await write(claims, changes)
            if changes and not failed:
                failed.append(done)
                raise AutoReconnect("written, and no answer")
            return done

        runner._sweeper._write = fail_once
        owner = dead_runner(raw)
        one = held_job(raw, owner)
        runner._sweeper.wake()
        await seen.wait("try", job=one, outcome="success", timeout=15)
    assert failed == [1]


async def test_without_trust_a_timer_that_is_due_does_not_keep_the_claim_loop_busy(queue):
    """Guard: the look at trust in Claimer._arm. The timer would be due at once, again and again."""
    queue.handler("mail")(lambda job: None)
    async with queue.running("w", **FAST) as runner:
        await queue.put("mail", delay=4)
        claimer = runner._claimer
        claimer._arm()
        assert claimer._timer is not None
        claimer._trust = type("Lost", (), {"holds": lambda _: False})()
        claimer._arm()
        assert claimer._timer is None
        claimer._trust = runner._beat.trust
