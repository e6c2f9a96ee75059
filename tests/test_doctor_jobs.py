"""The doctor's checks of runners and jobs, each in its good and its bad state."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from bson import Int64
from bson.errors import InvalidBSON
from pymongo import MongoClient

from streamjobs.clients import Source
from streamjobs.doctor import Finding, Level, examine, finding, jobs
from streamjobs.doctor.finding import Only
from tests.doctored import see
from tests.documents import plain, stored
from tests.test_lease import dead_runner, held_job

LOST = {"runner": "x", "err": "lost: x", "outcome": "lost"}


async def test_runners(queue, raw):
    async def told():
        return await asyncio.to_thread(see, queue.source)

    found = await told()
    assert (found["runners"].level, found["expired leases"].level) == (Level.WARN, Level.OK)
    assert "streamjobs run" in found["runners"].fix
    dead_runner(raw)
    found = await told()
    assert (found["runners"].level, found["expired leases"].level) == (Level.WARN, Level.WARN)
    dead_runner(raw, owner="w:1:a", ends_in=3600, slots=5, version="1.0")
    dead_runner(raw, owner="v:1:a", ends_in=3600, slots=5, version="1.1")
    found = await told()
    assert (found["runners"].level, found["expired leases"].level) == (Level.OK, Level.OK)
    assert "gone (5 slots: mail)" in found["runners"].text
    assert "versions 1.0, 1.1" in found["runners"].text
    assert "gone:1:abc" in found["expired leases"].text
    for number in range(4):
        dead_runner(raw, owner=f"x:{number}:a", ends_in=3600, fenced=datetime.now(UTC))
    found = await told()
    assert (found["runners"].text.startswith("2 alive"), found["expired leases"].level) == (True, Level.WARN)


async def test_kinds_that_nobody_serves(queue, raw, monkeypatch):
    dead_runner(raw, owner="w:1:a", ends_in=3600)  # serves mail
    dead_runner(raw, owner="x:1:a", ends_in=-1)
    raw.update_one({"_id": "runner:x:1:a"}, {"$set": {"kinds": ["late"]}})
    await queue.put("mail")
    await queue.put("tomorrow", delay=86_400)
    (found,) = await asyncio.to_thread(_unserved, queue.source)
    assert (found.level, found.text) == (Level.OK, "none with due jobs among 2 kinds")
    stored(raw, kind="late", status=3, runat=datetime.now(UTC) - timedelta(hours=3))
    stored(raw, kind="late", status=4)
    await queue.put("alone")
    (found,) = await asyncio.to_thread(_unserved, queue.source)
    assert found.level is Level.WARN
    assert found.text.startswith("2 of 4 kinds have due jobs and no live runner: 'alone' (1 due, ")
    assert "'late' (1 due, the first for 3 h)" in found.text
    monkeypatch.setattr(jobs, "_KINDS", 1)
    monkeypatch.setattr(jobs, "_COUNT", 1)
    (found,) = await asyncio.to_thread(_unserved, queue.source)
    assert "1 of the first 1 kinds of more" in found.text
    assert "(1 or more due" in found.text
    raw.drop_index("due")
    (found,) = await asyncio.to_thread(_unserved, queue.source)
    assert (found.level, "whole collection" in found.text) == (Level.SKIP, True)


def _unserved(source: Source) -> list[Finding]:
    return [one for one in examine(source) if one.name == "unserved kinds"]


async def test_jobs_of_owners_that_are_not_alive(queue, raw):
    async def told():
        return await asyncio.to_thread(see, queue.source)

    held_job(raw, dead_runner(raw, owner="w:1:a", ends_in=3600))
    found = await told()
    assert (found["held by unknown"].level, found["held without lease"].level) == (Level.OK, Level.OK)
    held_job(raw, "nobody:1:x")
    held_job(raw, dead_runner(raw, owner="f:1:a", ends_in=3600, fenced=datetime.now(UTC)))
    found = await told()
    assert found["held by unknown"].level is Level.WARN
    assert "f:1:a (1), nobody:1:x (1)" in found["held by unknown"].text
    assert "a live runner takes them back" in found["held by unknown"].fix
    raw.delete_one({"_id": "runner:w:1:a"})
    assert "start a runner" in (await told())["held by unknown"].fix
    raw.drop_index("owner")
    assert (await told())["held by unknown"].level is Level.SKIP


async def test_jobs_without_a_lease(queue, raw):
    first, second = stored(raw, status=2), stored(raw, status=2, lease={"token": "t"}, kind="other")
    found = (await asyncio.to_thread(see, queue.source))["held without lease"]
    assert found.level is Level.WARN
    assert found.text.startswith("2 working without a lease: ")
    assert str(first) in found.text
    assert str(second) in found.text
    assert f"streamjobs retry {first} --force" in found.fix


def test_a_runner_that_stops_between_two_reads_is_no_stranger(source, raw):
    """The owners are read, the runner finishes and its record goes, the records are read."""
    owner = dead_runner(raw, ends_in=3600)
    id_ = held_job(raw, owner)

    class Stopping(finding.Subject):
        def alive(self):
            raw.update_one({"_id": id_}, {"$set": {"status": 4}, "$unset": {"lease": 1}})
            raw.delete_one({"_id": f"runner:{owner}"})
            return super().alive()

    raw.create_index("lease.owner")
    with MongoClient(source.uri) as client:
        subject = Stopping(source=source, client=client, only=Only(), margin=2)
        (found,) = jobs._strangers(subject)
    assert found.level is Level.OK


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"kind": 7}, "kind is not a text but int"), ({"kind": None}, "kind is not a text but missing"),
        ({"status": "new"}, "status is not a number"), ({"status": [1, 2]}, "status is not a number"),
        ({"runat": "now"}, "runat is not a date"), ({"data": [1]}, "data is not a document but missing"),
    ],
)  # fmt: skip
def test_documents_that_can_not_be_jobs(source, raw, wrong, why):
    stored(raw)
    raw.insert_one({"_id": "text", **{key: value for key, value in plain().items() if key != "_id"}})
    dead_runner(raw)
    assert "none in all 2 documents" in see(source)["unreadable"].text
    id_ = stored(raw, **wrong)
    found = see(source)["unreadable"]
    assert (found.level, why in found.text, str(id_) in found.text) == (Level.WARN, True, True)


def test_of_a_large_collection_a_sample_is_looked_at(source, raw, monkeypatch):
    monkeypatch.setattr(finding, "SAMPLE", 5)
    stored(raw, kind=3)
    raw.insert_many([plain() for _ in range(300)])
    newest = stored(raw, kind=7)
    found = see(source)
    assert "1 in a sample of " in found["unreadable"].text or "2 in a sample of " in found["unreadable"].text
    assert str(newest) in found["unreadable"].text
    looked = int(found["unreadable"].text.partition("sample of ")[2].partition(" ")[0])
    assert 5 <= looked <= 10


def test_a_document_whose_bson_can_not_be_decoded_is_told_and_costs_no_other(source, raw, monkeypatch):
    """Servers refuse such a document where they look; so its decoding is made to fail."""
    broken = stored(raw, kind="broken")
    odd = stored(raw, kind=3)

    def decode(one: Any) -> dict[str, Any]:
        if one.get("kind") == "broken":
            raise InvalidBSON("not UTF-8")
        return plainly(one)

    plainly = finding._decode
    monkeypatch.setattr(finding, "_decode", decode)
    found = see(source)["unreadable"]
    assert found.level is Level.WARN
    assert found.text.startswith("2 in all 2 documents can't be jobs: ")
    for told in (str(broken), str(odd), "its BSON can't be decoded (1)", "kind is not a text but int (1)"):
        assert told in found.text


@pytest.mark.parametrize(
    ("lost", "ago", "fine", "level"),
    [(2, 1, 0, Level.OK), (3, 1, 0, Level.WARN), (5, 120, 0, Level.OK), (3, 1, 400, Level.OK)],
)
def test_lost_tries(source, raw, lost, ago, fine, level):
    when = datetime.now(UTC) - timedelta(minutes=ago)
    tries = [{**LOST, "when": when} for _ in range(lost)]
    stored(raw, tries=[None, "x", *tries, {"runner": "x", "when": "never"}], retryinterval=Int64(1))
    good = {"runner": "x", "when": datetime.now(UTC)}
    if fine:
        raw.insert_many([plain(status=4, tries=[good]) for _ in range(fine)])
    found = see(source)["lost tries"]
    assert found.level is level, found.text
    if ago == 1:
        assert found.text.startswith(f"{lost} of {lost + fine} ")
