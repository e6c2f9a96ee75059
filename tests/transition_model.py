"""What each transition makes of a document, written from docs/design.md, and claims held against it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import bson

from streamjobs import ASAP, Job, Status, transitions
from streamjobs.job import CODEC
from streamjobs.transitions import MAX_ERROR, Claim
from tests.documents import START, server_now

HOUR = 3_600_000
HOSTILE = ["$data.secret", "$$ROOT", '{"$set": 1}', "$", "$$NOW", "", "a.b", "\0", "ﬁ €"]
OUTCOMES = ["success", "failure", "snoozed", "cancelled", "released", "interrupted", "lost", "overflow"]


def change_of(
    claim: Claim, outcome: str, text: str, delay: int, trace: str | None = None
) -> transitions.Change:
    match outcome:
        case "success":
            return transitions.succeed(claim)
        case "failure":
            return transitions.fail(claim, text, trace)
        case "snoozed":
            return transitions.snooze(claim, delay)
        case "cancelled":
            return transitions.cancel_by_handler(claim, text)
        case "released":
            return transitions.release(claim, text)
        case "interrupted":
            return transitions.interrupt(claim, text)
        case "lost":
            return transitions.lose(claim, text)
        case _:
            return transitions.overflow(claim)


@dataclass(frozen=True)
class Now:
    """Stands in the model's document for the server's date plus so many ms."""

    plus: int = 0


@dataclass(frozen=True)
class Holds:
    """Stands for a text that ends with this one."""

    text: str


def model_status(outcome: str, retries: int, asap: bool, second_loss: bool) -> tuple[str, bool, str]:
    """(status word, whether an attempt is charged, when it is due: kept, interval, delay, lost again)."""
    back = "new" if asap else "waiting"
    left = retries - 1
    return {
        "success": ("success", False, "kept"),
        "failure": ("waiting", True, "interval") if left > 0 else ("failed", True, "kept"),
        "snoozed": ("waiting", False, "delay"),
        "cancelled": ("cancelled", False, "kept"),
        "released": (back, False, "kept"),
        "interrupted": ("failed" if retries <= 1 else back, False, "kept"),
        "lost": (
            ("failed", True, "kept")
            if left <= 0
            else ("waiting", True, "lost again")
            if second_loss
            else (back, True, "kept")
        ),
        "overflow": ("failed", True, "kept"),
    }[outcome]


def model_fold(tries: list[Any]) -> list[Any]:
    """Beyond 100 the oldest but the first are one."""
    if len(tries) <= 100:
        return tries
    old, rest = tries[1 : len(tries) - 98], tries[len(tries) - 98 :]
    count = sum(one.get("folded") or 1 for one in old)
    when = [one["when"] for one in old if one.get("when") is not None]
    note = {
        "runner": "",
        "when": when[-1] if when else None,
        "err": Holds("earlier tries"),
        "outcome": "folded",
        "folded": count,
    }
    return [tries[0], note, *rest]


def model_finish(
    before: dict[str, Any], outcome: str, text: str, delay: int, *, runner: str, by: str, nonce: int,
    started: Any = None, trace: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """What a working document is after its holder finished."""
    after = copy.deepcopy(before)
    lease = after.pop("lease")
    tries = after.get("tries") if isinstance(after.get("tries"), list) else []
    retries = after.get("retries") or 0
    interval_ms = -(-(after.get("retryinterval") or 0) // 1_000_000)
    lost_before = bool(tries) and tries[-1].get("outcome") == "lost"
    status, charged, due = model_status(outcome, retries, after["runat"] == ASAP, lost_before)
    entry: dict[str, Any] = {"runner": runner, "when": Now()}
    if outcome != "success":
        entry["err"] = Holds(text if outcome not in ("snoozed", "overflow") else "")
    entry |= {"token": lease["token"], "claimed": lease["claimed"]}
    if started is not None:
        entry["started"] = started
    if trace is not None and outcome == "failure":
        entry["trace"] = trace
    if outcome not in ("success", "failure", "overflow"):
        entry["outcome"] = outcome
    after["status"] = int(Status[status.upper()])
    after["tries"] = [*tries[:1], entry] if outcome == "overflow" else model_fold([*tries, entry])
    if charged:
        after["retries"] = retries - 1
    plus = {"interval": interval_ms, "delay": delay, "lost again": max(interval_ms, 1_000)}
    if due != "kept":
        after["runat"] = Now(plus[due])
    if outcome == "cancelled":
        after["cancel"] = {"when": Now(), "reason": text}
    if status in ("new", "waiting"):
        after["wake"] = {"kind": after["kind"], "by": by, "n": nonce, "at": Now(), "runat": after["runat"]}
        if "created" in after:
            after["wake"]["created"] = after["created"]
    return after


def model_claim(before: dict[str, Any], owner: str, token: str) -> dict[str, Any]:
    after = copy.deepcopy(before)
    wake = after.pop("wake", {})
    lease = {"owner": owner, "token": token, "claimed": Now()}
    if "at" in wake:
        lease["back"] = wake["at"]
    return {**after, "status": 2, "lease": lease}


def model_cancel(before: dict[str, Any], reason: str) -> dict[str, Any]:
    after = {**before, "status": 6, "cancel": {"when": Now(), "reason": reason}}
    after.pop("wake", None)
    return after


def model_retry(before: dict[str, Any], by: str, nonce: int, *, force: bool = False) -> dict[str, Any]:
    retries = before.get("retries")
    enough = isinstance(retries, (int, float)) and retries >= 1
    after = {**before, "status": 1, "runat": ASAP, "retries": retries if enough else 1}
    after.pop("cancel", None)
    if force:
        lost = {"runner": "", "when": Now(), "err": "lost: its retry was forced", "outcome": "lost"}
        after["tries"] = [*(after["tries"] if isinstance(after.get("tries"), list) else []), lost]
    after["wake"] = {"kind": after["kind"], "by": by, "n": nonce, "at": Now(), "runat": ASAP}
    if "created" in after:
        after["wake"]["created"] = after["created"]
    return after


def same(expected: Any, actual: Any, earliest: datetime, latest: datetime, where: str = "") -> None:
    """Hold a document against the model's; dates of the server lie between two replies of it."""
    slack = timedelta(milliseconds=5)
    if isinstance(expected, Now):
        plus = timedelta(milliseconds=expected.plus)
        assert isinstance(actual, datetime), where
        assert earliest + plus - slack <= actual <= latest + plus + slack, (where, actual)
    elif isinstance(expected, Holds):
        assert isinstance(actual, str), where
        assert actual, where
        assert actual.endswith(expected.text[: MAX_ERROR - 100]), (where, actual)
    elif isinstance(expected, dict):
        assert isinstance(actual, dict), where
        assert set(expected) == set(actual), (where, actual)
        for key, value in expected.items():
            same(value, actual[key], earliest, latest, f"{where}.{key}")
    elif isinstance(expected, list):
        assert isinstance(actual, list), where
        assert len(expected) == len(actual), (where, actual)
        for place, value in enumerate(expected):
            same(value, actual[place], earliest, latest, f"{where}[{place}]")
    else:
        assert bson.encode({"": expected}, codec_options=CODEC) == bson.encode({"": actual}, codec_options=CODEC), (
            where, expected, actual,
        )  # fmt: skip


class Held:
    """A document, claimed on the server with given texts, and its claim as a runner would know it."""

    def __init__(
        self, raw: Any, before: dict[str, Any], *, owner: str = "o", token: str = "t", runner: str = "r"
    ) -> None:
        self.raw = raw
        raw.insert_one(before)
        first = server_now(raw)
        result = raw.update_one(*transitions.claim([before["_id"]], [before["kind"]], owner, token))
        self.document = raw.find_one({"_id": before["_id"]})
        assert (result.matched_count, result.modified_count) == (1, 1)
        same(model_claim(before, owner, token), self.document, first, server_now(raw))
        job = Job.from_document(self.document)
        self.claim = Claim(job, token, self.document["lease"]["claimed"], runner, owner, 12345, START)

    def finish(
        self, outcome: str, text: str = "because", delay: int = HOUR, trace: str | None = None
    ) -> dict[str, Any]:
        first = server_now(self.raw)
        result = self.raw.update_one(*change_of(self.claim, outcome, text, delay, trace))
        assert result.matched_count == 1
        after = self.raw.find_one({"_id": self.claim.job.id})
        one = self.claim
        expected = model_finish(
            self.document, outcome, text, delay, runner=one.runner, by=one.owner, nonce=one.nonce,
            started=one.started, trace=trace,
        )  # fmt: skip
        same(expected, after, first, server_now(self.raw))
        kept = [key for key in self.document if key in after]
        assert [key for key in after if key in kept] == kept
        entry = after["tries"][-1]
        assert list(entry)[:2] == ["runner", "when"]
        assert "err" not in entry or list(entry)[2] == "err"
        return after
