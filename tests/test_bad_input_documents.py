"""Every stored field with every value of the table that a server stores: the runner goes on, whatever it meets.

A document runs, is ended as the design says, or is left as it is and reported once; jobs beside it run.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import bson
import pytest
from bson.datetime_ms import DatetimeMS
from pymongo.errors import PyMongoError

from streamjobs import Status
from streamjobs.job import CODEC, RAW_CODEC, id_key
from tests.bad_values import VALUES
from tests.documents import plain
from tests.test_bad_input_calls import DOCUMENTS

PAST = datetime(2020, 1, 1, tzinfo=UTC)
OWNER = "gone:1:abcdef"


def distinct() -> dict[str, Any]:
    """Those values that make different documents, of a size that a test may write often."""
    out: dict[bytes, str] = {}
    for name, value in VALUES.items():
        try:
            raw = bson.encode({"value": value}, codec_options=CODEC)
        except Exception:  # not BSON at all: nobody can store it
            continue
        if len(raw) < 100_000 and name not in ("nested 200", "lists nested 200"):
            out.setdefault(raw, name)
    return {name: VALUES[name] for name in out.values()}


STORED = distinct()
EVERY = set(STORED)
RUN_DATA = DOCUMENTS & EVERY
TEXTS = {name for name, value in STORED.items() if type(value) is str}

#: field: (where the value goes, values that run to success, values that end failed); all others stay as they are
FIELDS: dict[str, tuple[Any, set[str], set[str]]] = {
    "_id": (lambda v: plain(_id=v), EVERY - {"DBRef-like", "DBRef"}, set()),
    "status": (lambda v: plain(status=v), {"1", "int subclass", "Int64", "1.0"}, set()),
    "tries": (lambda v: plain(tries=v), EVERY, set()),
    "created": (lambda v: plain(created=v), EVERY, set()),
    "runat": (lambda v: plain(runat=v), {"past date", "first date"}, set()),
    "data": (lambda v: plain(data=v), RUN_DATA, EVERY & {"DBRef-like", "DBRef"}),
    "retries": (lambda v: plain(retries=v), EVERY, set()),
    "retryinterval": (lambda v: plain(retryinterval=v), EVERY, set()),
    "kind": (lambda v: plain(kind=v), {"text"}, set()),
    "lease": (lambda v: plain(lease=v), EVERY, set()),
    "wake": (lambda v: plain(wake=v), EVERY, set()),
    "cancel": (lambda v: plain(cancel=v), EVERY, set()),
    "a foreign field": (lambda v: plain(x=v), EVERY, set()),
    # of one that is working, and whose runner is not there: taken back, if one can be told
    "lease.owner": (lambda v: working(owner=v), set(), TEXTS - {"empty text"} | {"list"}),
    "lease.token": (lambda v: working(token=v), set(), TEXTS | {"Code"}),
    "lease.claimed": (lambda v: working(claimed=v), set(), EVERY),
    "lease.back": (lambda v: working(back=v), set(), EVERY),
    **{
        f"wake.{name}": (lambda v, name=name: plain(wake={**WAKE, name: v}), EVERY, set())
        for name in ("kind", "by", "n", "at", "runat", "created")
    },
    **{
        f"tries.{name}": (lambda v, name=name: plain(tries=[{"runner": "r", "when": PAST, name: v}]), EVERY, set())
        for name in ("runner", "when", "err", "token", "claimed", "started", "trace", "outcome", "folded")
    },
}  # fmt: skip
WAKE = {"kind": "mail", "by": "x", "n": 1, "at": PAST, "runat": PAST, "created": PAST}
RECORD = {"control": "runner", "name": "o", "kinds": ["mail"], "slots": 1, "host": "h", "pid": 1, "version": "1",
          "started": PAST, "ends": PAST}  # fmt: skip


def working(**lease: Any) -> dict[str, Any]:
    return plain(status=2, lease={"owner": OWNER, "token": "t", "claimed": PAST, **lease})


def encoded(document: dict[str, Any]) -> bytes:
    return bson.encode({"_id": document["_id"], **document}, codec_options=CODEC)


def store(raw: Any, make: Any, names: list[str]) -> dict[Any, tuple[str, bytes]]:
    """Store a document for each value, where this server takes it: by id, the value's name and the bytes."""
    out = {}
    for name in names:
        document = make(STORED[name])
        try:
            raw.with_options(codec_options=CODEC).insert_one(document)
        except PyMongoError:  # an _id that is there, or is none; a date that the default server can't read
            continue
        out[id_key(document["_id"])] = (name, encoded(document))
    return out


def found(raw: Any) -> dict[Any, Any]:
    """The documents that are there, by id."""
    return {id_key(one["_id"]): one for one in raw.with_options(codec_options=RAW_CODEC).find()}


async def taken_back(seen: Any, count: int) -> None:
    """Wait until so many jobs were freed."""
    while sum(one["count"] for one in seen.of("takeback")) < count:
        await seen.wait("takeback", count=len(seen.of("takeback")) + 1)


FAST: dict[str, Any] = {"interval": 0.3, "concurrency": 20}
SHORT = {**FAST, "lease": 2.5, "beat": 0.5, "margin": 0.5}  # for what waits until a lease is over


@pytest.mark.parametrize("field", FIELDS)
async def test_a_field_with_any_value_harms_no_other_job(field, queue, raw, seen):
    make, runs, fails = FIELDS[field]
    assert runs | fails <= EVERY
    queue.handler("mail")(lambda job: None)
    # each of the embedded servers refuses to write one of the first two, as if its _id were changed by it, and both
    # take a pattern for an _id, which MongoDB does not
    names = sorted(EVERY - ({"MaxKey", "nan", "Regex"} if field == "_id" else set()))
    stored = store(raw, make, names[::2])  # some are read, some come by the stream
    async with queue.running("w", **(SHORT if field.startswith("lease.") else FAST)):
        stored |= store(raw, make, names[1::2])
        assert len(stored) > 40
        healthy = await queue.put_many([queue.job("mail", {"healthy": n}) for n in range(5)])
        good = sum(name in runs for name, _ in stored.values())
        ended = sum(name in fails for name, _ in stored.values())
        await seen.wait("try", count=good + len(healthy), outcome="success")
        if field.startswith("lease."):
            await taken_back(seen, ended)
        else:
            await seen.wait("try", count=ended, outcome="failure")
        if good + ended < len(stored):  # two fallbacks on, those that are left are not reported again
            later = await queue.put("mail", {"healthy": 5}, delay=0.7)
            await seen.wait("try", job=later.id, outcome="success")
    after = found(raw)
    for key, (name, before) in stored.items():
        now = after[key]
        if name in runs:
            assert now["status"] == Status.SUCCESS, name
        elif name in fails:
            assert now["status"] == Status.FAILED, name
            assert now["tries"][-1]["err"], name
        else:
            assert now.raw == before, name
    reports = [event["job"] for event in seen.of("job.unreadable")]
    assert len(reports) == len(set(reports))
    if field == "data":
        assert len(reports) == len(stored) - good - ended
    assert not seen.of("runner.failed")


@pytest.mark.parametrize(
    "field", ["tries", "tries.outcome", "tries.folded", "tries.when", "created", "retries", "retryinterval"]
)
async def test_a_try_can_fail_whatever_a_field_holds(field, queue, raw, seen):
    """Failing computes with the fields of the document: attempts left, the wait, earlier tries."""

    def mail(job):
        raise ValueError("no")

    queue.handler("mail")(mail)
    stored = store(raw, FIELDS[field][0], sorted(EVERY))
    async with queue.running("w", **FAST):
        for key in stored:
            await seen.wait("try", job=key, outcome="failure")
    for key, now in found(raw).items():
        assert now["status"] in (Status.FAILED, Status.WAITING), stored[key][0]
        assert now["status"] == Status.WAITING or now["tries"][-1]["err"] == "no", stored[key][0]
        assert "lease" not in now


async def test_runners_records_with_any_value_harm_no_runner(queue, raw, seen):
    queue.handler("mail")(lambda job: None)
    stored = {}
    for field in ("_id", "control", "name", "kinds", "slots", "started", "ends", "fenced"):
        numbers = iter(range(1000))

        def record(value: Any, field: str = field, numbers: Any = numbers) -> dict[str, Any]:
            return {"_id": f"runner:{field}:{next(numbers)}:a", **RECORD, field: value}

        for key, (name, before) in store(raw, record, sorted(EVERY)).items():
            stored[key] = (field, name, before)
    raw.insert_many([working() for _ in range(3)])
    async with queue.running("w", **SHORT):
        await taken_back(seen, 3)
        job = await queue.put("mail")
        await seen.wait("try", job=job.id, outcome="success")
    after = found(raw)
    for key, (field, name, before) in stored.items():
        if field == "ends" and not isinstance(STORED[name], (datetime, DatetimeMS)):
            assert after[key].raw == before  # nobody can say when its lease is over
    assert len(stored) > 400
    assert not seen.of("runner.failed")
