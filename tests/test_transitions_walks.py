"""Random walks along the arrows of the diagram, the model beside the server.

By the public API where it has a call, by transitions where only a runner has; with runners that die, are fenced and
swept, originals among them, and clocks that are wrong.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any

import hypothesis
import pytest
from bson import Int64
from hypothesis import HealthCheck
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from pymongo import AsyncMongoClient

from streamjobs import ASAP, Job, JobState, Queue, clock, transitions
from streamjobs.clock import ServerClock
from streamjobs.operations import OUTSIDE
from streamjobs.runner import lease, takeback
from streamjobs.runner.store import Store
from streamjobs.transitions import Claim
from tests import original_loop
from tests.documents import plain, server_now
from tests.takeback_model import ME, Fleet
from tests.transition_model import (
    HOSTILE,
    HOUR,
    OUTCOMES,
    change_of,
    model_cancel,
    model_claim,
    model_finish,
    model_retry,
    same,
)

ENDS = (4, 5, 6)
MOST = 4
OWNERS = st.sampled_from(["a", "b", ME])
OTHERS = st.sampled_from(["a", "b"])
WHICH = st.integers(0, MOST - 1)
TEXTS = st.sampled_from(HOSTILE[:4])


class Walk(RuleBasedStateMachine):
    """A few jobs, all that may be done to them, and the model beside the server.

    ``left``, ``started`` and ``tokens`` are accounts kept apart from the model: of attempts, of starts of jobs that may
    start only once, and of claims that have not ended.
    """

    where: tuple[Any, ...] = ()  # not the collection itself, which has every attribute that one asks for
    fleet_now: Fleet  # whose boot clock the library reads
    wall_ahead = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.raw, loop, store, self.queue = self.where
        self.raw.delete_many({})
        self.fleet = Fleet(self.raw, loop, store)
        Walk.fleet_now, Walk.wall_ahead = self.fleet, 0.0
        self.model: dict[Any, dict[str, Any]] = {}
        self.ended: dict[Any, int] = {}
        self.left: dict[Any, int] = {}
        self.started: set[Any] = set()
        self.tokens: dict[Any, list[str]] = {}
        self.before: dict[Any, dict[str, Any]] = {}
        self.retried: Any = None
        self.count = 0

    def fresh(self) -> str:
        self.count += 1
        return f"t{self.count}"

    def check(self, id_: Any, expected: dict[str, Any], first: datetime) -> None:
        after = self.raw.find_one({"_id": id_})
        same(expected, after, first, server_now(self.raw))
        self.model[id_] = after

    def begin(self, document: dict[str, Any], tries: int = 0) -> None:
        id_ = document["_id"]
        self.model[id_], self.ended[id_], self.left[id_] = document, tries, document["retries"]
        self.tokens[id_] = []

    def started_by(self, before: dict[str, Any]) -> None:
        """It was claimed: may it be?"""
        assert before["_id"] not in self.started, "a job that may start only once was started twice"
        if before["retries"] <= 1:
            self.started.add(before["_id"])

    def end(self, id_: Any, outcome: str) -> None:
        """Its claim ended in a try."""
        self.ended[id_] += 1
        self.left[id_] -= outcome in ("failure", "lost")
        if outcome in ("snoozed", "released"):
            self.started.discard(id_)

    @initialize(retries=st.integers(0, 4), delayed=st.booleans())
    def begin_with_two(self, retries, delayed):
        self.put(retries, 0, None, 0.0)
        self.put(2, 0, 3600 if delayed else None, 0.0)

    @precondition(lambda self: len(self.model) < MOST)
    @rule(
        retries=st.integers(-1, 4),
        wait=st.sampled_from([0, 1, 3600]),
        ahead=st.sampled_from([None, -60, 3600]),
        kind=st.sampled_from(["mail", "$data.secret"]),
        tries=st.sampled_from([[], None, [{"runner": "x", "outcome": "lost"}]]),
    )
    def another_program_puts(self, retries, wait, ahead, kind, tries):
        runat = ASAP if ahead is None else server_now(self.raw) + timedelta(seconds=ahead)
        document = plain(
            retries=retries, retryinterval=Int64(wait * 10**9), runat=runat, kind=kind, tries=tries
        )
        self.raw.insert_one(document)
        self.begin(document, len(tries or []))

    @precondition(lambda self: len(self.model) < MOST)
    @rule(
        retries=st.integers(0, 4),
        wait=st.sampled_from([0, 1, 3600]),
        delay=st.sampled_from([None, 0, 3600]),
        host=st.sampled_from([0.0, -3600.0, 3600.0]),
    )
    def put(self, retries, wait, delay, host):
        """By a program that has just started, on a host whose clock is so many seconds ahead."""
        Walk.wall_ahead = host
        self.queue.sync._clock = ServerClock()
        first = server_now(self.raw)
        job = self.queue.sync.put("mail", {"$ne": 1}, retries=retries, retry_interval=wait, delay=delay)
        document = self.raw.find_one({"_id": job.id})
        near = timedelta(seconds=10)  # the host's clock is wrong by an hour, if at all
        assert first - near <= document["created"] <= server_now(self.raw) + near
        if delay is not None:
            assert document["runat"] - document["created"] == timedelta(seconds=delay)
        expected = plain(data={"$ne": 1}, retries=retries, retryinterval=Int64(wait * 10**9))
        expected |= {"_id": job.id, "created": document["created"]}
        expected["runat"] = ASAP if delay is None else document["runat"]
        assert document == expected == job.to_document()
        self.begin(document)

    @precondition(lambda self: self.model)
    @rule(
        kinds=st.sampled_from([["mail"], ["mail", "$data.secret"]]),
        which=st.integers(0, 2**MOST - 1),
        owner=OWNERS,
        dies=st.booleans(),
        swept=st.sampled_from([None, None, "long", "no"]),
    )
    def claim(self, kinds, which, owner, dies, swept):
        """By another's runner, which may die of it, or by ours, which may not come to know."""
        order = sorted(self.model, key=lambda id_: self.model[id_]["status"] not in (1, 3))
        ids = [id_ for place, id_ in enumerate(order) if which >> place & 1] or order[:1]
        token, first = self.fresh(), server_now(self.raw)
        if owner != ME and dies:
            self.fleet.end(owner)
        elif not dies:
            self.fleet.known.add(token)
        write = self.raw.update_one if len(ids) == 1 else self.raw.update_many
        write(*transitions.claim(ids, kinds, owner, token))
        last = server_now(self.raw)
        for id_ in ids:
            before = self.model[id_]
            taken = before["status"] in (1, 3) and before["kind"] in kinds and before["runat"] <= last
            if taken and first < before["runat"]:  # it fell due meanwhile: either is right
                taken = self.raw.find_one({"_id": id_})["status"] == 2
            if taken:
                self.started_by(before)
                self.tokens[id_].append(token)
            self.check(id_, model_claim(before, owner, token) if taken else before, first)
        if swept is not None:
            self.sweep(True, swept, 31.0 if swept == "no" else 0.0, 0)  # by then there is no trust left

    @precondition(lambda self: self.model)
    @rule(
        which=WHICH,
        outcome=st.sampled_from(OUTCOMES[:-1]),
        text=TEXTS,
        delay=st.sampled_from([0, HOUR]),
        right=st.sampled_from([True, True, True, False]),
    )
    def finish(self, which, outcome, text, delay, right):
        held = [id_ for id_, one in self.model.items() if "lease" in one] or list(self.model)
        id_ = held[which % len(held)]
        before = self.model[id_]
        right = right and "lease" in before
        former = [token for token in self.tokens[id_] if token != before.get("lease", {}).get("token")]
        token = before["lease"]["token"] if right else (former or ["wrong"])[which % max(1, len(former))]
        job = Job.from_document(before)
        claim = Claim(job, token, before.get("lease", {}).get("claimed"), text, "me", self.count)
        first = server_now(self.raw)
        self.raw.update_one(*change_of(claim, outcome, text, delay))
        if not right:
            self.check(id_, before, first)
            return
        self.end(id_, outcome)
        self.check(
            id_, model_finish(before, outcome, text, delay, runner=text, by="me", nonce=self.count), first
        )

    @precondition(lambda self: self.model)
    @rule(which=WHICH, reason=TEXTS)
    def cancel(self, which, reason):
        id_ = list(self.model)[which % len(self.model)]
        before, first = self.model[id_], server_now(self.raw)
        may = before["status"] in (1, 3)
        with refused(not may):
            self.queue.sync.cancel(id_, reason)
        self.check(id_, model_cancel(before, reason) if may else before, first)

    @precondition(lambda self: self.model)
    @rule(which=WHICH, force=st.booleans())
    def retry(self, which, force):
        id_ = list(self.model)[which % len(self.model)]
        before, first = self.model[id_], server_now(self.raw)
        may = (
            before["status"] == 2 and "lease" not in before if force else before["status"] in (1, 3, 4, 5, 6)
        )
        with refused(not may):
            self.queue.sync.retry(id_, force=force)
        if may:
            self.retried = id_
            self.left[id_] = max(1, self.left[id_])
            self.started.discard(id_)
            self.ended[id_] += force
        self.check(id_, model_retry(before, OUTSIDE, self.nonce(id_), force=force) if may else before, first)

    @precondition(lambda self: self.model)
    @rule(which=WHICH, ends=st.sampled_from(["fails", "fails", "succeeds", "dies"]))
    def an_original_takes_it_and(self, which, ends):
        """It claims by status alone, and rewrites the nine fields."""
        id_ = list(self.model)[which % len(self.model)]
        before = self.model[id_]
        if before["status"] not in (1, 3) or before["runat"] > server_now(self.raw):
            return
        self.raw.update_one({"_id": id_, "status": before["status"]}, {"$set": {"status": 2}})
        if ends != "dies":
            job, err = original_loop.decoded(before), "no" if ends == "fails" else None
            self.raw.replace_one({"_id": id_}, original_loop.after(job, "go", err, server_now(self.raw)))
            self.ended[id_] += 1
            self.left[id_] -= ends == "fails"
        self.started.discard(id_)  # its defect: at 0 it goes round for ever
        self.model[id_] = self.raw.find_one({"_id": id_})

    # ---- runners and their records

    @rule(
        owner=OTHERS, what=st.sampled_from(["register", "register", "end", "end", "renew", "fence", "leave"])
    )
    def of_a_record(self, owner, what):
        getattr(self.fleet, what)(owner)

    @rule(
        full=st.sampled_from([True, True, False]),
        trusting=st.sampled_from(["long", "long", "after a failure", "a new primary", "no"]),
        passed=st.sampled_from([0.0, 31.0]),
        wrong=st.sampled_from([0, 0, 0, -2, 2]),
    )
    def sweep(self, full, trusting, passed, wrong):
        """After so many seconds, and with an idea of the server's clock that is so many hours wrong."""
        self.fleet.boot += passed
        self.fleet.estimate(wrong)
        if trusting == "after a failure":
            self.fleet.trust.failed()
        if trusting == "long":
            self.fleet.trust.renewed(ME, self.fleet.boot - 8, "p")
        if trusting != "no":
            self.fleet.trust.renewed(ME, self.fleet.boot, "q" if trusting == "a new primary" else "p")
        first = server_now(self.raw)
        for id_, (outcome, why) in self.fleet.sweep(self.model, full=full).items():
            before = self.model[id_]
            self.end(id_, outcome)
            expected = model_finish(
                before, outcome, why, 0, runner=before["lease"]["owner"], by=ME, nonce=self.nonce(id_)
            )
            self.check(id_, expected, first)

    def nonce(self, id_: Any) -> int:
        """The number that the library has drawn for a put-back: never the one before."""
        told = self.raw.find_one({"_id": id_}).get("wake", {}).get("n", -1)
        assert told == -1 or told != self.model[id_].get("wake", {}).get("n")
        return told

    # ---- what holds whatever is done

    @invariant()
    def every_claim_ended_in_exactly_one_try_and_nothing_else_changed(self):
        stored = {one["_id"]: one for one in self.raw.find({"control": None})}
        assert stored == self.model
        for id_, one in stored.items():
            assert Job.from_document(one).number == self.ended[id_] + 1
            assert ("lease" in one) <= (one["status"] == 2)
            if "wake" in one:
                assert one["status"] in (1, 2, 3)  # 2: an original's runner took it and left it there
            told = Counter(entry["token"] for entry in one.get("tries") or [] if "token" in entry)
            held = [one["lease"]["token"]] if "lease" in one else []
            assert set(told) <= set(self.tokens[id_]) - set(held), (
                "a try of nobody's claim, or of the holder's"
            )
            assert all(count == 1 for count in told.values())
            assert held in ([], self.tokens[id_][-1:]), "only the latest claim may hold"
            assert one["retries"] == self.left[id_]

    @invariant()
    def what_has_ended_stays_and_tries_only_grow(self):
        for id_, old in self.before.items():
            new = self.model[id_]
            if old["status"] in ENDS and id_ != self.retried:
                assert new == old
            former, tries = (original_loop.three(one.get("tries") or []) for one in (old, new))
            assert tries[: len(former)] == former
        self.before, self.retried = dict(self.model), None


@contextmanager
def refused(wanted: bool) -> Iterator[None]:
    """JobState, or nothing."""
    if not wanted:
        yield
        return
    with pytest.raises(JobState):
        yield


@pytest.fixture
def walking(raw, uri, namespace, monkeypatch):
    """The collection in all the ways that a walk needs it, and clocks that it moves."""
    queue = Queue(uri, namespace)
    host = clock.wall
    for module in (takeback, lease):
        monkeypatch.setattr(module, "boot", lambda: Walk.fleet_now.boot_now())
    for module in ("clock", "putting", "job"):
        monkeypatch.setattr(f"streamjobs.{module}.wall", lambda: host() + Walk.wall_ahead)

    async def connect() -> Any:
        return AsyncMongoClient(uri)

    with asyncio.Runner() as loop:
        client = loop.run(connect())
        Walk.where = (raw, loop, Store(queue.source.jobs_of(client)), queue)
        yield
        loop.run(client.close())
    queue.sync.close()


@pytest.mark.timeout(300)  # a few thousand steps, also on a busy machine
def test_random_walks_agree_with_the_model(walking, python_server):
    run_state_machine_as_test(
        Walk,
        settings=hypothesis.settings(
            max_examples=15 if python_server else 60,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
