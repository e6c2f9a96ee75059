"""Indexes: made once, and missing ones told."""

from __future__ import annotations

from streamjobs import Queue
from streamjobs.indexes import INDEXES


async def test_indexes_are_made_once_and_missing_ones_told(uri, namespace, raw):
    async with Queue(uri, namespace) as queue:
        raw.insert_one({"_id": 1})
        assert await queue.missing_indexes() == list(INDEXES)
        assert await queue.create_indexes() == list(INDEXES)
        assert await queue.create_indexes() == await queue.missing_indexes() == []
        raw.drop_index("owner")
        assert [one.name for one in await queue.missing_indexes()] == ["owner"]
        raw.create_index("lease.owner", name="another name")
        assert await queue.missing_indexes() == []
    there = raw.index_information()
    assert there["due"]["key"] == [("kind", 1), ("status", 1), ("runat", 1), ("created", 1), ("_id", 1)]
    assert there["control"]["sparse"] is True


async def test_indexes_of_a_collection_that_is_not_there_are_all_missing(uri, namespace):
    async with Queue(uri, namespace) as queue:
        assert await queue.missing_indexes() == list(INDEXES)
