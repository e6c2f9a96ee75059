"""An outage is told of once, and its end once, whichever roles of a runner meet it; what is dropped is told of too."""

from __future__ import annotations

from streamjobs.runner import backlog
from streamjobs.runner.outage import Outage


def test_an_outage_is_told_of_once_and_is_over_when_every_role_is_back(seen):
    one = Outage(lambda: {"runner": "w", "owner": "o"})
    one.over("claim")
    one.failed("claim", OSError("gone"))
    one.failed("takeback", OSError("gone"))
    one.failed("claim", OSError("gone"))
    one.over("takeback")
    assert [name for name, _, _ in seen.all] == ["server.away"]
    one.over("claim")
    one.over("claim")
    assert [name for name, _, _ in seen.all] == ["server.away", "server.back"]
    assert seen.of("server.away") == [{"runner": "w", "owner": "o", "error": "OSError", "message": "gone"}]


async def test_claims_that_fail_are_an_outage_until_they_succeed(queue, seen, failpoint):
    queue.handler("mail")(lambda job: None)
    async with queue.running("w"):
        failpoint({"times": 1}, "streamjobs/runner", ["findAndModify"], errorCode=50)
        job = await queue.put("mail")
        await seen.wait("try", job=job.id, outcome="success")
        await seen.wait("server.back")
    assert len(seen.of("server.away")) == len(seen.of("server.back")) == 1


async def test_wakes_that_are_too_many_to_keep_are_told_of_and_read_again(queue, raw, seen, monkeypatch):
    """Guard: Range.push."""
    monkeypatch.setattr(backlog, "LIMIT", 10)
    queue.handler("mail")(lambda job: None)
    async with queue.running("w", concurrency=2):
        await queue.put_many([queue.job("mail") for _ in range(60)])
        assert (await seen.wait("wake.dropped"))[0]["kinds"] == ["mail"]
        await seen.wait("try", outcome="success", count=60)
