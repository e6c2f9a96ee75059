"""Looking at jobs: one by its id, lists by their filters, counts."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any

import pytest
from bson import ObjectId, Regex

from streamjobs import ASAP, BadArgument, JobNotFound, Status, UnreadableJob
from tests.documents import FAR, stored


async def test_an_unknown_id_is_job_not_found(queue):
    for call in (queue.get, queue.retry, queue.cancel):
        for id_ in (ObjectId(), "text", 5, None, {"a": 1}):
            with pytest.raises(JobNotFound, match=re.escape(repr(id_))):
                await call(id_)


@pytest.mark.parametrize("id_", [{"$gt": ""}, {"$ne": None}, re.compile("."), Regex(".")])
async def test_an_id_that_a_filter_would_take_for_a_condition_is_refused(id_, queue, raw):
    put = await queue.put("mail")
    stored(raw, _id="text")
    for name in ("get", "retry", "cancel"):
        with pytest.raises(BadArgument, match=r"^id: "):
            await getattr(queue, name)(id_)
        with pytest.raises(BadArgument, match=r"^id: "):
            getattr(queue.sync, name)(id_)
    assert (await queue.get(put.id)).status == Status.NEW


async def test_a_document_that_cannot_be_a_job_is_unreadable_and_not_listed(queue, raw):
    stored(raw, _id="bad", data="text")
    raw.insert_one({"_id": "runner:x", "control": "runner"})
    good = await queue.put("mail")
    for id_ in ("bad", "runner:x"):
        with pytest.raises(UnreadableJob):
            await queue.get(id_)
    assert [one.id for one in await queue.list()] == [good.id]
    assert await queue.count() == {"mail": {"new": 2}}


async def test_list_and_count_filter_by_kind_status_and_what_is_due(queue, raw):
    past = datetime(2026, 1, 1, tzinfo=UTC)
    rows = [
        ("mail", 1, ASAP), ("mail", 1, FAR), ("mail", 3, past), ("mail", 3, FAR), ("mail", 2, ASAP), ("mail", 4, past),
        ("mail", 5, ASAP), ("mail", 6, FAR), ("mail", 8, ASAP), ("post", 1, ASAP), ("post", 4, ASAP),
    ]  # fmt: skip
    ids = [stored(raw, kind=kind, status=status, runat=runat) for kind, status, runat in rows]

    async def listed(**filters: Any) -> list[int]:
        return [ids.index(one.id) for one in await queue.list(**filters)]

    assert await listed() == list(range(10, -1, -1))  # newest first
    assert await listed(limit=2) == [10, 9]
    assert await listed(kind="post") == [10, 9]
    assert await listed(kind="none") == []
    assert (
        await listed(status="new") == await listed(status=1) == await listed(status=Status.NEW) == [9, 1, 0]
    )
    assert await listed(status=8) == [8]
    assert await listed(due=True) == [9, 2, 0]
    assert await listed(due=False) == [3, 1]
    assert await listed(due=True, kind="mail", status="waiting") == [2]
    assert await listed(due=True, status="success") == [10, 5]
    assert await queue.count() == {
        "mail": {
            "new": 2,
            "waiting": 2,
            "working": 1,
            "success": 1,
            "failed": 1,
            "cancelled": 1,
            "unknown (8)": 1,
        },
        "post": {"new": 1, "success": 1},
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("status", "nonsense"), ("status", ""), ("status", "invalid"), ("status", True), ("status", [1]), ("status", {"$gt": 0}),
        ("limit", 0), ("limit", -1), ("limit", True), ("limit", "5"), ("limit", 100_001), ("kind", ""), ("kind", {"$gt": ""}),
    ],
)  # fmt: skip
async def test_a_filter_that_cannot_work_is_refused_by_name(name, value, queue):
    with pytest.raises(BadArgument, match=f"^{name}: "):
        await queue.list(**{name: value})
    with pytest.raises(BadArgument, match=f"^{name}: "):
        queue.sync.list(**{name: value})


async def test_the_text_of_an_id_is_told_from_the_id(queue):
    job = await queue.put("mail")
    with pytest.raises(JobNotFound, match=r"this is a text, .* give bson.ObjectId\('" + str(job.id)):
        await queue.get(str(job.id))
    with pytest.raises(JobNotFound, match="in this collection$"):
        await queue.get("mine")
