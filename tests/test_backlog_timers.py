"""A backlog's timers: what fires when, and how many are kept."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamjobs.runner import backlog as module
from streamjobs.runner.backlog import LIMIT, Backlog, Candidate, Range
from tests.candidates import FAST, HORIZON, NOW, drain, job, range_of, read_all


@FAST
@given(st.lists(st.integers(1, HORIZON), max_size=30), st.integers(700, 10_000))
def test_timers_fire_what_is_due_and_nothing_else(aheads, step):
    rows = [job(n, runat=NOW + ahead) for n, ahead in enumerate(aheads)]
    backlog = read_all(Backlog(["mail"], HORIZON), rows)
    now, out = NOW, []
    while backlog.next_timer is not None:
        assert backlog.next_timer == min(one.runat for one in rows if one not in out)
        now += step
        fired = backlog.fire(now)
        new = drain(backlog)
        assert len(new) == len(fired)
        out += new
        assert {one.id for one in out} == {one.id for one in rows if one.runat <= now}
    assert len(out) == len(rows)


def test_a_job_beyond_the_horizon_is_left_to_the_fallback():
    backlog = read_all(Backlog(["mail"], HORIZON))
    assert not backlog.offer(job(1, runat=NOW + HORIZON + 1), NOW)
    assert backlog.offer(job(2, runat=NOW + HORIZON), NOW)
    assert backlog.next_timer == NOW + HORIZON


def test_a_job_that_was_moved_to_an_earlier_date_gets_the_earlier_timer():
    backlog = read_all(Backlog(["mail"], HORIZON), [job(1, runat=NOW + 20_000)])
    backlog.offer(job(1, runat=NOW + 5_000), NOW)
    assert backlog.next_timer == NOW + 5_000
    backlog.fire(NOW + 5_000)
    assert [one.runat for one in drain(backlog)] == [NOW + 5_000]


@pytest.mark.parametrize("order", ["ascending", "descending", "offers"])
def test_at_most_10000_timers_are_kept_the_earliest_and_the_rest_is_read_when_they_have_fired(order):
    assert LIMIT == 10_000
    rows = [job(n, runat=NOW + 1 + n) for n in range(LIMIT + 30)]
    backlog = read_all(Backlog(["mail"], HORIZON))
    home = range_of(backlog, rows[0])
    if order == "ascending":
        home.restart()
        backlog.page(home, rows, False, NOW)
    else:
        for one in reversed(rows) if order == "descending" else [*rows[::2], *rows[1::2]]:
            backlog.offer(one, NOW)
    assert len(backlog._timers) == LIMIT
    backlog.fire(NOW + LIMIT - 1)
    assert not home.more
    assert len(drain(backlog, 100)) == LIMIT - 1
    backlog.fire(NOW + LIMIT)
    assert backlog.next_timer is None
    assert home.more
    assert home.cursor is None
    out: list[Candidate] = []
    while (found := backlog.next(100)) is not None:
        if isinstance(found, Range):
            backlog.page(found, rows[LIMIT:] if found is home else [], False, NOW + 2 * LIMIT)
        else:
            out += found
    assert out == rows[LIMIT - 1 :]


def test_more_than_10000_offers_are_read_again_instead_of_kept(monkeypatch):
    monkeypatch.setattr(module, "LIMIT", 10)
    backlog = read_all(Backlog(["mail"], HORIZON))
    rows = [job(n, created=n) for n in range(25)]
    for one in rows:
        backlog.offer(one, NOW)
    home = range_of(backlog, rows[0])
    assert backlog.dropped == {"mail"}
    assert backlog.next(100) == rows[:10]
    assert home.more
    left = rows[10:]
    out: list[Candidate] = []
    while (found := backlog.next(100)) is not None:
        if isinstance(found, Range):
            page = [
                one for one in left if one not in out and (found.cursor is None or one.key > found.cursor.key)
            ][:7]
            backlog.page(found, page, len(page) == 7, NOW)
        else:
            out += found
    assert sorted(one.id for one in out) == [one.id for one in left]


def test_a_candidate_that_was_not_due_yet_is_tried_again_at_its_time():
    backlog = read_all(Backlog(["mail"], HORIZON), [job(1, created=1)])
    (one,) = backlog.next(1)
    backlog.again(one, NOW + 5)
    backlog.again(one, NOW + 9)
    assert backlog.next(1) is None
    assert backlog.fire(NOW + 4) == []
    assert len(backlog.fire(NOW + 5)) == 1
    assert backlog.next(1) == [one]
    assert backlog.next_timer is None
