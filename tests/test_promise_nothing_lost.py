"""Promise 5: nothing acknowledged is lost. Replies are lost on the wire, servers go away for longer than a lease."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections import Counter

import pytest
from pymongo import AsyncMongoClient

from streamjobs import PutUnknown, Queue
from streamjobs.clock import boot
from tests.proxy import Answer, Delay, LoseReply, Proxy

#: A lease that a test can outlast.
FAST = {"lease": 3.0, "beat": 0.5, "margin": 0.5, "interval": 2.0}


@pytest.fixture
def impatient(monkeypatch):
    """Commands give up after a second, so that a driver's own repeats of what gets no answer end soon."""
    for name, module in list(sys.modules.items()):
        if name.startswith("streamjobs") and hasattr(module, "COMMAND_TIMEOUT"):
            monkeypatch.setattr(module, "COMMAND_TIMEOUT", 1.0)


@pytest.fixture
async def through(proxied, namespace, queue):
    """A queue whose runners go through the proxy, on a collection with its indexes."""
    async with Queue(proxied.uri, namespace) as one:
        yield one


def is_outcome(update):
    """Whether an update command writes outcomes: it shows tokens."""
    return "lease.token" in update["updates"][0]["q"]


def is_certain(command):
    """Whether a read is certain of every write before it."""
    return command.get("readConcern", {}).get("level") == "linearizable"


def is_claim(command):
    """Whether a command claims: of several an update_many, of one a findAndModify."""
    return "findAndModify" in command or command["updates"][0].get("multi") is True


@pytest.mark.parametrize("count", [1, 20], ids=["one", "many"])
async def test_a_put_whose_reply_was_lost_and_is_repeated_gives_one_document(
    proxied, namespace, drive, raw, count
):
    driver = drive(timeoutMS=1500)
    database, _, name = namespace.partition(".")
    queue = Queue(driver.client[database][name], connect=proxied.uri)
    calls = queue if isinstance(driver.client, AsyncMongoClient) else queue.sync
    jobs = [queue.job("mail", {"n": n}) for n in range(count)]

    def put(them):
        return driver.do(lambda _: calls.put(them[0]) if count == 1 else calls.put_many(them))

    with proxied.fault(LoseReply(), commands=("insert",)) as rule, pytest.raises(PutUnknown) as caught:
        await put(jobs)
    assert rule.count >= 2  # the driver's repeat got no answer either
    assert raw.count_documents({}) == count  # written, and nobody knows
    await put(caught.value.jobs)
    assert raw.count_documents({}) == count
    assert {one["_id"] for one in raw.find()} == {job.id for job in jobs}
    await queue.close()


@pytest.mark.parametrize("count", [1, 10], ids=["single", "batch"])
async def test_an_outcome_whose_reply_was_lost_is_settled_by_its_token_and_recorded_once(
    through, proxied, raw, seen, impatient, count
):
    """Guard: Finisher._look_up. What is written again matches nothing, and the token tells why."""
    go, ran = asyncio.Event(), Counter()

    @through.handler("mail", retries=3)
    async def mail(job):
        ran[job.id] += 1
        await go.wait()

    async with through.running("w", concurrency=count):
        jobs = await through.put_many([through.job("mail") for _ in range(count)])
        await seen.wait("try.started", count=count)
        rule = proxied.fault(LoseReply(), ("update",), "streamjobs/runner", is_outcome)
        go.set()
        await seen.wait("outcome.kept")
        rule.remove()
        await seen.wait("try", count=count, outcome="success")
    assert rule.count >= (2 if count == 1 else 1)  # the driver repeats an update of one, not of many
    for job in jobs:
        after = await through.get(job.id)
        assert (after.state, after.retries, len(after.tries), ran[job.id]) == ("success", 3, 1, 1)
    assert not seen.of("outcome.lost")


async def test_an_outcome_after_stop_whose_reply_was_lost_is_settled_by_its_token_too(
    through, proxied, raw, seen
):
    """Guard: the look in Finisher.write_late. A thread outlives stop; the driver's repeat matches nothing."""
    go = threading.Event()
    through.handler("mail", retries=3)(lambda job: go.wait(30))
    async with through.running("w", stop_deadline=0.1):
        job = await through.put("mail")
        await seen.wait("try.started")
    await seen.wait("handler.stuck")
    with proxied.fault(LoseReply(), ("update",), "streamjobs/beat", is_outcome, times=2) as rule:
        go.set()
        await seen.wait("try", job=job.id, outcome="success")
    assert rule.count == 2
    assert [one.outcome for one in (await through.get(job.id)).history] == [None]
    assert not seen.of("outcome.lost")


async def test_a_job_that_was_taken_back_after_stop_is_said_to_be_lost(queue, raw, seen):
    go = threading.Event()
    queue.handler("mail", retries=3)(lambda job: go.wait(30))
    async with queue.running("w", stop_deadline=0.1):
        job = await queue.put("mail")
        await seen.wait("try.started")
    taken = {"runner": "w", "when": job.created, "token": "other"}
    raw.update_one({"_id": job.id}, {"$set": {"status": 4, "tries": [taken]}, "$unset": {"lease": ""}})
    go.set()
    (event,) = await seen.wait("outcome.lost", job=job.id)
    assert event["reason"] == "another try has the job"


@pytest.mark.parametrize("count", [1, 8], ids=["single", "batch"])
async def test_a_claim_whose_reply_was_lost_runs_once(through, proxied, seen, impatient, count):
    """Guard: Claimer._settle. The claim is read back by its token."""
    ran = Counter()

    @through.handler("mail", retries=3)
    async def mail(job):
        ran[job.id] += 1

    rule = proxied.fault(LoseReply(), ("update", "findAndModify"), "streamjobs/runner", is_claim)
    async with through.running("w", concurrency=16):
        jobs = await through.put_many([through.job("mail") for _ in range(count)])
        await seen.wait("claim.unknown")
        rule.remove()
        await seen.wait("claim.settled", count=1)
        await seen.wait("try", count=count, outcome="success")
    for job in jobs:
        after = await through.get(job.id)
        assert (after.state, len(after.tries), ran[job.id]) == ("success", 1, 1)
    assert not seen.of("orphans.released")


async def test_a_big_claim_is_settled_though_its_reads_together_take_longer_than_a_command_may(
    through, proxied, seen, impatient
):
    """Guard: what _settle has found is kept. Else it begins again from the first job, for ever."""
    ran = Counter()

    @through.handler("mail", retries=3)
    async def mail(job):
        ran[job.id] += 1

    claim = proxied.fault(LoseReply(), ("update",), "streamjobs/runner", is_claim, times=1)
    sure = proxied.fault(Delay(0.25), ("find",), "streamjobs/runner", is_certain)
    jobs = await through.put_many([through.job("mail") for _ in range(8)])  # before: it reads all at once
    async with through.running("w", concurrency=8):
        await seen.wait("claim.unknown")
        await seen.wait("try", count=8, outcome="success")
        await seen.wait("claim.settled")
    assert claim.count == 1
    assert sure.count >= 8
    assert set(ran.values()) == {1}
    assert {(await through.get(job.id)).state for job in jobs} == {"success"}
    (settled,) = seen.of("claim.settled")
    assert (settled["count"], settled["asked"]) == (8, 8)


async def test_a_claim_that_the_primary_did_at_its_step_down_runs_once(through, proxied, seen):
    """Guard: Store.claim. The driver trips over labels in a raw reply, and mongod gives them then."""
    ran = Counter()

    @through.handler("mail", retries=3)
    async def mail(job):
        ran[job.id] += 1

    proxied.fault(Answer(189, write_concern=True), ("findAndModify",), "streamjobs/runner", times=1)
    async with through.running("w", interval=1.0):
        job = await through.put("mail")
        await seen.wait("try", outcome="success")
    after = await through.get(job.id)
    # the default server does not know the driver's repeat again: there it is an orphan first
    assert [one.outcome for one in after.history if one.outcome != "released"] == [None]
    assert (after.retries, ran[job.id]) == (3, 1)


@pytest.mark.parametrize("how", ["hole", "dead"])
@pytest.mark.parametrize(
    ("settings", "outage"),
    [(FAST, 5.0), pytest.param({}, 40.0, marks=pytest.mark.slow)],
    ids=["quick", "default"],
)
async def test_finished_work_of_a_fleet_outlives_an_outage_longer_than_the_lease(
    own_server, seen, how, settings, outage
):
    """Guards: Finisher._keep, and Trust.may_fence: after the outage owners come first."""
    go, ran, ended = asyncio.Event(), Counter(), Counter()
    with Proxy(own_server.uri) as proxy:
        async with Queue(proxy.uri, "app.jobs") as queue:
            await queue.create_indexes()

            @queue.handler("mail", retries=3)
            async def mail(job):
                ran[job.id] += 1
                await go.wait()
                ended[job.id] += 1

            names = ["a", "b", "c"]
            fleet = [queue.runner(name, concurrency=5, **settings) for name in names]
            tasks = [asyncio.create_task(one.run()) for one in fleet]
            await seen.wait("runner.started", count=3)
            jobs = await queue.put_many([queue.job("mail") for _ in range(15)])
            await seen.wait("try.started", count=15)
            hole = proxy.black_hole() if how == "hole" else None
            if how == "dead":
                own_server.kill()
            began = boot()
            go.set()  # all of the work is done while nobody can be told
            await seen.wait("lease.untrusted", count=3, timeout=outage)
            await asyncio.sleep(began + outage - boot())
            assert not seen.of("try")
            if hole is not None:
                hole.end()
            else:
                own_server.start()
            back = boot()
            await seen.wait("try", count=15, outcome="success", timeout=20)
            print(f"FIGURE outage {how} {outage} s: all 15 outcomes written {boot() - back:.2f} s after")
            for one in fleet:
                one.stop()
            await asyncio.gather(*tasks)
            for job in jobs:
                after = await queue.get(job.id)
                assert (after.state, after.retries, len(after.tries)) == ("success", 3, 1)
    assert set(ran.values()) == set(ended.values()) == {1}
    assert not seen.of("outcome.lost")
    assert not seen.of("takeback")
