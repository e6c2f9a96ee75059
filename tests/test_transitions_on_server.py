"""Every arrow of the diagram on the server, against a plain model; and what changes nothing."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import bson
import pytest
from bson import Int64, ObjectId

from streamjobs import ASAP, Job, transitions
from streamjobs.job import CODEC
from streamjobs.transitions import Claim
from tests.documents import START, plain, server_now
from tests.transition_model import (
    HOSTILE,
    HOUR,
    OUTCOMES,
    Held,
    Now,
    change_of,
    model_cancel,
    model_claim,
    model_retry,
    same,
)


@pytest.mark.parametrize("outcome", OUTCOMES)
@pytest.mark.parametrize(
    "runat", [ASAP, START, datetime(1969, 1, 1, tzinfo=UTC)], ids=["asap", "dated", "1969"]
)
@pytest.mark.parametrize("retries", [None, -5, 0, 1, 2, Int64(5)], ids=str)
def test_each_arrow_gives_the_models_document(outcome, runat, retries, raw):
    held = Held(raw, plain(runat=runat, retries=retries, retryinterval=Int64(30_000_000_001)))
    held.finish(outcome, trace="trace")


@pytest.mark.parametrize("outcome", OUTCOMES)
@pytest.mark.parametrize("tries", ["missing", "null", "text", "document", "a loss", "a success"])
def test_each_arrow_appends_exactly_one_try_whatever_tries_was(outcome, tries, raw):
    old: dict[str, Any] = {
        "missing": None, "text": "x", "document": {"a": 1}, "a loss": [{"runner": "$x", "outcome": "lost", "err": "$y"}],
        "a success": [{"runner": "a", "when": START, "unknown": ["$z"]}],
    }  # fmt: skip
    before = plain(retries=5, tries=old.get(tries))
    if tries == "null":
        before["tries"] = None
    after = Held(raw, before).finish(outcome)
    known = old.get(tries) if isinstance(old.get(tries), list) else []
    assert after["tries"][:-1] == known


@pytest.mark.parametrize("outcome", OUTCOMES)
@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_texts_are_stored_as_they_were_given(outcome, text, raw):
    kind = text if text and "\0" not in text else "mail"
    before = plain(kind=kind, retries=5, data={"secret": "s3cret", "a": {"b": "$data.secret"}})
    after = Held(raw, before, owner=text, token=text, runner=text).finish(outcome, text, trace=text or None)
    assert after["tries"][-1]["runner"] == text
    assert "s3cret" not in str({key: value for key, value in after.items() if key != "data"})


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("status", [1, 3])
def test_cancel_gives_the_models_document(status, text, raw):
    before = plain(status=status, wake={"kind": "mail", "by": "x", "n": 1})
    raw.insert_one(before)
    first = server_now(raw)
    raw.update_one(*transitions.cancel(before["_id"], text))
    same(model_cancel(before, text), raw.find_one(), first, server_now(raw))


@pytest.mark.parametrize("retries", [None, "text", -1, 0, 1, Int64(7), 2.5])
@pytest.mark.parametrize("status", [1, 3, 4, 5, 6])
def test_retry_gives_the_models_document(status, retries, raw):
    before = plain(
        status=status,
        retries=retries,
        runat=START,
        cancel={"when": START, "reason": "x"},
        kind="$data.secret",
    )
    raw.insert_one(before)
    first = server_now(raw)
    raw.update_one(*transitions.retry(before["_id"], "$$ROOT", 7))
    same(model_retry(before, "$$ROOT", 7), raw.find_one(), first, server_now(raw))


def test_a_forced_retry_takes_a_working_job_without_a_lease(raw):
    before = plain(status=2, retries=2)
    raw.insert_one(before)
    first = server_now(raw)
    raw.update_one(*transitions.retry(before["_id"], "x", 7, force=True))
    same(model_retry(before, "x", 7, force=True), raw.find_one(), first, server_now(raw))


UNTOUCHED = {
    "claim of a job that is not due": (plain(runat=datetime(2126, 1, 1, tzinfo=UTC)), "claim"),
    "claim of a job an hour ahead, with a wake": (plain(runat=datetime(2126, 1, 1, tzinfo=UTC), wake={"n": 1}), "claim"),
    "claim of an array status": ({**plain(), "status": [1, 3]}, "claim"),
    "claim of an array kind": ({**plain(), "kind": ["mail"]}, "claim"),
    "claim of text data": ({**plain(), "data": "text"}, "claim"),
    "claim of array data": ({**plain(), "data": [{"a": 1}]}, "claim"),
    "claim of missing data": (plain(data=None), "claim"),
    "claim of missing runat": (plain(runat=None), "claim"),
    "claim of null runat": ({**plain(), "runat": None}, "claim"),
    "claim of text runat": ({**plain(), "runat": "2026-01-01"}, "claim"),
    "claim of number runat": ({**plain(), "runat": 5}, "claim"),
    "claim of array runat": ({**plain(), "runat": [START]}, "claim"),
    "claim of an array status with a foreign lease": ({**plain(lease={"token": "x", "owner": "y"}), "status": [1]}, "claim"),
    "claim of another kind": (plain(kind="other"), "claim"),
    "claim of a kind that is the served one's regex": (plain(kind="mai."), "claim"),
    **{f"claim of status {status}": (plain(status=status), "claim") for status in (0, 2, 4, 5, 6, 7, 8, 9, 99, -1)},
    "claim of a text status": ({**plain(), "status": "new"}, "claim"),
    **{
        f"{outcome} with a wrong token": (plain(status=2, retries=3, lease={"owner": "o", "token": "u", "claimed": START}), outcome)
        for outcome in OUTCOMES
    },
    **{f"{outcome} without a lease": (plain(status=2, retries=3), outcome) for outcome in OUTCOMES},
    **{
        f"{outcome} of status {status} with the token": (plain(status=status, lease={"owner": "o", "token": "t"}), outcome)
        for outcome in OUTCOMES for status in (1, 3, 4, 7)
    },
    **{f"cancel of status {status}": (plain(status=status), "cancel") for status in (0, 2, 4, 5, 6, 7, 99)},
    **{f"retry of status {status}": (plain(status=status), "retry") for status in (0, 2, 7, 8, 9, 99)},
    **{f"forced retry of status {status}": (plain(status=status), "force") for status in (0, 1, 3, 4, 5, 6, 7, 99)},
    "forced retry of a leased job": (plain(status=2, lease={"owner": "o", "token": "t", "claimed": START}), "force"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNTOUCHED)
def test_this_changes_nothing(case, raw):
    before, what = UNTOUCHED[case]
    raw.insert_one(before)
    sent = bson.encode(raw.find_one(), codec_options=CODEC)
    match what:
        case "claim":
            change = transitions.claim([before["_id"]], ["mail"], "o", "t")
        case "cancel":
            change = transitions.cancel(before["_id"], "x")
        case "retry" | "force":
            change = transitions.retry(before["_id"], "x", 1, force=what == "force")
        case _:
            job = Job(before["_id"], "mail", retries=3)
            change = change_of(Claim(job, "t", START, "r", "o", 1), what, "x", 5)
    result = raw.update_one(*change)
    assert bson.encode(raw.find_one(), codec_options=CODEC) == sent
    assert result.modified_count == 0


def test_several_are_claimed_at_once_and_only_those_that_are_due_and_served(raw):
    good = [plain(), plain(status=3, runat=START), plain(kind="other")]
    bad = [
        plain(runat=datetime(2126, 1, 1, tzinfo=UTC)),
        plain(kind="third"),
        plain(status=4),
        {**plain(), "data": 1},
    ]
    bystander = plain()
    raw.insert_many([*good, *bad, bystander])
    before = {one["_id"]: one for one in raw.find()}
    first = server_now(raw)
    result = raw.update_many(
        *transitions.claim([one["_id"] for one in good + bad], ["mail", "other"], "o", "t")
    )
    assert result.modified_count == 3
    for after in raw.find():
        old = before[after["_id"]]
        claimed = after["_id"] in {one["_id"] for one in good}
        same(model_claim(old, "o", "t") if claimed else old, after, first, server_now(raw))


def test_ahead_of_a_free_slot_only_what_may_start_more_than_once_is_claimed(raw):
    good = [plain(retries=2), plain(retries=Int64(7), status=3), plain(retries=3.0)]
    once = [plain(retries=value) for value in (1, 0, -1, None, "5", [5], {"a": 1}, 1.0, True)]
    raw.insert_many([*good, *once])
    ids = [one["_id"] for one in good + once]
    raw.update_many(*transitions.claim(ids, ["mail"], "o", "t", ahead=True))
    assert {one["_id"] for one in raw.find({"status": 2})} == {one["_id"] for one in good}
    assert raw.count_documents({"lease": {"$exists": True}}) == len(good)


def test_a_claim_is_taken_by_one_of_two(raw):
    before = plain()
    raw.insert_one(before)
    counts = [
        raw.update_one(*transitions.claim([before["_id"]], ["mail"], "o", token)).modified_count
        for token in ("a", "b")
    ]
    assert counts == [1, 0]
    assert raw.find_one()["lease"]["token"] == "a"


@pytest.mark.parametrize("length", [98, 99, 100, 101, 150])
@pytest.mark.parametrize("outcome", ["failure", "lost", "success"])
def test_beyond_100_tries_the_oldest_but_the_first_are_folded_and_none_is_uncounted(length, outcome, raw):
    tries = [{"runner": f"r{n}", "when": START + timedelta(seconds=n), "err": "$x"} for n in range(length)]
    held = Held(raw, plain(tries=tries, retries=500))
    after = held.finish(outcome)
    job = Job.from_document(after)
    assert len(job.tries) == min(100, length + 1)
    assert job.number == length + 2
    assert job.tries[0] == tries[0]
    if length >= 100:
        assert job.tries[2]["runner"] == f"r{length - 97}"
        assert job.tries[1]["when"] == START + timedelta(seconds=length - 98)
    # and once more: what is folded already is counted with what it holds
    raw.update_one({"_id": job.id}, {"$set": {"status": 1, "runat": ASAP, "retries": 500}})
    copied = raw.find_one_and_delete({"_id": job.id})
    again = Job.from_document(Held(raw, {**copied, "_id": ObjectId()}).finish(outcome))
    assert again.number == length + 3
    assert len(again.tries) == min(100, length + 2)


def test_losses_wait_from_the_second_in_a_row_on(raw):
    document = plain(retries=10, retryinterval=Int64(5_000_000_000))
    seen = []
    for place, outcome in enumerate(["lost", "lost", "lost", "failure", "lost", "lost"]):
        after = Held(raw, {**document, "_id": ObjectId()}, token=f"t{place}").finish(outcome)
        seen.append((after["status"], after["runat"] == ASAP, after["retries"]))
        document = {**after, "status": 1, "runat": ASAP}
    assert seen == [(1, True, 9), (3, False, 8), (3, False, 7), (3, False, 6), (1, True, 5), (3, False, 4)]


@pytest.mark.parametrize(
    ("outcome", "wait"), [("failure", HOUR * 24 * 365 * 200), ("lost", HOUR * 24 * 365 * 200)]
)
def test_the_longest_interval_gives_a_date_that_every_writer_can_read(outcome, wait, raw):
    tries = [{"runner": "r", "outcome": "lost"}]
    held = Held(raw, plain(retries=9, tries=tries, retryinterval=Int64(2**63 - 1)))
    first = server_now(raw)
    raw.update_one(*change_of(held.claim, outcome, "x", 0))
    expected = Now(min(wait, -(-(2**63 - 1) // 1_000_000)))
    same(expected, raw.find_one()["runat"], first, server_now(raw))
