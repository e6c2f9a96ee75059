"""The checker, on histories made by hand: who held a job, who started it, and who got it back."""

from __future__ import annotations

import pytest

from tests.tale import A, B, Tale, lost_and_again, owner


def test_a_plain_run_is_clean():
    tale = Tale()
    tale.put()
    tale.run("a", A, 5.1, 6.0)
    tale.ended("a", 5.1, 6.0)
    tale.event("try", 6.01, A, job="j", number=1, outcome="success")
    tale.stored()
    assert tale.judge() == []
    assert not tale.verdict.apart


def test_a_lost_try_that_was_told_in_time_is_clean():
    tale = lost_and_again()
    assert tale.judge() == []
    assert not tale.verdict.apart


def test_two_tries_that_hold_a_job_at_once():
    tale = Tale()
    tale.put()
    tale.run("a", A, 5.1, 6.0)
    tale.ended("a", 5.1, 6.0, "failure")
    tale.run("b", B, 5.2, 7.0, number=2)
    tale.ended("b", 5.2, 7.0)
    tale.stored(retries=2)
    assert tale.judge().count((1, "two holders")) == 2  # by the stream and by the dates
    tale.tell("gap", 5.15)
    assert tale.judge().count((1, "two holders")) == 1


def test_a_date_may_be_that_of_a_command_that_waited():
    tale = Tale()
    tale.put()
    tale.run("a", A, 5.1, 6.0)
    tale.ended("a", 5.1, 6.0, "released")
    tale.run("b", B, 6.01, 7.0, number=2)
    next(one for one in tale.records if one["what"] == "held" and one["token"] == "b")["claimed"] = 5950.0
    tale.ended("b", 5.95, 7.0)
    tale.stored()
    assert tale.judge() == []


def test_a_job_without_retries_that_starts_twice():
    tale = Tale()
    tale.put(retries=0)
    tale.run("a", A, 5.1, 6.0)
    tale.ended("a", 5.1, 6.0, "interrupted")
    tale.run("b", B, 6.1, 7.0, number=2)
    tale.ended("b", 6.1, 7.0)
    tale.stored(retries=0)
    assert (1, "once started twice") in tale.judge()


@pytest.mark.parametrize("allowed", ["snoozed", "retried"])
def test_a_snooze_or_a_retry_gives_it_another_start(allowed):
    tale = Tale()
    tale.put(retries=0)
    tale.run("a", A, 5.1, 6.0)
    if allowed == "snoozed":
        tale.ended("a", 5.1, 6.0, "snoozed", err="snoozed: 0.05 s")
    else:
        tale.ended("a", 5.1, 6.0, "failure")
        tale.tell("retry", 6.05, job="j", since=6.02)
    tale.run("b", B, 6.1, 7.0, number=2)
    tale.ended("b", 6.1, 7.0)
    tale.stored(retries=0 if allowed == "snoozed" else 1)
    assert tale.judge() == []


def test_one_try_that_starts_twice():
    tale = Tale()
    tale.put()
    tale.run("a", A, 5.1, 6.0)
    start = next(one for one in tale.records if one["what"] == "start")
    tale.records.append({**start, "at": 5.3})
    tale.ended("a", 5.1, 6.0)
    tale.stored()
    assert tale.judge() == [(1, "a try started twice")]


def test_a_claim_with_two_tries_in_the_document():
    tale = lost_and_again()
    tale.ended("a", 5.1, 10.5)
    assert (1, "two tries of one claim") in tale.judge()


def test_a_request_that_arrived_twice_may_claim_twice():
    tale = Tale()
    tale.put()
    tale.run("a", A, 5.1, 6.0)
    tale.ended("a", 5.1, 6.0, "failure")
    tale.tell("held", 7.0, job="j", token="a", owner=owner(A), claimed=7000.0)
    tale.ended("a", 7.0, 8.0, "released")
    tale.run("b", A, 8.1, 9.0, number=3)
    tale.ended("b", 8.1, 9.0)
    tale.stored(retries=2)
    assert tale.judge() == []


def test_code_of_a_lost_try_that_runs_on_though_it_was_told():
    tale = lost_and_again(until=10.5)
    assert tale.judge() == [(1, "two run")]


def test_a_sync_handler_that_looks_must_have_stopped():
    assert lost_and_again(until=10.5, sort="looking").judge() == [(1, "two run")]


@pytest.mark.parametrize(
    ("sort", "case"), [("thread", "sync"), ("stubborn", "outlasted"), ("blocking", "outlasted")]
)
def test_what_cannot_be_stopped_is_counted_apart(sort, case):
    tale = lost_and_again(until=10.5, sort=sort)
    assert tale.judge() == []
    assert tale.verdict.apart == {case: 1}


@pytest.mark.parametrize("late", [False, True], ids=["until its first turn", "longer"])
def test_a_frozen_process_may_run_on_until_its_first_turn(late):
    tale = lost_and_again(until=12.0 if late else 10.6)
    tale.tell("freeze", 6.0, pid=A)
    tale.tell("thaw", 10.5, pid=A)
    tale.records = [one for one in tale.records if one.get("event") != "lease.untrusted"]
    assert tale.judge() == ([(1, "two run")] if late else [])
    assert tale.verdict.apart == ({} if late else {"frozen": 1})


def test_code_that_runs_on_after_its_success_was_recorded():
    tale = Tale()
    tale.put()
    tale.run("a", A, 5.1, 8.0)
    tale.ended("a", 5.1, 6.0, "failure")
    tale.run("b", B, 6.1, 7.0, number=2)
    tale.ended("b", 6.1, 7.0)
    tale.stored(retries=2)
    assert tale.judge() == [(1, "two run")]


def test_a_handler_that_starts_after_its_try_has_ended():
    tale = lost_and_again()
    start = next(one for one in tale.records if one["what"] == "start" and one["token"] == "a")
    start["at"], end = 9.95, next(one for one in tale.records if one["what"] == "end" and one["token"] == "a")
    end["at"] = 9.96
    assert tale.judge() == [(1, "started after its end")]


def test_a_job_taken_from_a_runner_that_had_no_trouble():
    tale = lost_and_again()
    tale.records = [one for one in tale.records if one.get("event") != "lease.untrusted"]
    assert tale.judge() == [(1, "taken from a living holder")]


@pytest.mark.parametrize("trouble", ["death", "freeze", "fault on the server", "fault on it", "stall"])
def test_trouble_of_any_sort_explains_a_loss(trouble):
    tale = lost_and_again(until=6.4)
    tale.records = [one for one in tale.records if not str(one.get("event")).startswith("lease.")]
    if trouble == "death":
        tale.tell("death", 6.5, pid=A)
    elif trouble == "freeze":
        tale.tell("freeze", 6.5, pid=A)
    elif trouble == "stall":
        tale.tell("stall", 6.5, seconds=1.0)
    else:
        tale.tell("fault", 6.5, id=1, sort="x", on="server" if "server" in trouble else f"r{A}")
        tale.tell("healed", 7.0, id=1)
    assert tale.judge() == []


@pytest.mark.parametrize("when", [9.9, 11.9], ids=["in time", "late"])
def test_a_dead_runners_job_must_come_back_within_its_lease_and_a_second(when):
    tale = Tale()
    tale.put()
    tale.run("a", A, 5.1, None)
    tale.tell("death", 6.5, pid=A)
    tale.ended("a", 5.1, when, "lost")
    tale.run("b", B, when + 0.1, when + 1, number=2)
    tale.ended("b", when + 0.1, when + 1)
    tale.stored(retries=2)
    assert tale.judge() == ([] if when < 10.5 else [(2, "not taken back")])


@pytest.mark.parametrize("on", ["server", "fleet", "nobody alive"])
def test_nobody_is_late_while_nobody_could_take_it_back(on):
    tale = Tale()
    tale.put()
    tale.run("a", A, 5.1, None)
    tale.tell("death", 6.5, pid=A)
    if on == "nobody alive":
        tale.tell("freeze", 6.5, pid=B)
        tale.tell("thaw", 12.0, pid=B)
    else:
        tale.tell("fault", 7.0, id=1, sort="kill", on=on)
        tale.tell("healed", 12.0, id=1)
    tale.ended("a", 5.1, 14.9, "lost")
    tale.run("b", B, 15.0, 16.0, number=2)
    tale.ended("b", 15.0, 16.0)
    tale.stored(retries=2)
    assert tale.judge() == []


def test_a_dead_runners_job_that_never_comes_back():
    tale = Tale()
    tale.put()
    tale.run("a", A, 5.1, None)
    tale.tell("death", 6.5, pid=A)
    lease = {"token": "a", "owner": owner(A), "claimed": 5100}
    tale.stored(status=2, lease=lease)
    assert set(tale.judge()) == {(2, "not taken back"), (5, "never ended")}


def test_a_claim_that_its_living_runner_never_learns_of():
    tale = Tale()
    tale.put()
    tale.tell("held", 5.1, job="j", token="a", owner=owner(A), claimed=5100)
    tale.stored(status=2, lease={"token": "a", "owner": owner(A), "claimed": 5100})
    assert set(tale.judge()) == {(4, "orphan"), (5, "never ended")}
