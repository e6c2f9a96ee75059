"""The checker, on histories made by hand: what was lost, what came late, and how it is told."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.history import Log, Run, read
from tests.promises import report
from tests.tale import A, B, C, D, Tale, lost_and_again, owner
from tests.windows import crowded, inside, longest, merged, touched, without


def test_an_acknowledged_put_without_a_document():
    tale = Tale()
    tale.put()
    tale.tell("over", 60.0)
    assert tale.judge() == [(5, "acknowledged and gone")]


def test_a_put_that_is_never_acknowledged_may_be_lost():
    tale = Tale()
    tale.tell("put", 5.0, job="j", kind="many", retries=1, interval=0, n=1)
    tale.tell("over", 60.0)
    assert tale.judge() == []


def test_a_repeated_put_that_is_refused():
    tale = Tale()
    tale.tell("put", 5.0, job="j", kind="many", retries=1, interval=0, n=1)
    tale.tell("refused", 5.1, job="j", error="DuplicateKeyError")
    assert tale.judge() == [(5, "put refused")]


def test_one_put_that_made_two_documents():
    tale = Tale()
    for job, token in (("j", "a"), ("k", "b")):
        tale.put(job)
        tale.run(token, A, 5.1, 6.0, job=job)
        tale.ended(token, 5.1, 6.0, job=job)
        tale.stored(job=job)
    assert tale.judge() == [(5, "put twice")]


def test_a_claim_that_ended_in_no_try():
    tale = Tale()
    tale.put()
    tale.run("a", A, 5.1, 6.0)
    tale.run("b", B, 7.0, 8.0)
    tale.ended("b", 7.0, 8.0)
    tale.stored()
    assert (5, "a claim without a try") in tale.judge()


def test_a_job_that_is_held_after_its_try():
    tale = Tale()
    tale.put()
    tale.run("a", A, 5.1, 6.0)
    tale.ended("a", 5.1, 6.0)
    tale.stored(lease={"token": "a", "owner": owner(A), "claimed": 5100})
    assert tale.judge() == [(5, "held after its try")]


def test_an_outcome_that_its_runner_saw_recorded_and_that_is_not_there():
    tale = lost_and_again()
    tale.event("try", 9.5, A, job="j", number=1, outcome="success")
    assert tale.judge() == [(5, "an outcome was lost")]


def test_a_job_that_has_not_ended_when_all_had_the_time():
    tale = Tale()
    tale.put()
    tale.run("a", A, 5.1, 6.0)
    tale.ended("a", 5.1, 6.0, "failure")
    tale.stored(status=3, retries=2, at=6.1)
    assert tale.judge() == [(5, "never ended")]
    assert tale.judge(drained=False) == []


@pytest.mark.parametrize(
    ("outcome", "status", "retries"),
    [("success", 5, 3), ("success", 4, 2), ("failure", 4, 2), ("lost", 4, 2), ("cancelled", 4, 3)],
)
def test_status_and_retries_that_the_tries_do_not_tell(outcome, status, retries):
    tale = Tale()
    tale.put()
    tale.run("a", A, 5.1, 6.0)
    tale.event("lease.untrusted", 5.5, A)
    tale.ended("a", 5.1, 6.0, outcome)
    tale.stored(status=status, retries=retries, at=6.1)
    assert (5, "status and tries differ") in tale.judge()


def test_a_job_that_runs_after_its_end():
    tale = Tale()
    tale.put()
    tale.run("a", A, 5.1, 6.0)
    tale.ended("a", 5.1, 6.0)
    tale.run("b", B, 7.0, 8.0, number=2)
    tale.ended("b", 7.0, 8.0)
    tale.stored()
    assert tale.judge() == [(5, "ran after its end")]


@pytest.mark.parametrize(("answered", "clean"), [(9.5, True), (8.5, True), (7.9, False)])
def test_a_retry_may_take_effect_from_when_it_is_asked_for_until_its_answer_and_twice_if_it_is_sent_twice(
    answered, clean
):
    tale = Tale()
    tale.put()
    tale.run("a", A, 5.1, 6.0)
    tale.ended("a", 5.1, 6.0)
    tale.tell("retry", answered, job="j", since=6.5)
    tale.run("b", B, 7.0, 8.0, number=2)
    tale.ended("b", 7.0, 8.0)
    tale.run("c", B, 9.0, 9.3, number=3)
    tale.ended("c", 9.0, 9.3)
    tale.stored()
    assert tale.judge() == ([] if clean else [(5, "ran after its end")])


@pytest.mark.parametrize("since", [8.1, 7.1])
def test_a_retry_that_was_not_asked_for_yet_explains_nothing(since):
    tale = Tale()
    tale.put()
    tale.run("a", A, 5.1, 6.0)
    tale.ended("a", 5.1, 6.0)
    tale.run("b", B, 7.0, 8.0, number=2)
    tale.tell("retry", 8.5, job="j", since=since)
    tale.ended("b", 7.0, 8.0)
    tale.stored()
    assert (5, "ran after its end") in tale.judge()


@pytest.mark.parametrize("started", [False, True])
def test_a_job_that_starts_after_its_cancel_was_acknowledged(started):
    tale = Tale()
    tale.put()
    tale.tell("cancel", 5.05, job="j")
    if started:
        tale.run("a", A, 5.1, 6.0)
        tale.ended("a", 5.1, 6.0)
    tale.stored(status=4 if started else 6)
    assert tale.judge() == ([(5, "ran after its cancel")] if started else [])


def test_a_write_without_a_majority():
    tale = Tale()
    tale.tell("weak", 5.0, command="insert", pid=A)
    assert tale.judge() == [(5, "weak write")]


def test_garbage_that_was_changed():
    tale = Tale()
    tale.tell("garbage", 5.0, job="x", kept=False)
    tale.tell("garbage", 5.0, job="y", kept=True)
    assert tale.judge() == [(5, "garbage touched")]


def test_a_runner_that_ends_by_itself():
    tale = Tale(A, B, C)
    tale.tell("exit", 7.0, pid=A, code=1)
    tale.tell("term", 7.0, pid=B)
    tale.tell("exit", 7.5, pid=B, code=0)
    tale.tell("death", 7.0, pid=C)
    tale.tell("exit", 7.1, pid=C, code=-9)
    assert tale.judge() == [(8, "a runner ended")]


def late(claimed: float = 9.0, runat: float | None = None, tale: Tale | None = None) -> Tale:
    tale = tale or Tale(A)
    tale.put(at=5.0)
    tale.records[-1]["runat"] = None if runat is None else runat * 1000
    tale.run("a", A, claimed, claimed + 1)
    tale.ended("a", claimed, claimed + 1)
    tale.stored()
    return tale


def test_a_due_job_that_an_idle_runner_lets_wait():
    assert late().judge() == [(6, "late")]
    assert late(6.4).judge() == []


def test_a_delayed_job_is_late_from_its_date_on_and_early_before():
    assert late(9.0, runat=8.0).judge() == []
    assert late(10.0, runat=8.0).judge() == [(6, "late")]
    assert late(7.99, runat=8.0).judge() == [(6, "early")]


@pytest.mark.parametrize(("pids", "frozen", "found"), [
    ((A, B, C, D), (A, B), []),
    ((A, B, C, D), (A,), [(6, "late")]),
    ((A, B, C), (A, B), [(6, "late")]),  # so few all listen to all
])  # fmt: skip
def test_where_slots_are_shared_out_and_two_are_away_the_fallback_is_the_bound(pids, frozen, found):
    tale = Tale(*pids)
    for pid in frozen:
        tale.tell("freeze", 4.0, pid=pid)
        tale.tell("thaw", 8.0, pid=pid)
    tale.put(at=5.0)
    tale.run("c", C, 9.0, 9.5)
    tale.ended("c", 9.0, 9.5)
    tale.stored()
    assert tale.judge() == found
    assert tale.judge(interval=1.0, back=2.0) == (found or [(6, "late for the fallback")])


def test_a_job_that_is_never_claimed():
    tale = Tale()
    tale.put()
    tale.stored(status=1)
    assert set(tale.judge()) == {(6, "late"), (5, "never ended")}


@pytest.mark.parametrize(
    "busy", ["full", "at work", "frozen", "lagged", "stalled", "blocked", "server", "deaf", "not there"]
)
def test_nobody_is_late_who_could_not_claim(busy):
    tale = Tale() if busy != "not there" else Tale(A)
    tale.records = [one for one in tale.records if one.get("pid") != B]
    if busy == "full":
        for token in ("x", "y"):
            tale.put(token, 4.0, n=hash(token))
            tale.run(token, A, 4.1, 8.9, job=token)
            tale.ended(token, 4.1, 8.9, job=token)
            tale.stored(job=token)
    elif busy == "at work":
        for n in range(5):
            token = f"t{n}"
            tale.put(token, 4.0, n=10 + n)
            tale.records[-1]["at"] = 4.9 + n
            tale.run(token, A, 5.0 + n, 5.1 + n, job=token)
            tale.ended(token, 5.0 + n, 5.1 + n, job=token)
            tale.stored(job=token)
    elif busy == "frozen":
        tale.tell("freeze", 4.0, pid=A)
        tale.tell("thaw", 8.5, pid=A)
    elif busy == "lagged":
        tale.tell("lag", 8.5, pid=A, seconds=4.0)
    elif busy == "stalled":
        tale.tell("stall", 8.5, seconds=4.0)
    elif busy == "blocked":
        tale.put("x", 4.0, n=9)
        tale.run("x", A, 4.1, 8.5, job="x", sort="blocking")
        tale.ended("x", 4.1, 8.5, job="x")
        tale.stored(job="x")
    elif busy == "server":
        tale.tell("fault", 4.0, id=1, sort="kill", on="server")
        tale.tell("healed", 7.5, id=1)
    elif busy == "deaf":
        tale.event("stream.state", 4.0, A, state="gap")
        tale.event("stream.state", 7.0, A, state="live")
    else:
        next(one for one in tale.records if one.get("event") == "runner.started")["at"] = 8.0
    assert late(tale=tale).judge() == []


def test_a_deaf_runner_must_still_find_it_within_its_fallback():
    tale = Tale(A)
    tale.event("stream.state", 4.0, A, state="degraded")
    assert late(9.9, tale=tale).judge() == []
    tale = Tale(A)
    tale.event("stream.state", 4.0, A, state="degraded")
    assert late(10.1, tale=tale).judge() == [(6, "late for the fallback")]


def test_a_dropped_collection_takes_its_jobs_with_it():
    tale = Tale()
    tale.put()
    tale.tell("dropped", 6.0)
    assert tale.judge() == []


def test_a_report_has_the_jobs_whole_history_before_its_breach():
    tale = Tale()
    tale.put()
    tale.judge()
    text = report(Run(tale.records), tale.verdict)
    assert text.index("'what': 'put'") < text.index("'what': 'ack'") < text.index("BREACH of promise 5")


def test_a_log_is_read_back_by_time(tmp_path):
    log = Log(tmp_path / "history")
    log.note("end", at=2.0, job="j")
    log.note("start", at=1.0, job="j")
    log.close()
    assert [one["what"] for one in read(log.path)] == ["start", "end"]
    assert json.loads(log.path.read_text().splitlines()[0]) == {"what": "end", "at": 2.0, "job": "j"}


spans = st.lists(
    st.tuples(st.integers(0, 30), st.integers(0, 30)).map(lambda two: (min(two), max(two))), max_size=8
)


def ticks(windows):
    return {n for since, until in windows for n in range(since, until)}


@given(spans, spans, st.integers(1, 3), st.integers(0, 30), st.integers(0, 30))
def test_windows_beside_sets_of_whole_numbers(left, right, least, since, until):
    one, other = merged(left), merged(right)
    assert ticks(one) == ticks(left)
    assert all(before[1] < after[0] for before, after in zip(one, one[1:], strict=False))
    assert ticks(without(one, other)) == ticks(one) - ticks(other)
    assert ticks(crowded(left, least)) == {
        n for n in range(30) if sum(begin <= n < end for begin, end in left) >= least
    }
    assert {n for n in range(30) if inside(one, n)} == ticks(one)
    here = ticks(one) & set(range(since, until))
    runs, count = [0], 0
    for n in range(31):
        count = count + 1 if n in here else 0
        runs.append(count)
    assert longest(one, since, until) == max(runs)
    if since < until:
        assert touched(one, since, until) or not here
