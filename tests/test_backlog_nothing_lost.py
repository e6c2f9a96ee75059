"""A backlog loses and doubles nothing: reads in flight, cursors, restarts, unreadable documents."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamjobs.runner import backlog as module
from streamjobs.runner.backlog import LIMIT, Backlog, Candidate, Range
from tests.candidates import HORIZON, NOW, drain, job, oid, range_of, read_all


class Sim:
    """The database as sorted rows; pages of three, read as a runner would, with events at any moment."""

    page = 3

    def __init__(self) -> None:
        self.backlog = Backlog(["mail"], HORIZON)
        self.stored: dict[Any, Candidate] = {}
        self.out: list[Candidate] = []
        self.now = float(NOW)
        self.reading: tuple[Range, list[Candidate], bool] | None = None

    def insert(self, one: Candidate, *, told: bool = True) -> None:
        self.stored[one.id] = one
        if told:
            self.backlog.offer(one, self.now, fresh=True)

    def step(self, count: int) -> bool:
        """One turn of the claim loop: a read begins, a page comes, or jobs are claimed."""
        if self.reading is not None:
            (home, rows, full), self.reading = self.reading, None
            home.reading = False
            self.backlog.page(home, rows, full, self.now)
            return True
        self.backlog.fire(self.now)
        found = self.backlog.next(count)
        if found is None:
            return False
        if isinstance(found, Range):
            last = found.cursor
            mine = [
                one for one in self.stored.values()
                if range_of(self.backlog, one) is found
                and (last is None or one.key > last.key)
                and one.runat <= self.now + HORIZON
            ]  # fmt: skip
            rows = sorted(mine, key=lambda one: one.key)[: self.page]
            found.reading = True
            self.reading = (found, rows, len(rows) == self.page)
            return True
        for one in found:
            if self.stored.get(one.id) == one and one.runat <= self.now:
                del self.stored[one.id]
                self.out.append(one)
        return True


_moves = st.lists(
    st.one_of(
        st.tuples(
            st.just("insert"),
            st.integers(-20, 0),
            st.none() | st.integers(-20, HORIZON),
            st.sampled_from([1, 3]),
        ),
        st.tuples(st.just("step"), st.integers(1, 3)),
        st.tuples(st.just("step"), st.integers(1, 3)),
        st.tuples(st.just("time"), st.integers(1, 20_000)),
        st.tuples(st.just("restart")),
    ),
    max_size=60,
)


@settings(max_examples=400, deadline=None)
@given(st.lists(st.integers(-20, 0), max_size=12), _moves, st.sampled_from([3, 5, LIMIT]))
def test_nothing_that_was_there_or_offered_is_lost_whatever_happens_in_between(before, moves, limit):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "LIMIT", limit)
        sim = Sim()
        for number, created in enumerate(before):
            sim.insert(job(number, created=NOW + created), told=False)
        for number, move in enumerate(moves, 1_000):
            match move:
                case ("insert", created, ahead, status):
                    runat = None if ahead is None else int(sim.now) + ahead
                    sim.insert(job(number, created=NOW + created, runat=runat, status=status))
                case ("step", count):
                    sim.step(count)
                case ("time", ms):
                    sim.now += ms
                case _:
                    sim.backlog.restart("mail")
        total = len(before) + sum(move[0] == "insert" for move in moves)
        for _ in range(40 * (total + 10)):  # all fall due meanwhile, without any further restart
            if not sim.step(2):
                timer = sim.backlog.next_timer
                if timer is None:
                    break
                sim.now = max(sim.now, float(timer))
        assert sim.stored == {}
        assert len(sim.out) == total


def test_an_event_during_a_read_in_flight_is_kept():
    backlog = read_all(Backlog(["mail"], HORIZON))
    backlog.restart("mail")
    home = backlog.next(1)
    assert isinstance(home, Range)
    home.reading = True
    late = job(5, created=NOW, status=home.status, runat=None if home.asap else NOW)
    assert backlog.offer(late, NOW)
    home.reading = False
    backlog.page(home, [], False, NOW)
    while isinstance(found := backlog.next(1), Range):
        backlog.page(found, [], False, NOW)
    assert found == [late]


def test_a_late_arrival_behind_the_cursor_is_taken_in_and_one_before_it_left_to_be_read():
    backlog = Backlog(["mail"], HORIZON)
    rows = [job(n, created=NOW - 100 + n) for n in range(10, 13)]
    home = range_of(backlog, rows[0])
    read_all(backlog)
    home.restart()
    backlog.page(home, rows, True, NOW)
    behind, ahead = job(1, created=NOW - 200), job(2, created=NOW)
    assert backlog.offer(behind, NOW)
    assert backlog.offer(ahead, NOW)
    assert backlog.next(9) == [behind, *rows]
    assert backlog.next(9) is home
    backlog.page(home, [ahead], False, NOW)
    assert drain(backlog) == [ahead]


@pytest.mark.parametrize(
    ("cursor", "late"),
    [
        (job(0, id=10, created=5), job(0, id=9, created=5)),  # 10 sorts after 9, its text before
        (job(0, id="b", created=None), job(0, id="c", created=None)),
        (job(1, created="text"), job(2, created=None)),
    ],
    ids=["numbers", "texts", "another type of created"],
)
def test_an_arrival_that_may_be_behind_the_cursor_is_taken_in(cursor, late):
    backlog = read_all(Backlog(["mail"], HORIZON))
    home = range_of(backlog, cursor)
    home.restart()
    backlog.page(home, [cursor], True, NOW)
    backlog.offer(late, NOW)
    out: list[Candidate] = []
    while (found := backlog.next(9)) is not None:
        if isinstance(found, Range):
            backlog.page(found, [], False, NOW)
        else:
            out += found
    assert {one.id for one in out} == {cursor.id, late.id}


def test_what_came_during_a_read_does_not_overtake_what_has_not_been_read():
    backlog = read_all(Backlog(["mail"], HORIZON))
    rows = [job(n, created=NOW - 100 + n) for n in range(9)]
    home = range_of(backlog, rows[0])
    home.restart()
    home.reading = True
    newest = job(50, created=NOW)
    backlog.offer(newest, NOW)
    home.reading = False
    backlog.page(home, rows[:3], True, NOW)
    out: list[Candidate] = []
    at = 3
    while (found := backlog.next(2)) is not None:
        if isinstance(found, Range):
            backlog.page(found, rows[at : at + 3], len(rows[at : at + 3]) == 3, NOW)
            at += 3
        else:
            out += found
    assert out == [*rows, newest]


def test_a_restart_during_a_read_reads_from_the_beginning_again():
    backlog = read_all(Backlog(["mail"], HORIZON))
    rows = [job(n, created=NOW - 100 + n) for n in range(10, 16)]
    home = range_of(backlog, rows[0])
    home.restart()
    backlog.page(home, rows[:3], True, NOW)
    home.reading = True  # the second page is asked for, and the stream has a gap meanwhile
    backlog.restart("mail")
    home.reading = False
    backlog.page(home, rows[3:], False, NOW)
    assert (home.more, home.cursor) == (True, None)
    unseen = job(1, created=NOW - 500)
    out: list[Candidate] = []
    while (found := backlog.next(9)) is not None:
        if isinstance(found, Range):
            backlog.page(found, [unseen] if found is home else [], False, NOW)
        else:
            out += found
    assert out == [*rows, unseen]


def test_the_same_job_from_a_put_and_from_the_stream_comes_once():
    backlog = read_all(Backlog(["mail"], HORIZON))
    one = job(1)
    assert backlog.offer(one, NOW)
    assert not backlog.offer(one, NOW, fresh=True)
    assert backlog.next(9) == [one]
    assert not backlog.offer(one, NOW, fresh=True)  # the insert's event comes after the claim
    assert backlog.next(9) is None
    assert backlog.offer(one, NOW)  # put back: an update, not an insert
    assert backlog.next(9) == [one]


def test_offers_of_other_kinds_and_statuses_are_no_candidates():
    backlog = read_all(Backlog(["mail"], HORIZON))
    assert not backlog.offer(job(1, kind="post"), NOW)
    backlog.offer(job(2, status=4), NOW)
    assert backlog.next(9) is None


@pytest.mark.parametrize("id_", [oid(1), "text", {"a": 1}, [1], None])
def test_an_unreadable_document_is_told_once_whatever_its_id_is(id_):
    backlog = Backlog(["mail"], HORIZON)
    assert backlog.news(id_)
    assert not backlog.news(id_)


def test_an_unreadable_document_is_left_out_until_somebody_writes_it():
    backlog = Backlog(["mail"], HORIZON)
    bad, good = job(1), job(2)
    backlog.leave_out(bad.id)
    assert drain(read_all(backlog, [bad, good])) == [good]
    assert backlog.offer(bad, NOW)
    assert drain(backlog) == [bad]
    assert not backlog.left_out(9)


def test_what_is_left_out_is_looked_at_in_turn():
    backlog = Backlog(["mail"], HORIZON)
    ids = [oid(number) for number in range(5)]
    for id_ in ids:
        backlog.leave_out(id_)
    assert backlog.left_out(3) == ids[:3]
    assert backlog.left_out(3) == [*ids[3:], ids[0]]


def test_what_was_told_of_since_the_look_that_did_not_find_it_is_kept():
    backlog = Backlog(["mail"], HORIZON)
    read_all(backlog)
    one, other = job(1), job(2)
    for each in (one, other):
        backlog.offer(each, NOW)
    again = job(1)
    again.seen = 7.5
    backlog.offer(again, NOW)
    backlog.drop({one.name, other.name}, before=7.0)
    assert backlog.holds(one)
    assert not backlog.holds(other)
    assert drain(backlog) == [one]


def test_one_that_was_deleted_and_put_again_with_its_id_is_news():
    backlog = read_all(Backlog(["mail"], HORIZON))
    backlog.offer(job(1), NOW, fresh=True)
    assert [one.id for one in drain(backlog)] == [oid(1)]
    assert not backlog.offer(job(1), NOW, fresh=True)  # the stream tells of the same put
    assert backlog.offer(job(1, created=5), NOW, fresh=True)
    assert len(drain(backlog)) == 1


def test_another_attempt_comes_before_a_later_timer_and_of_another_kind_never():
    backlog = read_all(Backlog(["mail"], HORIZON))
    backlog.offer(job(1, runat=NOW + 20_000), NOW)
    backlog.again(job(1), NOW + 5)
    backlog.again(job(2, kind="post"), NOW + 5)
    assert backlog.next_timer == NOW + 5
    assert [one.id for one in backlog.fire(NOW + 5)] == [oid(1)]
