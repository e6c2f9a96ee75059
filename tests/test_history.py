"""The history checker itself: hand-made histories, each with one breach that it must find, and clean ones."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.history import Log, Run, read
from tests.promises import check, report
from tests.sight import Limits
from tests.windows import crowded, inside, longest, merged, touched, without

LIMITS = Limits(lease=3.0, beat=0.5, margin=0.5, interval=3.0, slots=2)
A, B, C = 101, 102, 103


class Tale:
    """A history, told by hand; the server's clock is the history's."""

    def __init__(self, *pids: int) -> None:
        self.records: list[dict[str, Any]] = []
        self.tries: dict[str, list[dict[str, Any]]] = {}
        self.put_about: dict[str, dict[str, Any]] = {}
        self.tell("clock", 0.0, server=0.0, trip=0.001)
        for pid in pids or (A, B):
            self.event("runner.started", 0.0, pid)

    def tell(self, what: str, at: float, **fields: Any) -> None:
        self.records.append({"what": what, "at": at, **fields})

    def event(self, name: str, at: float, pid: int, **fields: Any) -> None:
        self.tell("event", at, event=name, pid=pid, runner=f"r{pid}", owner=owner(pid), **fields)

    def put(
        self, job: str = "j", at: float = 5.0, *, retries: int = 3, interval: float = 0.0, n: int = 1
    ) -> None:
        self.put_about[job] = {"retries": retries, "n": n}
        self.tell("put", at - 0.01, job=job, kind="many", retries=retries, interval=interval, n=n)
        self.tell("ack", at, job=job, runat=None)

    def run(
        self, token: str, pid: int, since: float, until: float | None, *, job: str = "j", sort: str = "async", number: int = 1
    ) -> None:  # fmt: skip
        """A claim, and its handler's start and end."""
        self.tell("held", since, job=job, token=token, owner=owner(pid), claimed=since * 1000)
        about = {"job": job, "token": token, "owner": owner(pid), "pid": pid, "runner": f"r{pid}"}
        self.tell("start", since + 0.01, **about, number=number, sort=sort)
        if until is not None:
            self.tell("end", until, **about, number=number, sort=sort, how="returned")

    def ended(
        self, token: str, since: float, when: float, outcome: str = "success", *, job: str = "j", **more: Any
    ) -> None:
        """Its try, as stored, and its write on the stream."""
        self.tell("freed", when, job=job)
        entry = {"runner": "r", "token": token, "claimed": since * 1000, "when": when * 1000, **more}
        if outcome not in ("success", "failure"):
            entry["outcome"] = outcome
        if outcome != "success":
            entry.setdefault("err", outcome)
        self.tries.setdefault(job, []).append(entry)

    def stored(
        self, status: int = 4, retries: int = 3, *, job: str = "j", at: float = 60.0, **more: Any
    ) -> None:
        n = self.put_about.get(job, {}).get("n")
        tries = self.tries.get(job, [])
        self.tell(
            "document",
            at,
            **{"job": job, "status": status, "retries": retries, "tries": tries, "n": n, **more},
        )

    def judge(self, **limits: Any) -> list[tuple[int, str]]:
        self.verdict = check(Run(self.records), Limits(**{**vars_of(LIMITS), **limits}))
        return [(one.promise, one.name) for one in self.verdict.breaches]


def owner(pid: int) -> str:
    return f"host:{pid}:0a0b0c"


def vars_of(limits: Limits) -> dict[str, Any]:
    return {name: getattr(limits, name) for name in Limits.__dataclass_fields__}


def lost_and_again(*, until: float = 9.0, again: float = 10.0, sort: str = "async") -> Tale:
    """A's try is lost at 9.9 after trouble with its lease; B runs it again."""
    tale = Tale()
    tale.put()
    tale.run("a", A, 5.1, until, sort=sort)
    tale.event("lease.untrusted", 9.0, A)
    tale.event("lease.registered", 9.95, A)
    tale.ended("a", 5.1, 9.9, "lost")
    tale.run("b", B, again, again + 1, number=2)
    tale.ended("b", again, again + 1)
    tale.stored(retries=2)
    return tale


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
        tale.tell("retry", 6.05, job="j")
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
