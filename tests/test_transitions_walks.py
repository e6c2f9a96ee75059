"""Random walks along the arrows of the diagram, the model beside the server."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import hypothesis
from bson import Int64
from hypothesis import HealthCheck
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from streamjobs import ASAP, Job, transitions
from streamjobs.transitions import Claim
from tests.documents import START, plain, server_now
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


class Walk(RuleBasedStateMachine):
    """Three jobs, all that may be done to them, and the model beside the server."""

    where: tuple[Any, ...] = ()  # not the collection itself, which has every attribute that one asks for

    def __init__(self) -> None:
        super().__init__()
        (self.raw,) = self.where
        self.raw.delete_many({})
        self.model: dict[Any, dict[str, Any]] = {}
        self.ended: dict[Any, int] = {}
        self.count = 0

    def fresh(self) -> str:
        self.count += 1
        return f"t{self.count}"

    def check(self, id_: Any, expected: dict[str, Any], first: datetime) -> None:
        after = self.raw.find_one({"_id": id_})
        same(expected, after, first, server_now(self.raw))
        self.model[id_] = after

    @precondition(lambda self: len(self.model) < 3)
    @rule(
        retries=st.integers(-1, 4),
        wait=st.sampled_from([0, 1, 3600]),
        ahead=st.sampled_from([None, -60, 3600]),
        kind=st.sampled_from(["mail", "$data.secret"]),
        tries=st.sampled_from([[], None, [{"runner": "x", "outcome": "lost"}]]),
    )
    def put(self, retries, wait, ahead, kind, tries):
        runat = ASAP if ahead is None else server_now(self.raw) + timedelta(seconds=ahead)
        document = plain(
            retries=retries, retryinterval=Int64(wait * 10**9), runat=runat, kind=kind, tries=tries
        )
        self.raw.insert_one(document)
        self.model[document["_id"]] = document
        self.ended[document["_id"]] = len(tries or [])

    @precondition(lambda self: self.model)
    @rule(kinds=st.sampled_from([["mail"], ["mail", "$data.secret"]]), which=st.integers(0, 7))
    def claim(self, kinds, which):
        ids = [id_ for place, id_ in enumerate(self.model) if which >> place & 1] or list(self.model)[:1]
        token, first = self.fresh(), server_now(self.raw)
        write = self.raw.update_one if len(ids) == 1 else self.raw.update_many
        write(*transitions.claim(ids, kinds, "o", token))
        last = server_now(self.raw)
        for id_ in ids:
            before = self.model[id_]
            taken = before["status"] in (1, 3) and before["kind"] in kinds and before["runat"] <= last
            if taken and first < before["runat"]:  # it fell due meanwhile: either is right
                taken = self.raw.find_one({"_id": id_})["status"] == 2
            self.check(id_, model_claim(before, "o", token) if taken else before, first)

    @precondition(lambda self: self.model)
    @rule(
        which=st.integers(0, 2),
        outcome=st.sampled_from(OUTCOMES[:-1]),
        text=st.sampled_from(HOSTILE[:4]),
        delay=st.sampled_from([0, HOUR]),
        right=st.sampled_from([True, True, True, False]),
    )
    def finish(self, which, outcome, text, delay, right):
        held = [id_ for id_, one in self.model.items() if "lease" in one] or list(self.model)
        id_ = held[which % len(held)]
        before = self.model[id_]
        right = right and "lease" in before
        token = before["lease"]["token"] if right else "wrong"
        job = Job.from_document(before)
        claim = Claim(job, token, before.get("lease", {}).get("claimed"), text, "me", self.count)
        first = server_now(self.raw)
        self.raw.update_one(*change_of(claim, outcome, text, delay))
        if not right:
            self.check(id_, before, first)
            return
        self.ended[id_] += 1
        self.check(
            id_, model_finish(before, outcome, text, delay, runner=text, by="me", nonce=self.count), first
        )

    @precondition(lambda self: self.model)
    @rule(which=st.integers(0, 2), reason=st.sampled_from(HOSTILE[:4]))
    def cancel(self, which, reason):
        id_ = list(self.model)[which % len(self.model)]
        before, first = self.model[id_], server_now(self.raw)
        self.raw.update_one(*transitions.cancel(id_, reason))
        self.check(id_, model_cancel(before, reason) if before["status"] in (1, 3) else before, first)

    @precondition(lambda self: self.model)
    @rule(which=st.integers(0, 2), force=st.booleans())
    def retry(self, which, force):
        id_ = list(self.model)[which % len(self.model)]
        before, first = self.model[id_], server_now(self.raw)
        nonce = len(self.fresh()) + self.count
        self.raw.update_one(*transitions.retry(id_, "op", nonce, force=force))
        may = (
            before["status"] == 2 and "lease" not in before if force else before["status"] in (1, 3, 4, 5, 6)
        )
        self.check(id_, model_retry(before, "op", nonce) if may else before, first)

    @precondition(lambda self: self.model)
    @rule(which=st.integers(0, 2), finish=st.booleans())
    def original(self, which, finish):
        """One of the original's runners takes a job, and may finish it: it rewrites the nine fields."""
        id_ = list(self.model)[which % len(self.model)]
        before = self.model[id_]
        if before["status"] not in (1, 3):
            return
        self.raw.update_one({"_id": id_, "status": before["status"]}, {"$set": {"status": 2}})
        if finish:
            nine = ("_id", "status", "tries", "created", "runat", "data", "retries", "retryinterval", "kind")
            whole = {key: before.get(key) for key in nine}
            whole |= {"status": 4, "tries": [*(before.get("tries") or []), {"runner": "go", "when": START}]}
            self.raw.replace_one({"_id": id_}, whole)
            self.ended[id_] += 1
        self.model[id_] = self.raw.find_one({"_id": id_})

    @invariant()
    def every_claim_ended_in_exactly_one_try_and_nothing_else_changed(self):
        stored = {one["_id"]: one for one in self.raw.find()}
        assert stored == self.model
        for id_, one in stored.items():
            assert Job.from_document(one).number == self.ended[id_] + 1
            assert ("lease" in one) <= (one["status"] == 2)
            if "wake" in one:
                assert one["status"] in (1, 2, 3)  # 2: an original's runner took it and left it there


def test_random_walks_agree_with_the_model(raw, python_server):
    Walk.where = (raw,)
    run_state_machine_as_test(
        Walk,
        settings=hypothesis.settings(
            max_examples=15 if python_server else 60,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
