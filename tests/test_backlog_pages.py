"""The pages of a backlog: what is asked for, and what the server answers."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from bson import DatetimeMS, Int64, ObjectId
from hypothesis import given
from hypothesis import strategies as st

from streamjobs import ASAP
from streamjobs.clients import ours
from streamjobs.job import ASAP_MS, date_ms
from streamjobs.runner.backlog import Candidate, Range
from streamjobs.runner.store import Store, candidate_of
from tests.candidates import FAST, HORIZON, NOW, candidate_lists, oid

# ---- what is asked


@FAST
@given(
    st.booleans(),
    candidate_lists.filter(bool).map(lambda rows: rows[0]),
    st.booleans(),
    st.integers(NOW, NOW + HORIZON),
)
def test_a_range_is_asked_for_by_equalities_and_one_range_in_the_order_of_the_index(asap, last, fresh, until):
    home = Range("mail", 1, asap)
    runat = ASAP_MS if asap else NOW - 1
    home.cursor = None if fresh else Candidate(last.id, "mail", 1, runat, last.created, 0.0, "read")
    keys = ["kind", "status", "runat", "created", "_id"]
    queries = home.queries(until)
    assert len(queries) == (1 if fresh else 2 if asap else 3)
    for query in queries:
        assert list(query) == keys[: len(query)]
        plain = [not isinstance(value, dict) for value in query.values()]
        ranges = [value for value in query.values() if isinstance(value, dict)]
        assert sorted(plain, reverse=True) == plain  # equalities first
        assert len(ranges) <= 1
        for one in ranges:
            assert set(one) <= {"$gt", "$gte", "$lte"}
        assert (query["kind"], query["status"]) == ("mail", 1)
        if asap:
            assert query["runat"] == DatetimeMS(ASAP_MS)
    assert home.order == [(key, 1) for key in keys[3 if asap else 2 :]]
    if not asap:
        assert queries[-1]["runat"]["$lte"] == DatetimeMS(until)


# ---- on the server


@pytest.mark.parametrize("dated", [False, True], ids=["asap", "dated"])
@pytest.mark.parametrize("created", ["same", "some lack it", "most lack it"])
async def test_pages_show_each_of_3500_documents_once_in_the_order_of_the_index(
    dated, created, queue, raw, client, namespace
):
    total, moment = 3_500, datetime(2026, 1, 1, tzinfo=UTC)
    documents = []
    for n in range(total):
        one = {
            "_id": oid((n * 7919) % total), "status": 1, "tries": [], "created": moment, "data": {"n": n}, "retries": 0,
            "retryinterval": Int64(0), "kind": "mail", "runat": moment if dated else ASAP,
        }  # fmt: skip
        if dated and created != "same" and n % 3:
            one["runat"] = moment + timedelta(milliseconds=n % 5)
        if (created == "some lack it" and n % 4 == 0) or (created == "most lack it" and n % 10 < 9):
            one["created"] = None
            if n % 8:
                del one["created"]
        documents.append(one)
    bystanders = [
        {**documents[0], "_id": ObjectId(), "status": 3},
        {**documents[0], "_id": ObjectId(), "kind": "other"},
        {**documents[0], "_id": ObjectId(), "runat": ASAP if dated else moment},
        {**documents[0], "_id": ObjectId(), "runat": datetime(2126, 1, 1, tzinfo=UTC)},
    ]
    raw.insert_many([*documents, *bystanders])

    def place(one: dict[str, Any]) -> Any:
        return (one["runat"], one.get("created") is not None, one["_id"])

    database, _, name = namespace.partition(".")
    store, home = Store(ours(client[database][name])), Range("mail", 1, not dated)
    seen: list[Any] = []
    until = date_ms(datetime(2030, 1, 1, tzinfo=UTC))
    more, pages = True, 0
    while more:
        size = home.size
        rows, more = await store.page(home, until)
        assert len(rows) == size if more else len(rows) < size
        candidates = [candidate_of(row, "read") for row in rows]
        seen += [one.id for one in candidates]
        home.cursor = candidates[-1] if candidates else home.cursor
        pages += 1
        assert pages < 9
    assert pages > 1
    assert seen == [one["_id"] for one in sorted(documents, key=place)]


def test_a_created_that_looks_like_a_condition_is_a_value_in_the_query_behind_it():
    """Guard: values of documents are no operators in filters."""
    home = Range("mail", 1, asap=True)
    home.cursor = Candidate("x", "mail", 1, ASAP_MS, {"$gt": ""}, 0.0, "read")
    for query in home.queries(0):
        assert query["created"] in ({"$eq": {"$gt": ""}}, {"$gte": DatetimeMS(ASAP_MS)})


def test_two_jobs_in_one_place_are_both_handed_out():
    """Guard: a text, a number and bytes may be one as texts, and have no order of their own."""
    home = Range("mail", 1, asap=True)
    for id_ in ("1", 1, 1.5, "1.5", {"a": 1}, "{'a': 1}"):
        assert home.push(Candidate(id_, "mail", 1, ASAP_MS, None, 0.0, "read"))
    assert len([home.pop() for _ in range(6)]) == 6


def test_what_comes_after_a_date_begins_with_its_next_millisecond():
    """Guard: a server may walk over all that equal a ``$gt``: every job to run at once, for the dated ones."""
    dated = Range("mail", 1, asap=False)
    assert dated.queries(NOW)[0]["runat"] == {"$gte": DatetimeMS(ASAP_MS + 1), "$lte": DatetimeMS(NOW)}
    for made, beyond in ((NOW, {"$gte": DatetimeMS(NOW + 1)}), (2**63 - 1, {"$gt": DatetimeMS(2**63 - 1)})):
        dated.cursor = Candidate("x", "mail", 1, NOW - 7, DatetimeMS(made), 0.0, "read")
        _, later, after = dated.queries(NOW)
        assert later["created"] == beyond
        assert after["runat"] == {"$gte": DatetimeMS(NOW - 6), "$lte": DatetimeMS(NOW)}
