"""Candidates for a backlog, and a backlog that has read them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from bson import DatetimeMS, ObjectId
from hypothesis import settings
from hypothesis import strategies as st

from streamjobs.job import ASAP_MS
from streamjobs.runner.backlog import Backlog, Candidate, Range

HORIZON = 35_000
NOW = 1_000_000_000
FAST = settings(max_examples=150, deadline=None)


def oid(number: int) -> ObjectId:
    return ObjectId(f"{number:024x}")


def job(
    number: int,
    *,
    id: Any = None,
    created: Any = 0,
    runat: int | None = None,
    status: int = 1,
    kind: str = "mail",
) -> Candidate:
    """A candidate; created in ms, runat in ms or None for ASAP."""
    date = DatetimeMS(created) if type(created) is int else created
    return Candidate(id or oid(number), kind, status, ASAP_MS if runat is None else runat, date, 0.0, "test")


def range_of(backlog: Backlog, one: Candidate) -> Range:
    return next(
        home for home in backlog._ranges[one.kind] if (home.status, home.asap) == (one.status, one.asap)
    )


def read_all(backlog: Backlog, rows: Iterable[Candidate] = (), now: float = NOW) -> Backlog:
    """Have every range read to its end, with these rows in it."""
    rows = list(rows)
    for kind in backlog._ranges:
        for home in backlog._ranges[kind]:
            mine = sorted((one for one in rows if range_of(backlog, one) is home), key=lambda one: one.key)
            backlog.page(home, mine, False, now)
    return backlog


def drain(backlog: Backlog, count: int = 1) -> list[Candidate]:
    """All that can be claimed without a read."""
    out: list[Candidate] = []
    while isinstance(found := backlog.next(count), list):
        assert 0 < len(found) <= count
        out += found
    assert found is None, found
    return out


candidate_lists = st.lists(
    st.builds(
        job,
        st.integers(0, 10**6),
        created=st.integers(NOW - 50, NOW) | st.sampled_from([None, "text", 0.5, 7]),
        runat=st.none() | st.integers(NOW - 50, NOW),
        status=st.sampled_from([1, 3]),
        kind=st.sampled_from(["mail", "post"]),
    ),
    unique_by=lambda one: one.id,
    max_size=40,
)
