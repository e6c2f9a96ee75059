"""Outcomes that are alike: one statement writes them, and each job keeps its own."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from datetime import UTC, datetime

import pytest
from pymongo import AsyncMongoClient
from pymongo.monitoring import CommandListener

from streamjobs import clients, transitions
from streamjobs.clock import ServerClock, boot
from streamjobs.job import Job, Status
from streamjobs.runner import finish
from streamjobs.runner.finish import Finisher
from streamjobs.runner.held import Ended, Held
from streamjobs.runner.store import Store
from tests.documents import plain

APP = "streamjobs/together"
SIZE = 16 * 1024 * 1024


class Sent(CommandListener):
    """The statements of each ``update``."""

    def __init__(self):
        self.updates = []

    def started(self, event):
        if event.command_name == "update":
            self.updates.append([bool(one.get("multi")) for one in event.command["updates"]])

    def succeeded(self, event): ...
    def failed(self, event): ...


class Holds:
    def holds(self, owner):
        return True


@asynccontextmanager
async def finishing(uri, namespace, documents):
    """A finish writer, the jobs of one claim in hand, and what goes over the wire from then on."""
    sent, clock, settled = Sent(), ServerClock(), []
    async with AsyncMongoClient(uri, appname=APP, event_listeners=[sent]) as client:
        database, _, name = namespace.partition(".")
        store = Store(clients.ours(client[database][name]))
        await store.jobs.insert_many(documents)
        await store.learn(clock)
        claimed = await store.claim([one["_id"] for one in documents], ["mail"], "o", "t", ahead=False)
        began = boot()
        jobs = [Job.from_document(one) for one in claimed]
        hands = [
            Held(job, None, "w", "o", "t", job.extra["lease"]["claimed"], 0.0, began, began, Holds(), started=began)
            for job in jobs
        ]  # fmt: skip
        finisher = Finisher(store, clock, lambda: "o", "w")
        finisher.done = lambda held, status, _after: settled.append((held.job.id, status))
        sent.updates.clear()
        writing = asyncio.create_task(finisher._run())
        try:
            yield finisher, hands, sent.updates, settled
        finally:
            writing.cancel()
            await asyncio.wait([writing])


async def test_what_a_claim_brought_and_ended_alike_is_one_statement(uri, namespace, raw):
    async with finishing(uri, namespace, [plain(kind="mail", retries=3) for _ in range(50)]) as hand:
        finisher, hands, updates, settled = hand
        for held in hands:
            finisher.put(held, Ended("success"))
        await finisher.flushed()
    assert updates == [[True]]
    assert settled == [(held.job.id, Status.SUCCESS) for held in hands]
    for one in raw.find():
        (entry,) = one["tries"]
        assert (one["status"], entry["runner"], entry["token"], "lease" in one) == (4, "w", "t", False)
        assert entry["claimed"] <= entry["when"]


async def test_what_ended_otherwise_has_a_statement_of_its_own(uri, namespace, raw):
    ends = [
        Ended("success"),
        Ended("success"),
        Ended("failure", "no"),
        Ended("failure", "no"),
        Ended("failure", "but"),
    ]
    async with finishing(uri, namespace, [plain(kind="mail", retries=1) for _ in ends]) as hand:
        finisher, hands, updates, settled = hand
        for held, ended in zip(hands, ends, strict=True):
            finisher.put(held, ended)
        await finisher.flushed()
        by_id = {held.job.id: ended.text or None for held, ended in zip(hands, ends, strict=True)}
    assert updates == [[True, True, False]]
    assert len(settled) == len(ends)
    assert {one["_id"]: one["tries"][0].get("err") for one in raw.find()} == by_id


async def test_one_that_does_not_fit_harms_none_that_is_written_with_it(uri, namespace, raw, seen):
    """Guard: ``alone``. Without it the statement is refused for ever."""
    async with finishing(uri, namespace, [plain(kind="mail", retries=1) for _ in range(5)]) as hand:
        finisher, hands, updates, settled = hand
        full = hands[2].job.id
        raw.update_one({"_id": full}, {"$set": {"data": {"pad": b"x" * (SIZE - 1_000)}}})
        for held in hands:
            finisher.put(held, Ended("failure", "e" * 3_000))
        async with asyncio.timeout(30):
            await finisher.flushed()
    assert updates[0] == [True]
    assert sorted(settled) == sorted((held.job.id, Status.FAILED) for held in hands)
    assert {one["status"] for one in raw.find({}, {"status": 1})} == {5}
    errors = {one["_id"]: one["tries"][0]["err"] for one in raw.find({}, {"tries": 1})}
    assert errors.pop(full) == "outcome not stored: the document is full"
    assert set(errors.values()) == {"e" * 3_000}
    assert [one["job"] for one in seen.of("outcome.overflow")] == [str(full)]


async def test_a_lost_reply_of_one_statement_records_each_once(uri, namespace, raw, seen, failpoint):
    async with finishing(uri, namespace, [plain(kind="mail", retries=3) for _ in range(20)]) as hand:
        finisher, hands, _updates, settled = hand
        told = {"code": 64, "errmsg": "waiting for replication timed out"}
        failpoint({"times": 1}, APP, ["update"], writeConcernError=told)
        for held in hands:
            finisher.put(held, Ended("success"))
        async with asyncio.timeout(30):
            await finisher.flushed()
    assert seen.of("outcome.kept", count=20)
    assert sorted(settled) == sorted((held.job.id, Status.SUCCESS) for held in hands)
    assert all((one["status"], len(one["tries"])) == (4, 1) for one in raw.find())


async def test_one_that_was_taken_meanwhile_is_told_of_and_the_others_are_recorded(uri, namespace, raw, seen):
    async with finishing(uri, namespace, [plain(kind="mail", retries=3) for _ in range(6)]) as hand:
        finisher, hands, _updates, settled = hand
        taken = hands[4].job.id
        raw.update_one({"_id": taken}, {"$set": {"lease": {"owner": "other", "token": "theirs"}}})
        for held in hands:
            finisher.put(held, Ended("success"))
        async with asyncio.timeout(30):
            await finisher.flushed()
    assert [one["job"] for one in seen.of("outcome.lost")] == [str(taken)]
    assert dict(settled).pop(taken) == Status.INVALID
    assert raw.find_one({"_id": taken})["lease"]["token"] == "theirs"
    assert raw.count_documents({"status": 4}) == 5


def change(number, **more):
    job = Job(number, "mail", retries=more.pop("retries", 3))
    named = {
        "token": "t",
        "claimed": datetime(2026, 1, 1, tzinfo=UTC),
        "runner": "w",
        "owner": "o",
        "nonce": 0,
    }
    return transitions.succeed(transitions.Claim(job, **{**named, **more}))


def test_changes_are_alike_but_for_the_id():
    assert transitions.alike(change(1), change(2))
    guard, update = transitions.together([change(1), change(2)])
    assert guard == {"_id": {"$in": [1, 2]}, "status": 2, "lease.token": "t"}
    assert update == change(1)[1]
    assert transitions.together([change(1)]) == change(1)


@pytest.mark.parametrize(
    "other",
    [{"token": "u"}, {"claimed": datetime(2026, 1, 2, tzinfo=UTC)}, {"runner": "v"}, {"started": datetime(2026, 1, 3, tzinfo=UTC)}],
    ids=["token", "claimed", "runner", "started"],
)  # fmt: skip
def test_what_a_try_says_keeps_changes_apart(other):
    assert not transitions.alike(change(1), change(2, **other))


def test_put_backs_are_never_alike():
    """Each has a number of its own, so that its wake is never an equal value."""
    one, other = (
        transitions.release(
            transitions.Claim(Job(n, "mail", retries=3), "t", None, "w", "o", nonce=n), "stop"
        )
        for n in (1, 2)
    )
    assert not transitions.alike(one, other)


async def test_one_that_ends_with_outcomes_left_is_not_idle_and_the_next_writes_them(
    uri, namespace, raw, monkeypatch
):
    """Guard: no idle while something waits. A cancellation that the driver swallows ends the task in between."""
    turns = iter(
        [True, True, False, False]
    )  # to begin, to write the first batch, and then it has been cancelled
    monkeypatch.setattr(finish, "going", lambda: next(turns, True))
    monkeypatch.setattr(finish, "_BATCH", 1)
    async with finishing(uri, namespace, [plain(kind="mail", retries=3) for _ in range(3)]) as hand:
        finisher, hands, _, settled = hand
        for held in hands:
            finisher.put(held, Ended("success"))
        while len(settled) < 1:
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not finisher._idle.is_set()
        finisher.begin(lambda _task: None)
        await finisher.flushed()
        assert len(settled) == 3
        await finisher.end()
