"""What a job is: its document to the byte, and what is refused before it is sent."""

from __future__ import annotations

import math
import re
import uuid
from dataclasses import fields
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import bson
import pytest
from bson import Binary, Code, DatetimeMS, Decimal128, Int64, MaxKey, MinKey, ObjectId, Regex, Timestamp
from bson.raw_bson import RawBSONDocument
from hypothesis import given, settings
from hypothesis import strategies as st

from streamjobs import ASAP, BadArgument, Job, Queue, Status, Try, UnreadableJob
from streamjobs.check import check_job
from streamjobs.job import ASAP_MS, CODEC, MAX_DOCUMENT, date_ms

OPTIONAL = ("tries", "created", "retries", "retryinterval")
OURS = ("_id", "status", "tries", "created", "runat", "data", "retries", "retryinterval", "kind")
PLAIN = settings(max_examples=150, deadline=None)

_texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
_keys = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8).filter(
    lambda key: key not in ("$ref", "$id", "$db")
)
_dates = st.one_of(
    st.datetimes(timezones=st.just(UTC)).map(lambda d: d.replace(microsecond=d.microsecond // 1000 * 1000)),
    st.integers(-(2**63), 2**63 - 1).map(DatetimeMS),
)
_int32 = st.integers(-(2**31), 2**31 - 1)
_int64 = st.integers(-(2**63), 2**63 - 1).map(Int64)
_leaves = st.one_of(
    st.none(),
    st.booleans(),
    _int32,
    _int64,
    st.floats(),
    _texts,
    _dates,
    st.binary(max_size=9),
    st.builds(Binary, st.binary(max_size=9), st.sampled_from([0, 1, 5, 128, 255])),
    st.uuids().map(Binary.from_uuid),
    st.builds(ObjectId, st.binary(min_size=12, max_size=12)),
    st.builds(Regex, _keys, st.sampled_from(["", "i", "im", "mx"])),
    st.integers(-(10**20), 10**20).map(lambda n: Decimal128(str(n))),
    st.sampled_from([Decimal128("NaN"), Decimal128("-Infinity"), Decimal128("1E+6000")]),
    st.builds(Timestamp, st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)),
    st.just(MinKey()),
    st.just(MaxKey()),
    _texts.map(Code),
)
_values = st.recursive(
    _leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_keys, inner, max_size=3),
    max_leaves=8,
)
_tries = st.lists(
    st.dictionaries(st.sampled_from(["runner", "when", "err", "x"]), _values, max_size=4) | _leaves
)


@st.composite
def documents(draw) -> dict[str, Any]:
    """Any document that can be a job, its fields in any order."""
    fields = {
        "_id": draw(st.one_of(st.builds(ObjectId, st.binary(min_size=12, max_size=12)), _texts, _int32)),
        "status": draw(_int32 | _int64),
        "runat": draw(_dates),
        "data": draw(st.dictionaries(_keys, _values, max_size=4)),
        "kind": draw(_texts),
        "tries": draw(_tries),
        "created": draw(_values),
        "retries": draw(_int32 | _int64),
        "retryinterval": draw(_int64),
    }
    for name in OPTIONAL:
        if draw(st.booleans()):
            del fields[name]
    extra = draw(st.dictionaries(_keys.filter(lambda key: key not in OURS), _values, max_size=4))
    both = list({**extra, **fields}.items())
    return dict(draw(st.permutations(both)))


def encode(document: Any) -> bytes:
    return bson.encode(document, codec_options=CODEC)


@PLAIN
@given(documents(), st.booleans())
def test_any_document_that_can_be_a_job_is_written_back_to_the_same_bytes(document, as_bytes):
    raw = encode(document)
    read = (
        RawBSONDocument(raw, CODEC.with_options(document_class=RawBSONDocument))
        if as_bytes
        else bson.decode(raw, CODEC)
    )
    job = Job.from_document(read)
    assert encode(job.to_document()) == raw


@PLAIN
@given(documents())
def test_what_was_read_is_readable_in_every_way(document):
    job = Job.from_document(bson.decode(encode(document), CODEC))
    assert isinstance(job.state, str)
    assert job.number >= 1
    assert all(isinstance(one, Try) for one in job.history)
    assert isinstance(job.retries, int)
    assert isinstance(job.retryinterval, int)
    assert job.asap == (date_ms(document["runat"]) == ASAP_MS)


BASE: dict[str, Any] = {"_id": 1, "status": 1, "kind": "mail", "data": {}, "runat": ASAP}


@pytest.mark.parametrize("name", ["kind", "status", "runat", "data"])
@pytest.mark.parametrize(
    "value", ["missing", None, True, 1.5, "text", 7, [1], ["mail"], {"a": 1}, ObjectId(), ASAP]
)
def test_what_cannot_be_a_job_raises_unreadable_job_naming_the_field(name, value):
    document = {**BASE, name: value}
    if value == "missing":
        del document[name]
    sorts = {"kind": str, "status": int, "runat": datetime, "data": dict}
    good = isinstance(document.get(name), sorts[name]) and value is not True
    for read in (document, RawBSONDocument(encode(document))):
        if good:
            assert Job.from_document(read).to_document() == document
            continue
        with pytest.raises(UnreadableJob) as caught:
            Job.from_document(read)
        assert caught.value.problem.startswith(f"{name} is not ")
        assert (caught.value.id, "1 can't be a job" in str(caught.value)) == (1, True)


def test_bytes_that_are_no_bson_raise_unreadable_job_with_the_id_where_it_can_be_read():
    good = encode({**BASE, "x": "abc"})
    bad = good.replace(b"abc\0", b"\xff\xff\xff\0")
    with pytest.raises(UnreadableJob, match="decoded") as caught:
        Job.from_document(RawBSONDocument(bad))
    assert caught.value.id in (1, None)


def test_data_that_reads_back_as_a_dbref_is_unreadable_and_refused_at_put():
    data = {"$ref": "c", "$id": 1}
    with pytest.raises(UnreadableJob, match="data is not a document but DBRef"):
        Job.from_document(bson.decode(encode({**BASE, "data": data}), CODEC))
    with pytest.raises(BadArgument, match=r"^data: "):
        check_job(Job(ObjectId(), "mail", data))
    check_job(Job(ObjectId(), "mail", {"ref": data}))


@pytest.mark.parametrize("value", [None, "five", math.nan, math.inf, -math.inf, True, [5], {}])
def test_retries_and_retryinterval_that_are_no_numbers_read_as_0(value):
    job = Job.from_document({**BASE, "retries": value, "retryinterval": value})
    assert (job.retries, job.retryinterval) == (0, 0)


@pytest.mark.parametrize(
    ("value", "read"), [(5.0, 5), (5.9, 5), (-2.5, -2), (1e300, 2**62), (-1e300, -(2**62))]
)
def test_doubles_of_other_writers_read_as_whole_numbers_that_bson_can_hold(value, read):
    job = Job.from_document({**BASE, "retries": value, "retryinterval": value})
    assert (job.retries, job.retryinterval) == (read, read)
    encode(job.to_document())


@pytest.mark.parametrize("tries", [None, "x", 5, {"a": 1}])
def test_tries_that_are_no_array_read_as_none(tries):
    assert Job.from_document({**BASE, "tries": tries}).tries == []


def test_history_and_number_skip_what_is_no_try_and_count_what_was_folded():
    tries = [
        {"runner": "a", "when": ASAP, "token": "t", "started": ASAP, "unknown": 1},
        "no try",
        None,
        {"outcome": "folded", "folded": 40, "err": "40 earlier tries"},
        {"runner": 7, "err": "x", "folded": "no number"},
        {"folded": -3},
    ]
    job = Job.from_document({**BASE, "tries": tries})
    assert job.history[0] == Try("a", ASAP, token="t", started=ASAP)
    assert [one.folded for one in job.history] == [0, 40, 0, 0]
    assert job.history[2].runner == "7"
    assert job.number == 1 + 1 + 40 + 1 + 1


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "invalid"),
        (1, "new"),
        (2, "working"),
        (3, "waiting"),
        (4, "success"),
        (5, "failed"),
        (6, "cancelled"),
    ],
)
def test_a_status_has_the_originals_number_and_text_forms(number, text):
    assert Status(number).value == number
    assert str(Status(number)) == f"{Status(number)}" == text
    assert Status.parse(text) is Status(number)
    assert Job.from_document({**BASE, "status": number}).state == text


@pytest.mark.parametrize(
    "text", ["", "New", "NEW", "new ", "wa\u0131ting", "expired", "1", "parse", "__class__"]
)
def test_any_other_text_reads_as_the_invalid_status(text):
    assert Status.parse(text) is Status.INVALID


def test_a_status_that_this_version_does_not_know_is_told_and_kept():
    job = Job.from_document({**BASE, "status": 8})
    assert (job.status, job.state, job.to_document()["status"]) == (8, "unknown (8)", 8)


def test_a_new_job_has_no_tries_status_1_empty_data_and_a_fresh_id():
    job, other = Job.new("mail"), Job.new("mail")
    assert (job.tries, job.status, job.data, job.runat, job.retries) == ([], 1, {}, ASAP, 0)
    assert job.data is not other.data
    assert job.tries is not other.tries
    assert isinstance(job.id, ObjectId)
    assert job.id != other.id
    assert job.asap
    assert job.number == 1
    assert not job.lost


@pytest.mark.parametrize("kind", ["", "x" * 201, "a\0b", None, 7, b"mail", "\ud800", ["mail"]])
def test_a_kind_that_cannot_be_one_is_refused(kind):
    with pytest.raises(BadArgument, match=r"^kind: ") as caught:
        Job.new(kind)
    assert caught.value.name == "kind"
    assert isinstance(caught.value, ValueError)


def _types(raw: bytes) -> list[tuple[str, int]]:
    """Names and type bytes of a document's fields, read without the decoder."""
    out, at = [], 4
    sizes = {0x01: 8, 0x07: 12, 0x08: 1, 0x09: 8, 0x0A: 0, 0x10: 4, 0x12: 8}
    while raw[at]:
        kind, end = raw[at], raw.index(b"\0", at + 1)
        out.append((raw[at + 1 : end].decode(), kind))
        at = end + 1
        length = int.from_bytes(raw[at : at + 4], "little")
        at += sizes.get(kind, length if kind in (3, 4) else 4 + length)
    return out


@pytest.mark.parametrize("status", [Status.NEW, 1])
def test_a_plain_jobs_document_has_the_originals_fields_order_and_types(status):
    job = Job.new("mail")
    job.status = status
    job.retries, job.retryinterval = 5, 1_000_000
    assert _types(encode(check_job(job).to_document())) == [
        ("_id", 7), ("status", 16), ("tries", 4), ("created", 9), ("runat", 9), ("data", 3),
        ("retries", 16), ("retryinterval", 18), ("kind", 2),
    ]  # fmt: skip


def test_fields_that_were_added_to_a_read_job_are_written_after_the_others():
    job = Job.from_document({"kind": "mail", "x": 1, "_id": 1, "status": 1, "data": {}, "runat": ASAP})
    job.tries.append({"runner": "a"})
    job.retries = 3
    job.extra["y"] = 2
    assert list(job.to_document()) == ["kind", "x", "_id", "status", "data", "runat", "y", "tries", "retries"]


def _nested(depth: int, key: str | None = "a") -> Any:
    value: Any = {}
    for _ in range(depth - 1):
        value = [value] if key is None else {key: value}
    return value


def _cycle() -> dict[str, Any]:
    data: dict[str, Any] = {}
    data["again"] = [data]
    return data


NAIVE = datetime(2026, 1, 1)  # noqa: DTZ001 - what is refused
REFUSED = {
    "retries -1": ("retries", {"retries": -1}),
    "retries 2**31": ("retries", {"retries": 2**31}),
    "retries True": ("retries", {"retries": True}),
    "retries 1.5": ("retries", {"retries": 1.5}),
    "retries text": ("retries", {"retries": "5"}),
    "interval -1": ("retryinterval", {"retryinterval": -1}),
    "interval 2**63": ("retryinterval", {"retryinterval": 2**63}),
    "interval float": ("retryinterval", {"retryinterval": 0.5}),
    "runat naive": ("runat", {"runat": NAIVE}),
    "runat text": ("runat", {"runat": "tomorrow"}),
    "runat missing": ("runat", {"runat": None}),
    "runat before year 1": ("runat", {"runat": datetime(1, 1, 1, tzinfo=timezone(timedelta(hours=5)))}),
    "created naive": ("created", {"created": NAIVE}),
    "status text": ("status", {"status": "new"}),
    "status too big": ("status", {"status": 2**63}),
    "data list": ("data", {"data": [1]}),
    "data text": ("data", {"data": "text"}),
    "data None": ("data", {"data": None}),
    "key int": ("data", {"data": {1: 2}}),
    "key None": ("data", {"data": {"a": {None: 2}}}),
    "key NUL": ("data", {"data": {"a\0b": 2}}),
    "key surrogate": ("data", {"data": {"\ud800": 2}}),
    "text surrogate": ("data", {"data": {"a": ["x", "\udfff"]}}),
    "int too big": ("data", {"data": {"a": 2**63}}),
    "a set": ("data", {"data": {"a": {1}}}),
    "an object": ("data", {"data": {"a": object()}}),
    "re with NUL": ("data", {"data": {"a": re.compile("a\0b")}}),
    "cycle": ("data", {"data": _cycle()}),
    "200 deep": ("data", {"data": _nested(200)}),
    "200 deep in lists": ("data", {"data": {"a": _nested(200, None)}}),
    "200 deep with empty keys": ("data", {"data": _nested(200, "")}),
    "100,000 deep": ("data", {"data": _nested(100_000)}),
    "17 MB": ("data", {"data": {"a": b"x" * 17_000_000}}),
    "17 MB of text": ("data", {"data": {"a": ["x" * 1_000_000] * 17}}),
    "extra key": ("x", {"extra": {"x": {1: 2}}}),
}


@pytest.mark.parametrize("case", REFUSED)
async def test_a_job_that_could_not_be_stored_or_read_back_is_refused_by_name_and_nothing_is_sent(case, seen):
    name, fields = REFUSED[case]
    job = Job.new("mail")
    for key, value in fields.items():
        setattr(job, key, value)
    with pytest.raises(BadArgument) as caught:
        check_job(job)
    assert caught.value.name == name
    assert str(caught.value).startswith(f"{name}: ")
    assert len(str(caught.value)) < 1_000
    # nobody listens there: had it been sent, the error would be another one, later
    queue = Queue("mongodb://127.0.0.1:1/", "app.jobs")
    for call in (queue.put(job), queue.put_many([Job.new("mail"), job])):
        with pytest.raises(BadArgument):
            await call
    with pytest.raises(BadArgument):
        queue.sync.put(job)
    if fields.get("data") is not None:
        with pytest.raises(BadArgument, match=r"^data: "):
            queue.job("mail", fields["data"])
    assert not seen.all


def test_the_largest_document_is_15_mib():
    job = Job.new("mail")
    job.data = {"a": b""}
    room = MAX_DOCUMENT - len(encode(job.to_document()))
    job.data = {"a": b"x" * room}
    check_job(job)
    job.data = {"a": b"x" * (room + 1)}
    with pytest.raises(BadArgument, match=r"^data: keep the document under"):
        check_job(job)


@pytest.mark.parametrize("depth", [1, 50, 89])
def test_what_is_nested_less_than_90_deep_is_taken(depth):
    job = Job.new("mail")
    job.data = _nested(depth)
    check_job(job)


@PLAIN
@given(st.dictionaries(_keys, _values, max_size=4))
def test_all_that_bson_can_hold_is_taken_as_data(data):
    job = Job.new("mail")
    job.data = data
    check_job(job)
    again = Job.from_document(bson.decode(encode(job.to_document()), CODEC))
    assert encode(again.data) == encode(data)


def test_uuids_come_back_as_uuids_and_dates_as_aware_ones():
    job = Job.new("mail")
    job.data = {"u": uuid.UUID(int=5), "d": datetime(2026, 1, 1, tzinfo=UTC), "far": DatetimeMS(2**62)}
    check_job(job)
    assert Job.from_document(bson.decode(encode(job.to_document()), CODEC)).data == job.data


def test_a_handler_gets_a_job_of_its_own_with_everything_that_was_read():
    job = Job(
        1, "mail", {"a": 1}, Status.WORKING, [{}], datetime(2030, 1, 1, tzinfo=UTC), datetime(2031, 1, 1, tzinfo=UTC), 3, 7,
        {"more": 2}, ("kind", "more"), True, 4.0,
    )  # fmt: skip
    plain = Job(0, "")
    assert [one.name for one in fields(Job) if getattr(job, one.name) == getattr(plain, one.name)] == ["held"]
    lent = job.lent("held")
    assert {one.name: getattr(lent, one.name) for one in fields(Job)} == {
        **{one.name: getattr(job, one.name) for one in fields(Job)},
        "held": "held",
    }
    lent.tries.append({})
    assert job.tries == [{}]
    assert lent.to_document() == {**job.to_document(), "tries": [{}, {}]}


@pytest.mark.parametrize("name", ["log", "check()"])
def test_what_exists_only_inside_a_handler_says_so_outside(name):
    with pytest.raises(AttributeError, match=re.escape(f"job.{name} exists only inside a handler")):
        eval(f"job.{name}", {"job": Job.new("mail")})
