"""Every arrow of the diagram as a pure function: a fenced filter, and a pipeline without foreign expressions."""

from __future__ import annotations

from typing import Any

import bson
import hypothesis
import pytest
from bson import DatetimeMS, Int64, ObjectId
from hypothesis import given
from hypothesis import strategies as st

from streamjobs import ASAP, Job, Status, transitions
from streamjobs.job import CODEC
from streamjobs.transitions import MAX_ERROR, MAX_TRACE, Claim
from tests.documents import START
from tests.transition_model import HOSTILE, OUTCOMES, change_of, model_status


def walk(value: Any, literal: bool = False):
    """All keys and leaves of a pipeline that are not under $literal."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            if key != "$literal":
                yield from walk(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from walk(inner)
    else:
        yield value


def literals(value: Any):
    """All that is under $literal."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == "$literal":
                yield inner
            else:
                yield from literals(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from literals(inner)


_entries = st.fixed_dictionaries(
    {"runner": st.just("r")},
    optional={
        "when": st.just(START),
        "err": st.just("e"),
        "outcome": st.sampled_from(["lost", "released", "folded"]),
        "folded": st.sampled_from([0, 1, 7, "x", None]),
    },
)
_jobs = st.builds(
    Job,
    id=st.builds(ObjectId),
    kind=st.sampled_from(["mail", "$data.secret"]),
    status=st.just(2),
    tries=st.integers(0, 150).flatmap(lambda n: st.just([{"runner": "r", "when": START}] * n)).flatmap(
        lambda head: st.lists(_entries | st.just("no try"), max_size=3).map(lambda tail: head + tail)
    ),
    runat=st.sampled_from([ASAP, START, DatetimeMS(-(2**62)), DatetimeMS(2**62)]),
    retries=st.integers(-5, 10),
    retryinterval=st.sampled_from([0, 1, 999_999, 1_000_000, 30_000_000_000, 2**63 - 1, -5]),
)  # fmt: skip
_hostile = st.sampled_from([text + "#hostile" for text in HOSTILE])
_claims = st.builds(
    Claim,
    job=_jobs,
    token=_hostile,
    claimed=st.sampled_from([START, {"$hostile#hostile": 1}, "$$NOW#hostile"]),
    runner=_hostile,
    owner=_hostile,
    nonce=st.integers(0, 2**31 - 1),
    started=st.none() | st.just(START),
)


@hypothesis.settings(max_examples=400, deadline=None)
@given(_claims, st.sampled_from(OUTCOMES), _hostile, st.integers(0, 10**12))
def test_each_end_of_a_claim_is_a_fenced_filter_and_a_pipeline_without_foreign_expressions(
    claim, outcome, text, delay
):
    guard, pipeline = change_of(claim, outcome, text, delay, trace=text)
    assert next(iter(guard)) == "_id"
    assert guard == {"_id": claim.job.id, "status": 2, "lease.token": claim.token}
    assert type(guard["status"]) is int
    for leaf in walk(pipeline):
        assert not (isinstance(leaf, str) and "#hostile" in leaf), leaf
    fields = pipeline[0]["$set"]
    asap = claim.job.asap
    last = claim.job.history[-1:] if claim.job.tries else []
    second = bool(last and last[0].outcome == "lost")
    status, charged, due = model_status(outcome, claim.job.retries, asap, second)
    assert fields["status"]["$literal"] == Status[status.upper()]
    assert type(fields["status"]["$literal"]) is int
    assert ("retries" in fields) == charged
    if charged:
        assert fields["retries"] == {"$literal": claim.job.retries - 1}
    assert ("runat" in fields) == (due != "kept")
    if due != "kept":
        interval = max(0, -(-claim.job.retryinterval // 1_000_000))
        wanted = {"interval": interval, "delay": delay, "lost again": max(interval, 1_000)}[due]
        added = fields["runat"]["$dateAdd"]
        assert added["startDate"] == "$$NOW"
        assert added["unit"] == "millisecond"
        assert added["amount"] == min(wanted, 200 * 365 * 86_400_000)
        assert isinstance(added["amount"], Int64)
    wakes = [stage["$set"]["wake"] for stage in pipeline if "wake" in stage.get("$set", {})]
    assert len(wakes) == (1 if status in ("new", "waiting") else 0)
    assert fields["lease"] == "$$REMOVE"
    operands = fields["tries"]["$concatArrays"]
    entry = operands[-1][0]
    assert len(operands[-1]) == 1
    assert list(entry)[:2] == ["runner", "when"]
    assert ("err" in entry) == (outcome != "success")
    assert list(entry)[2] == ("err" if outcome != "success" else "token")
    assert claim.runner in list(literals(entry["runner"]))
    bson.encode({"u": pipeline}, codec_options=CODEC)  # what the driver will do


@given(
    st.lists(st.builds(ObjectId), min_size=1, max_size=3),
    st.lists(_hostile, min_size=1, max_size=3),
    _hostile,
    _hostile,
)
def test_a_claims_filter_begins_with_the_id_and_its_pipeline_holds_owner_and_token_as_literals(
    ids, kinds, owner, token
):
    guard, pipeline = transitions.claim(ids, kinds, owner, token)
    assert list(guard) == ["_id", "status", "kind"]
    assert guard["_id"] == (ids[0] if len(ids) == 1 else {"$in": ids})
    assert guard["status"] == {"$in": [1, 3]}
    assert guard["kind"] == {"$in": kinds}
    assert not [leaf for leaf in walk(pipeline) if isinstance(leaf, str) and "#hostile" in leaf]
    assert {owner, token} <= {one for one in literals(pipeline) if isinstance(one, str)}


@given(_hostile, _hostile, st.integers(0, 2**31), st.booleans())
def test_what_anybody_may_do_is_guarded_by_the_status_and_holds_texts_as_literals(reason, by, nonce, force):
    id_ = ObjectId()
    guard, pipeline = transitions.cancel(id_, reason)
    assert list(guard.items()) == [("_id", id_), ("status", {"$in": [1, 3]})]
    assert not [leaf for leaf in walk(pipeline) if isinstance(leaf, str) and "#hostile" in leaf]
    guard, pipeline = transitions.retry(id_, by, nonce, force=force)
    assert next(iter(guard)) == "_id"
    assert guard["status"] == (2 if force else {"$in": [1, 3, 4, 5, 6]})
    assert ("$or" in guard) == force
    assert not [leaf for leaf in walk(pipeline) if isinstance(leaf, str) and "#hostile" in leaf]


@given(st.text(max_size=50), st.integers(1, 20))
def test_a_cut_text_is_at_most_so_long_and_can_be_stored(text, limit):
    out = transitions.cut(text, limit)
    assert len(out) <= limit
    bson.encode({"": out})
    if len(text) <= limit and text.isprintable():
        assert out == text.encode("utf-8", "replace").decode()
    assert transitions.cut("a\ud800b", 5) == "a?b"


def test_long_errors_and_traces_are_cut_and_an_empty_error_still_says_failed():
    job = Job(ObjectId(), "mail", retries=3)
    claim = Claim(job, "t", START, "r", "o", 1)
    entry = transitions.fail(claim, "x" * 100_000, "y" * 100_000)[1][0]["$set"]["tries"]["$concatArrays"][-1][
        0
    ]
    assert len(entry["err"]["$literal"]) == MAX_ERROR
    assert len(entry["trace"]["$literal"]) == MAX_TRACE
    entry = transitions.fail(claim, "")[1][0]["$set"]["tries"]["$concatArrays"][-1][0]
    assert entry["err"]["$literal"] == "failed"


@pytest.mark.parametrize("retries", [-(2**63), Int64(-(2**63)), 2**63 - 1, Int64(2**63 - 1)])
@pytest.mark.parametrize("outcome", ["failure", "lost", "overflow"])
def test_retries_at_the_ends_of_bsons_numbers_can_be_charged(retries, outcome):
    claim = Claim(Job(ObjectId(), "mail", retries=retries), "t", START, "r", "o", 1)
    bson.encode({"u": change_of(claim, outcome, "x", 0)[1]})
