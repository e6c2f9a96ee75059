"""Every change of a job's state, as a pure function that returns (filter, update).

The diagram is in ``docs/design.md``; each arrow bears the name of its function here. Filters begin with
``_id`` and hold plain equalities (servers differ in what else they can serve from the index); what
must be decided by the server's clock is decided inside the update's pipeline; values that code or
data can influence go through :func:`literal`, since a text like ``$data.pw`` would otherwise be read as
the value of that field.

A holder's functions compute the new status and retries from the job as it was claimed: its token proves
that nobody else has written since.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from bson.int64 import Int64

from streamjobs.job import ASAP, RUNNABLE, Job, Status, Try

Filter = dict[str, Any]
Pipeline = list[dict[str, Any]]
Change = tuple[Filter, Pipeline]

#: Tries kept in a document; beyond it the oldest but the first are folded into one.
MAX_TRIES = 100
#: Characters of an error text and of a traceback that are kept.
MAX_ERROR = 4_000
MAX_TRACE = 4_000
#: The least wait after a second loss in a row, so that a job that kills its process does not kill a fleet.
LOST_AGAIN_MS = 1_000
_INT32 = 2**31
_LEAST_RETRIES = -_INT32  # one below the least that was read might not fit into BSON
_FORCED = "lost: its retry was forced"
_FOREVER_MS = 200 * 365 * 86_400_000  # a later date may be outside what other writers can read


# said once: it is encoded with each claim
_CAN_BE: list[dict[str, Any]] = [
    {"$eq": [[{"$type": "$kind"}, {"$type": "$data"}, {"$type": "$runat"}], ["string", "object", "date"]]},
    {"$in": [{"$type": "$status"}, ["int", "long", "double"]]},
    {"$in": ["$status", [int(status) for status in RUNNABLE]]},  # not an array that holds one of them
    {"$lte": [{"$toLong": "$runat"}, {"$toLong": "$$NOW"}]},
]
_DUE: dict[str, Any] = {"$and": _CAN_BE}
_DUE_AGAIN: dict[str, Any] = {"$and": [*_CAN_BE, {"$isNumber": "$retries"}, {"$gt": ["$retries", 1]}]}


def literal(value: Any) -> dict[str, Any]:
    """A value as a pipeline's constant, whatever it looks like."""
    return {"$literal": value}


@dataclass(slots=True, frozen=True)
class Claim:
    """Who held a job: what its fence and its try say.

    Attributes:
        job: the job as claimed, or as much of it as was read (tries, retries, retryinterval, runat, kind).
        token: the fencing token.
        claimed: the server's date of the claim.
        runner: the name recorded in the try.
        owner: the id of the runner that writes (which may not be the one that held).
        nonce: a fresh number, so that a put-back is never an equal value.
        started: estimated date of the handler's start, None if it was not called.

    """

    job: Job
    token: str
    claimed: Any
    runner: str
    owner: str
    nonce: int
    started: datetime | None = None

    @property
    def once(self) -> bool:
        """Whether the job may start only once."""
        return self.job.retries <= 1


def claim(
    ids: Sequence[Any], kinds: Collection[str], owner: str, token: str, *, ahead: bool = False
) -> Change:
    """[new, waiting → working] Take jobs, by the server's clock, if they can be jobs and are due.

    With ``ahead``, for which no slot is free yet, only those that may start more than once.
    """
    due = _DUE_AGAIN if ahead else _DUE
    # `back` is when the job was put back: with runat zero nothing else says since when it has been due
    lease = {"owner": literal(owner), "token": literal(token), "claimed": "$$NOW", "back": "$wake.at"}
    mine = {"$eq": ["$lease.token", literal(token)]}
    return (
        {
            "_id": ids[0] if len(ids) == 1 else {"$in": list(ids)},
            "status": {"$in": [int(status) for status in RUNNABLE]},
            "kind": {"$in": list(kinds)},
        },
        [
            {"$set": {"lease": {"$cond": [due, lease, "$lease"]}}},
            {
                "$set": {
                    "status": {"$cond": [mine, literal(int(Status.WORKING)), "$status"]},
                    "wake": {"$cond": [mine, "$$REMOVE", "$wake"]},
                    "passed": {"$cond": [mine, "$$REMOVE", "$passed"]},
                }
            },
        ],
    )


def succeed(claim: Claim) -> Change:
    """[working → success]."""
    return _finish(claim, Status.SUCCESS, _entry(claim, None))


def fail(claim: Claim, error: str, trace: str | None = None) -> Change:
    """[working → waiting, or failed when no attempts are left] One attempt is charged.

    The original counts from 0 to -1 and retries for ever; here 0 or below is the end.
    """
    left = claim.job.retries - 1
    entry = _entry(claim, error, trace=trace)
    if left <= 0:
        return _finish(claim, Status.FAILED, entry, retries=left)
    return _finish(claim, Status.WAITING, entry, retries=left, after_ms=_interval_ms(claim.job))


def snooze(claim: Claim, delay_ms: int) -> Change:
    """[working → waiting] The handler asked for a later time. Not charged."""
    entry = _entry(claim, f"snoozed: {delay_ms / 1000:g} s", outcome="snoozed")
    return _finish(claim, Status.WAITING, entry, after_ms=delay_ms)


def cancel_by_handler(claim: Claim, reason: str) -> Change:
    """[working → cancelled] The handler ended the job for good."""
    entry = _entry(claim, f"cancelled: {reason}", outcome="cancelled")
    return _finish(claim, Status.CANCELLED, entry, cancel=reason)


def release(claim: Claim, why: str) -> Change:
    """[working → new, waiting] The handler was not called. Not charged."""
    return _finish(claim, None, _entry(claim, f"released: {why}", outcome="released"))


def interrupt(claim: Claim, why: str) -> Change:
    """[working → new, waiting; failed if it may start only once] Stop ended the handler. Not charged."""
    entry = _entry(claim, f"interrupted: {why}", outcome="interrupted")
    return _finish(claim, Status.FAILED if claim.once else None, entry)


def lose(claim: Claim, why: str) -> Change:
    """[working → new, waiting, or failed when no attempts are left] The holder lost it. Charged.

    Nobody knows whether its handler began. After the first loss in a row it is due at once, from the second
    on after its retryinterval, at least a second.
    """
    left = claim.job.retries - 1
    entry = _entry(claim, f"lost: {why}", outcome="lost")
    if left <= 0:
        return _finish(claim, Status.FAILED, entry, retries=left)
    history = claim.job.history
    if history and history[-1].outcome == "lost":
        wait = max(_interval_ms(claim.job), LOST_AGAIN_MS)
        return _finish(claim, Status.WAITING, entry, retries=left, after_ms=wait)
    return _finish(claim, None, entry, retries=left)


def cancel(id_: Any, reason: str) -> Change:
    """[new, waiting → cancelled] By an operator or program, before it runs."""
    return (
        {"_id": id_, "status": {"$in": [int(status) for status in RUNNABLE]}},
        [
            {
                "$set": {
                    "status": literal(int(Status.CANCELLED)),
                    "cancel": {"when": "$$NOW", "reason": literal(cut(reason, MAX_ERROR))},
                }
            },
            {"$unset": ["wake", "passed"]},
        ],
    )


def retry(id_: Any, by: str, nonce: int, *, force: bool = False) -> Change:
    """[new, waiting, success, failed, cancelled → new] Run it now, with at least one attempt.

    Forced, only a job that is working without a lease that names its holder by two texts: one that an original's
    runner took and lost, or one whose lease somebody has damaged, which no runner can take back.
    """
    if force:
        # a path that leads into an array would match the texts in it
        damaged: list[Filter] = [{"lease": {"$type": "array"}}]
        for path in ("lease.owner", "lease.token"):
            damaged += [{path: {"$not": {"$type": "string"}}}, {path: {"$type": "array"}}, {path: ""}]
        guard: Filter = {"_id": id_, "status": int(Status.WORKING), "$or": damaged}
    else:
        allowed = (Status.NEW, Status.WAITING, Status.SUCCESS, Status.FAILED, Status.CANCELLED)
        guard = {"_id": id_, "status": {"$in": [int(status) for status in allowed]}}
    enough = {"$and": [{"$isNumber": "$retries"}, {"$gte": ["$retries", 1]}]}
    fields: dict[str, Any] = {
        "status": literal(int(Status.NEW)),
        "runat": literal(ASAP),
        "retries": {"$cond": [enough, "$retries", literal(1)]},
    }
    if force:  # whose handler may have begun, so that the next try needs the next number
        note = {"runner": literal(""), "when": "$$NOW", "err": literal(_FORCED), "outcome": literal("lost")}
        fields["tries"] = {"$concatArrays": [_TRIES, [note]]}
    return guard, [
        {"$set": fields},
        _wake_stage("$kind", by, nonce),
        {"$unset": ["cancel", "passed", *(["lease"] if force else [])]},
    ]


def pass_on(id_: Any, by: str, to: str, nonce: int) -> Change:
    """[new, waiting: no arrow] Tell one runner of a job that its holder has no slot for; once until it is claimed.

    A field of its own: a part of ``wake`` that changes would be logged as that part, which no filter can match.
    """
    told: dict[str, Any] = {"kind": "$kind", "by": literal(by), "to": literal(to), "n": literal(nonce)}
    told |= {"status": "$status", "runat": "$runat", "created": "$created"}
    guard: Filter = {"_id": id_, "status": {"$in": [int(status) for status in RUNNABLE]}, "passed": None}
    return guard, [{"$set": {"passed": told}}]


def overflow(claim: Claim) -> Change:
    """[working → failed] For a document that has no room for its try: all but the first go, for a short one."""
    entry = _entry(claim, "outcome not stored: the document is full")
    guard, pipeline = _finish(claim, Status.FAILED, entry, retries=claim.job.retries - 1)
    pipeline[0]["$set"]["tries"] = {"$concatArrays": [{"$slice": [_TRIES, 1]}, [entry]]}
    return guard, pipeline


def alike(one: Change, other: Change) -> bool:
    """Whether two changes of different jobs differ in nothing but the ``_id``: :func:`together` says both at once."""
    return {**one[0], "_id": None} == {**other[0], "_id": None} and one[1] == other[1]


def together(changes: Sequence[Change]) -> Change:
    """Changes that are :func:`alike` as one, for an update of many: servers parse and plan it once."""
    guard, update = changes[0]
    return (
        ({**guard, "_id": {"$in": [one[0]["_id"] for one in changes]}}, update)
        if len(changes) > 1
        else changes[0]
    )


def cut(text: str, limit: int) -> str:
    """A text that BSON can hold (no lone surrogates), at most ``limit`` characters long."""
    clean = text[: limit + 1].encode("utf-8", "replace").decode("utf-8")
    return clean if len(clean) <= limit else clean[: limit - 1] + "…"


_TRIES: dict[str, Any] = {"$cond": [{"$isArray": "$tries"}, "$tries", []]}


def _entry(
    claim: Claim, error: str | None, *, trace: str | None = None, outcome: str | None = None
) -> dict[str, Any]:
    """A try: the original's three fields, then ours."""
    entry: dict[str, Any] = {"runner": literal(claim.runner), "when": "$$NOW"}
    optional = {
        "err": None if error is None else cut(error or "failed", MAX_ERROR),
        "token": claim.token,
        "claimed": claim.claimed,
        "started": claim.started,
        "trace": None if trace is None else cut(trace, MAX_TRACE),
        "outcome": outcome,
    }
    entry.update({key: literal(value) for key, value in optional.items() if value is not None})
    if claim.started is not None:
        # an estimate: never after the try's end
        over = {"$gt": [{"$toLong": entry["started"]}, {"$toLong": "$$NOW"}]}
        entry["started"] = {"$cond": [over, "$$NOW", entry["started"]]}
    return entry


def _finish(
    claim: Claim,
    status: Status | None,
    entry: dict[str, Any],
    *,
    retries: int | None = None,
    after_ms: int | None = None,
    cancel: str | None = None,
) -> Change:
    """End a claim with its one try. Without a status the job is put back as it was due."""
    asap = after_ms is None and claim.job.asap
    ends = status in (Status.SUCCESS, Status.FAILED, Status.CANCELLED)
    now = status if ends and status is not None else Status.NEW if asap else Status.WAITING
    fields: dict[str, Any] = {
        "status": literal(int(now)),
        "tries": {"$concatArrays": [*_kept(claim.job), [entry]]},
        "lease": "$$REMOVE",
    }
    if retries is not None:
        fields["retries"] = literal(max(retries, _LEAST_RETRIES))
    if after_ms is not None:
        amount = Int64(min(after_ms, _FOREVER_MS))
        fields["runat"] = {"$dateAdd": {"startDate": "$$NOW", "unit": "millisecond", "amount": amount}}
    if cancel is not None:
        fields["cancel"] = {"when": "$$NOW", "reason": literal(cut(cancel, MAX_ERROR))}
    guard: Filter = {"_id": claim.job.id, "status": int(Status.WORKING), "lease.token": claim.token}
    pipeline: Pipeline = [{"$set": fields}]
    if not ends:
        pipeline.append(_wake_stage(literal(claim.job.kind), claim.owner, claim.nonce))
    return guard, pipeline


def _wake_stage(kind: Any, by: str, nonce: int) -> dict[str, Any]:
    """Tell the runners of its kind; all that a candidate needs is in it, since update events hold no more."""
    told: dict[str, Any] = {"kind": kind, "by": literal(by), "n": literal(nonce)}
    told |= {"at": "$$NOW", "runat": "$runat", "created": "$created"}
    return {"$set": {"wake": told}}


def _kept(job: Job) -> list[Any]:
    """The tries that stay before the new one, as operands of $concatArrays."""
    if len(job.tries) < MAX_TRIES:
        return [_TRIES]
    folded, last = 0, None
    for entry in job.tries[1 : len(job.tries) - MAX_TRIES + 3]:
        known: Any = entry if isinstance(entry, Mapping) else {}  # pyright: ignore[reportUnknownVariableType]
        folded += Try.from_document(known).folded or 1
        last = known.get("when") or last
    folded = min(folded, _INT32 - 1)  # whatever others have written there
    note = {
        "runner": "",
        "when": last,
        "err": f"{folded} earlier tries",
        "outcome": "folded",
        "folded": folded,
    }
    return [
        {"$slice": [_TRIES, 1]},
        [{key: literal(value) for key, value in note.items()}],
        {"$slice": [_TRIES, 3 - MAX_TRIES]},
    ]


def _interval_ms(job: Job) -> int:
    """The retry interval in whole milliseconds, the resolution of a BSON date."""
    return max(0, -(-job.retryinterval // 1_000_000))
