"""An outage is told of once, and its end once, whichever roles of a runner meet it; what is dropped is told of too.

What fails is repeated, and soon where nothing was sent or the server has answered somebody else.
"""

from __future__ import annotations

import asyncio

import pymongo
import pytest
from pymongo import _csot
from pymongo.errors import AutoReconnect, ExecutionTimeout

from streamjobs.clients import COMMAND_TIMEOUT
from streamjobs.runner import backlog, lease, outage
from streamjobs.runner.outage import Outage, Pause, unsent

REFUSED = ExecutionTimeout(
    "operation would exceed time limit, remaining timeout:9.99842 <= network round trip time:18.62000",
    50,
    {"code": 50},
)


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


async def paused(pause, *errors):
    """How long each wait was, by the timers of the loop."""
    loop, asked = asyncio.get_running_loop(), []
    real = loop.call_later

    def at_once(seconds, *call):
        asked.append(seconds)
        return real(0, *call)

    loop.call_later = at_once
    try:
        for error in errors:
            await pause.wait(error)
    finally:
        del loop.call_later
    return asked


async def test_a_pause_is_doubled_up_to_a_second_and_begins_anew_after_a_success():
    pause = Pause()
    assert await paused(pause, *[AutoReconnect("gone")] * 7) == [0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0]
    pause.succeeded()
    assert await paused(pause, None, None) == [0.05, 0.1]


async def test_what_the_driver_did_not_send_is_repeated_soon():
    """Guard: unsent. For a second after a partition the driver takes the server to be slower than any limit."""
    pause = Pause()
    assert await paused(pause, *[REFUSED] * 5, AutoReconnect("gone"), REFUSED) == [0.05] * 7
    assert not unsent(ExecutionTimeout("operation exceeded time limit", 50, {"code": 50}))
    assert not unsent(None)


async def test_a_pause_is_cut_when_the_server_has_answered(monkeypatch):
    monkeypatch.setattr(outage, "_FIRST", 60.0)
    monkeypatch.setattr(outage, "_LONGEST", 60.0)
    pause = Pause()
    pause.cut()  # before it: no answer to what fails after it
    waiting = asyncio.create_task(pause.wait(AutoReconnect("gone")))
    done, _ = await asyncio.wait([waiting], timeout=0.1)
    assert not done
    pause.cut()
    await asyncio.wait_for(waiting, 5)


async def test_a_claim_goes_on_when_the_lease_is_renewed_however_long_its_pause(
    queue, seen, failpoint, monkeypatch
):
    """Guard: the cut in Claimer.wake. The beat hears of a server that is back before the claim's pause is over."""
    monkeypatch.setattr(outage, "_FIRST", 60.0)
    monkeypatch.setattr(outage, "_LONGEST", 60.0)
    queue.handler("mail")(lambda job: None)
    async with queue.running("w", lease=4, beat=1, margin=0.5):
        failpoint({"times": 1}, "streamjobs/runner", ["findAndModify"], errorCode=50)
        job = await queue.put("mail")
        await seen.wait("try", job=job.id, outcome="success", timeout=20)


async def test_the_drivers_own_refusal_is_known_for_what_it_is(queue, monkeypatch):
    """Its words may change: then this fails, and not the lateness after a partition."""
    collection = queue.source.asynchronous()
    await collection.find_one({})
    monkeypatch.setattr(_csot, "get_rtt", lambda: 3600.0)  # as after a partition
    with pymongo.timeout(5), pytest.raises(ExecutionTimeout) as caught:
        await collection.find_one({})
    assert unsent(caught.value)


async def test_a_renewal_that_the_driver_does_not_send_is_tried_again_soon(queue, seen, monkeypatch):
    """Guard: SOON in Beat._renew."""
    monkeypatch.setattr(lease, "_RETRY", 60.0)
    real, left = lease.Beat._extend, 3

    def refuse(self, owner):
        nonlocal left
        left -= 1
        if left >= 0:
            raise REFUSED
        return real(self, owner)

    queue.handler("mail")(lambda job: None)
    async with queue.running("w", lease=60, beat=15) as runner:
        monkeypatch.setattr(lease.Beat, "_extend", refuse)
        runner._beat.now()
        await seen.wait("lease.renewed", timeout=10)


async def test_what_the_driver_may_measure_is_less_than_what_a_command_may_take(queue):
    """Guard: CONNECT_MS. Answers that a partition held up are measured, and nothing is sent that has less time."""
    queue.handler("mail")(lambda job: None)
    async with queue.running("w", lease=60, beat=4) as runner:
        for client, limit in ((runner._client, COMMAND_TIMEOUT), (runner._beat._client, 4)):
            assert client.options.pool_options.connect_timeout < limit
