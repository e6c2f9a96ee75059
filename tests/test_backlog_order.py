"""The order in which a backlog's jobs come: by range, by turns, by kind."""

from __future__ import annotations

from typing import Any

import pytest
from bson import Int64
from hypothesis import given
from hypothesis import strategies as st

from streamjobs.job import date_ms
from streamjobs.runner.backlog import TURN, Backlog, Candidate, Range
from tests.candidates import FAST, HORIZON, NOW, candidate_lists, drain, job, oid, range_of, read_all


@FAST
@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), unique_by=lambda one: one[1]),
    st.integers(1, 5),
)
def test_the_jobs_of_a_range_come_in_the_order_of_their_creation(pairs, count):
    rows = [job(number, created=created) for created, number in pairs]
    out = drain(read_all(Backlog(["mail"], HORIZON), rows), count)
    assert out == sorted(rows, key=lambda one: (date_ms(one.created), one.id))


@FAST
@given(candidate_lists, st.integers(1, 7))
def test_everything_read_comes_out_once_and_each_range_in_its_order(rows, count):
    out = drain(read_all(Backlog(["mail", "post"], HORIZON), rows), count)
    assert sorted(one.id for one in out) == sorted(one.id for one in rows)
    places: dict[Any, list[Candidate]] = {}
    for one in out:
        places.setdefault((one.kind, one.status, one.asap), []).append(one)
    for mine in places.values():
        assert [one.key for one in mine] == sorted(one.key for one in mine)


@FAST
@given(candidate_lists, st.data())
def test_a_range_that_holds_due_jobs_gets_at_least_one_of_any_four_claims_of_its_kind(rows, data):
    backlog = read_all(Backlog(["mail", "post"], HORIZON), rows)
    waited: dict[int, int] = {}
    number = 10**7
    while True:
        for kind in ("mail", "post"):  # what comes meanwhile goes into its range at once
            if data.draw(st.integers(0, 5)) == 0 and number < 10**7 + 30:
                number += 1
                backlog.offer(
                    job(number, created=NOW, status=data.draw(st.sampled_from([1, 3])), kind=kind), NOW
                )
        ready = {id(home): home for ranges in backlog._ranges.values() for home in ranges if home.heap}
        found = backlog.next(1)
        if found is None:
            break
        (one,) = found
        for home in ready.values():
            if home.kind != one.kind:
                continue
            waited[id(home)] = 0 if home is range_of(backlog, one) else waited.get(id(home), 0) + 1
            assert waited[id(home)] < TURN
            if not home.heap:
                waited[id(home)] = 0
    assert TURN == 4


def test_the_earliest_due_goes_first_but_every_fourth_claim_is_the_other_ranges():
    early = [job(n, created=NOW - 100 + n) for n in range(9)]
    late = [job(100 + n, runat=NOW - 10 + n, status=3) for n in range(3)]
    out = drain(read_all(Backlog(["mail"], HORIZON), [*late, *early]))
    assert ["e" if one in early else "l" for one in out] == list("eeeleeeleeel")


def test_an_asap_job_is_due_when_it_was_created():
    rows = [
        job(1, runat=NOW - 5),
        job(2, created=NOW - 7),
        job(3, runat=NOW - 9),
        job(4, created=NOW - 3, status=3),
    ]
    out = drain(read_all(Backlog(["mail"], HORIZON), rows))
    assert [one.id for one in out] == [oid(3), oid(2), oid(1), oid(4)]


@FAST
@given(st.lists(st.sampled_from(["a", "b", "c"]), max_size=30), st.integers(1, 4))
def test_kinds_take_turns(kinds, count):
    rows = [job(n, created=n, kind=kind) for n, kind in enumerate(kinds)]
    out = [one.kind for one in drain(read_all(Backlog(["a", "b", "c"], HORIZON), rows), count)]
    for place, kind in enumerate(
        out
    ):  # between two of a kind comes one of each other kind that still has some
        rest = out[place + 1 :]
        if kind in rest:
            between = set(rest[: rest.index(kind)])
            assert between == set(rest) - {kind}


def test_thousands_with_the_same_created_come_once_each_in_the_order_of_their_ids():
    backlog = Backlog(["mail"], HORIZON)
    rows = [job(n, created=NOW - 1) for n in range(3_500)]
    home = range_of(backlog, rows[0])
    read_all(backlog)
    backlog.restart("mail")
    out: list[Candidate] = []
    at = 0
    while (found := backlog.next(100)) is not None:
        if isinstance(found, Range):
            size = found.size
            page = rows[at : at + size] if found is home else []
            at += len(page)
            backlog.page(found, page, len(page) == size, NOW)
        else:
            out += found
    assert out == rows


@pytest.mark.parametrize("foreign", [None, "text", Int64(5), 0.5, [1]])
def test_jobs_without_a_usable_created_are_due_first_and_kept_beside_others(foreign):
    rows = [job(1, created=5), job(2, created=foreign), job(3, created=-5), job(4, created=foreign)]
    out = drain(read_all(Backlog(["mail"], HORIZON), rows))
    assert [one.id for one in out] == [oid(2), oid(4), oid(3), oid(1)]


@FAST
@given(
    st.lists(st.integers(0, 3), max_size=30), st.integers(0, 5), st.integers(0, 9), st.sampled_from([1, 1, 4])
)
def test_beyond_the_free_slots_come_only_batches_without_a_job_that_may_start_only_once(
    retries, count, ahead, spread
):
    rows = [job(number, created=NOW - 100 + number) for number in range(len(retries))]
    for one, left in zip(rows, retries, strict=True):
        one.retries = left
    backlog = read_all(Backlog(["mail"], HORIZON), rows)
    out: list[Candidate] = []
    while isinstance(found := backlog.next(count, spread, ahead), list):
        assert len(found) <= count or not any(one.once for one in found)
        assert len(found) <= count + ahead
        out += found
    # what is left begins with one that has to wait for a free slot
    left = drain(backlog, 1)
    assert not left or spread > 1 or ((left[0].once or ahead == 0) and count == 0)
    assert sorted(one.id for one in out + left) == [one.id for one in rows]


def test_what_is_known_waits_for_one_range_to_be_read_and_not_for_four():
    """Guard: Backlog._in_turn. On a busy server each read is a while in which slots are free."""
    backlog = Backlog(["mail"], HORIZON)
    first = backlog.next(10)
    assert isinstance(first, Range)
    backlog.page(first, [job(number) for number in range(3)], False, NOW)
    assert [one.id for one in backlog.next(2)] == [oid(0), oid(1)]
    second = backlog.next(10)
    assert isinstance(second, Range)
    backlog.page(second, [], False, NOW)
    assert [one.id for one in backlog.next(10)] == [oid(2)]
    for _ in range(2):  # nothing is known: the reads follow each other
        unread = backlog.next(10)
        assert isinstance(unread, Range)
        backlog.page(unread, [], False, NOW)
    assert backlog.next(10) is None


def test_a_range_that_must_be_read_first_is_not_skipped_for_its_turn():
    """What is known beyond the end of a page would overtake what comes before it."""
    backlog = Backlog(["mail"], HORIZON)
    home = backlog.next(1)
    backlog.page(home, [job(0, created=0)], True, NOW)
    home.push(job(9, id="late", created=9))
    assert [one.id for one in backlog.next(10)] == [oid(0)]
    assert backlog.next(10) is home
    backlog.page(home, [job(5, created=5)], True, NOW)
    assert [one.id for one in backlog.next(10)] == [oid(5)]
    assert backlog.next(10) is home
