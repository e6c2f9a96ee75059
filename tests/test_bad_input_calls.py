"""Every argument of every public call, with every value of the table: it works, or is refused by its name.

A row names a call, the argument as its error names it, and the values that are taken. All others must raise
that error, a short one, and leave the collection as it was.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import bson
import pytest

from streamjobs import (
    BadArgument,
    Cancel,
    ConfigError,
    HandlerError,
    Job,
    JobNotFound,
    Queue,
    Settings,
    Snooze,
    Status,
    Try,
    UnreadableJob,
    original,
    subscribe,
)
from streamjobs.clock import to_ms
from streamjobs.job import CODEC, RUNNABLE, date_ms, id_key
from tests.bad_values import VALUES
from tests.documents import server_now

NOWHERE = "mongodb://127.0.0.1:1/"
ALL = set(VALUES)
TEXTS = {
    "text", "empty text", "blank text", "$-text", "$$-text", "dotted text", "operator text", "NUL in text",
    "lone surrogate", "terminal escape", "200 characters", "201 characters", "17 MB text", "str subclass", "str enum",
    "text without repr", "hex of an id", "text number", "Code",
}  # fmt: skip
NAMES = TEXTS - {"empty text", "NUL in text", "lone surrogate", "201 characters", "17 MB text"}
WHOLE = {"1", "int subclass", "int enum", "Int64"}
COUNTS = WHOLE | {"0"}
SPANS = COUNTS | {"2**31", "-0.0", "0.5", "1.0", "5e-324", "float subclass", "timedelta"}
DATES = {"date", "past date", "first date", "last date", "datetime subclass"}
DOCUMENTS = {
    "empty dict", "dict", "dict subclass", "OrderedDict", "SON", "RawBSONDocument", "$-operator", "$-condition",
    "$-expression", "dotted key", "empty key", "NUL inside", "nan inside", "naive date inside", "bytes inside",
    "uuid inside", "subclasses inside", "nested 80", "100,000 keys",
}  # fmt: skip
CALLABLE = {"function", "class"}
BOOLS = {"True", "False"}
NULL = {"None"}
#: Ids that may be asked for: whatever a foreign document's may be.
IDS = {
    *NULL, *BOOLS, *COUNTS, *DATES, *(TEXTS - {"17 MB text", "lone surrogate"}), *(DOCUMENTS - {"$-operator", "$-condition", "100,000 keys"}),
    "-1", "2**31", "-2**63", "-0.0", "0.5", "1.0", "1e300", "5e-324", "nan", "inf", "-inf", "float subclass", "Decimal128",
    "naive date", "DatetimeMS", "DatetimeMS far", "Timestamp", "bytes", "Binary", "list", "empty list", "tuple", "ObjectId", "UUID",
}  # fmt: skip


#: What a field may hold that only its writer knows of.
STORED = (
    IDS
    | DOCUMENTS
    | {"DBRef-like", "Regex", "pattern", "DBRef", "MaxKey", "100,000 keys", "$-operator", "$-condition"}
)


class Reached(ConfigError):  # noqa: N818 - it is none
    """All arguments were taken."""


@dataclass
class Here:
    """What the calls of the table are made on."""

    queue: Queue
    namespace: str
    uri: str
    raw: Any

    def fresh(self, *, handled: bool = False) -> Queue:
        """A queue that nothing is known of."""
        queue = Queue(NOWHERE, "app.jobs")
        if handled:
            queue.handler("mail")(nothing)
        return queue

    def unreachable(self) -> Queue:
        """A queue with a handler, which tells when a runner has begun."""

        def connect(*_: Any, **__: Any) -> Any:
            raise Reached("the runner has begun")

        queue = Queue(self.raw, connect=connect)
        queue.handler("mail")(nothing)
        return queue

    def put(self, **fields: Any) -> Any:
        """Put a job whose fields were set by hand."""
        job = self.queue.job("mail")
        for name, value in fields.items():
            setattr(job, name, value)
        return self.queue.put(job)

    def original(self, **given: Any) -> Any:
        """A runner under the original's name."""
        usual = {"name": "w", "collection": self.fresh(), "kind": "mail", "fn": nothing}
        return original.Runner(**{**usual, **given})


def nothing(job: Job) -> None:
    """A handler."""


def listen(value: Any) -> None:
    with subscribe(value):
        pass


#: call: (argument as its error names it, how, values that are taken, other errors that are right)
TABLE: dict[str, tuple[str, Any, set[str], tuple[type[Exception], ...]]] = {
    # ---- making a queue; which texts are URIs is the driver's to say
    "Queue(V, name)": ("source", lambda h, v: Queue(v, "app.jobs"), set(), (ConfigError,)),
    "Queue(uri, V)": ("name", lambda h, v: Queue(NOWHERE, v), {"dotted text"}, ()),
    "Queue(c, connect=V)": ("connect", lambda h, v: Queue(h.raw, connect=v), NULL | CALLABLE, (ConfigError,)),
    "use(V)": ("source", lambda h, v: h.fresh().use(v), set(), (ConfigError,)),
    "use(uri, V)": ("name", lambda h, v: h.fresh().use(NOWHERE, v), NULL | {"dotted text"}, ()),
    # ---- handlers and what they return
    "handler(V)": ("kind", lambda h, v: h.fresh().handler(v)(nothing), NAMES, ()),
    "handler(retries=V)": (
        "retries", lambda h, v: h.fresh().handler("k", retries=v)(nothing), COUNTS, ()),
    "handler(retry_interval=V)": (
        "retry_interval", lambda h, v: h.fresh().handler("k", retry_interval=v)(nothing), SPANS, ()),
    "handler(k)(V)": ("handler", lambda h, v: h.fresh().handler("k")(v), {"function"}, (HandlerError,)),
    "Snooze(V)": ("delay", lambda h, v: Snooze(v), SPANS, ()),
    "Cancel(V)": ("reason", lambda h, v: Cancel(v), TEXTS, ()),
    # ---- putting
    "put(V)": ("kind", lambda h, v: h.queue.put(v), NAMES, ()),
    "put(data=V)": ("data", lambda h, v: h.queue.put("mail", v), NULL | DOCUMENTS, ()),
    "put(delay=V)": ("delay", lambda h, v: h.queue.put("mail", delay=v), NULL | SPANS, ()),
    "put(at=V)": ("at", lambda h, v: h.queue.put("mail", at=v), NULL | DATES, ()),
    "put(retries=V)": ("retries", lambda h, v: h.queue.put("mail", retries=v), NULL | COUNTS, ()),
    "put(retry_interval=V)": (
        "retry_interval", lambda h, v: h.queue.put("mail", retry_interval=v), NULL | SPANS, ()),
    "put(id=V)": ("id", lambda h, v: h.queue.put("mail", id=v), NULL | {"ObjectId"}, ()),
    "put(session=V)": ("session", lambda h, v: h.queue.put("mail", session=v), NULL, ()),
    "sync.put(V)": ("kind", lambda h, v: h.queue.sync.put(v), NAMES, ()),
    "sync.put(data=V)": ("data", lambda h, v: h.queue.sync.put("mail", v), NULL | DOCUMENTS, ()),
    "sync.put(delay=V)": ("delay", lambda h, v: h.queue.sync.put("mail", delay=v), NULL | SPANS, ()),
    "sync.put(at=V)": ("at", lambda h, v: h.queue.sync.put("mail", at=v), NULL | DATES, ()),
    "sync.put(retries=V)": ("retries", lambda h, v: h.queue.sync.put("mail", retries=v), NULL | COUNTS, ()),
    "sync.put(retry_interval=V)": (
        "retry_interval", lambda h, v: h.queue.sync.put("mail", retry_interval=v), NULL | SPANS, ()),
    "sync.put(id=V)": ("id", lambda h, v: h.queue.sync.put("mail", id=v), NULL | {"ObjectId"}, ()),
    "sync.put(session=V)": ("session", lambda h, v: h.queue.sync.put("mail", session=v), NULL, ()),
    "job(V)": ("kind", lambda h, v: h.queue.job(v), NAMES, ()),
    "job(data=V)": ("data", lambda h, v: h.queue.job("mail", v), NULL | DOCUMENTS, ()),
    "job(delay=V)": ("delay", lambda h, v: h.queue.job("mail", delay=v), NULL | SPANS, ()),
    "job(at=V)": ("at", lambda h, v: h.queue.job("mail", at=v), NULL | DATES, ()),
    "job(retries=V)": ("retries", lambda h, v: h.queue.job("mail", retries=v), NULL | COUNTS, ()),
    "job(retry_interval=V)": (
        "retry_interval", lambda h, v: h.queue.job("mail", retry_interval=v), NULL | SPANS, ()),
    "job(id=V)": ("id", lambda h, v: h.queue.job("mail", id=v), NULL | {"ObjectId"}, ()),
    "put_many(V)": ("jobs", lambda h, v: h.queue.put_many(v), {"empty list"}, ()),
    "put_many([job, V])": ("jobs", lambda h, v: h.queue.put_many([h.queue.job("mail"), v]), set(), ()),
    "put_many(session=V)": (
        "session", lambda h, v: h.queue.put_many([h.queue.job("mail")], session=v), NULL, ()),
    "sync.put_many(V)": ("jobs", lambda h, v: h.queue.sync.put_many(v), {"empty list"}, ()),
    "sync.put_many(session=V)": (
        "session", lambda h, v: h.queue.sync.put_many([h.queue.job("mail")], session=v), NULL, ()),
    "Job.new(V)": ("kind", lambda h, v: Job.new(v), NAMES, ()),
    # ---- a Job whose fields were set by hand
    "job.kind = V": ("kind", lambda h, v: h.put(kind=v), NAMES, ()),
    "job.data = V": ("data", lambda h, v: h.put(data=v), DOCUMENTS, ()),
    "job.id = V": ("id", lambda h, v: h.put(id=v), IDS - NULL - DOCUMENTS - {"list", "empty list", "tuple"}, ()),
    "job.status = V": (
        "status", lambda h, v: h.put(status=v), COUNTS | {"-1", "2**31", "-2**63"}, ()),
    "job.tries = V": ("tries", lambda h, v: h.put(tries=v), {"list", "empty list"}, ()),
    "job.tries = [V]": ("tries", lambda h, v: h.put(tries=[v]), STORED, ()),
    "job.created = V": (
        "created", lambda h, v: h.put(created=v), NULL | DATES | {"DatetimeMS", "DatetimeMS far"}, ()),
    "job.runat = V": ("runat", lambda h, v: h.put(runat=v), DATES | {"DatetimeMS", "DatetimeMS far"}, ()),
    "job.retries = V": ("retries", lambda h, v: h.put(retries=v), COUNTS, ()),
    "job.retryinterval = V": ("retryinterval", lambda h, v: h.put(retryinterval=v), COUNTS | {"2**31"}, ()),
    "job.delay = V": ("delay", lambda h, v: h.put(delay=v), NULL | SPANS, ()),
    "job.extra = V": ("", lambda h, v: h.put(extra=v), DOCUMENTS, ()),
    "job.extra['x'] = V": ("x", lambda h, v: h.put(extra={"x": v}), STORED, ()),
    # ---- looking and changing: an id may be anything that a foreign document has
    "get(V)": ("id", lambda h, v: h.queue.get(v), set(), (JobNotFound,)),
    "retry(V)": ("id", lambda h, v: h.queue.retry(v), set(), (JobNotFound,)),
    "cancel(V)": ("id", lambda h, v: h.queue.cancel(v), set(), (JobNotFound,)),
    "sync.get(V)": ("id", lambda h, v: h.queue.sync.get(v), set(), (JobNotFound,)),
    "sync.retry(V)": ("id", lambda h, v: h.queue.sync.retry(v), set(), (JobNotFound,)),
    "sync.cancel(V)": ("id", lambda h, v: h.queue.sync.cancel(v), set(), (JobNotFound,)),
    "retry(id, force=V)": ("force", lambda h, v: h.queue.retry("none", force=v), set(), (JobNotFound,)),
    "cancel(id, V)": ("reason", lambda h, v: h.queue.cancel("none", v), set(), (JobNotFound,)),
    "list(kind=V)": ("kind", lambda h, v: h.queue.list(kind=v), NULL | NAMES, ()),
    "list(status=V)": (
        "status", lambda h, v: h.queue.list(status=v), NULL | COUNTS | {"-1", "2**31", "-2**63"}, ()),
    "list(due=V)": ("due", lambda h, v: h.queue.list(due=v), NULL | BOOLS, ()),
    "list(limit=V)": ("limit", lambda h, v: h.queue.list(limit=v), WHOLE, ()),
    "sync.list(kind=V)": ("kind", lambda h, v: h.queue.sync.list(kind=v), NULL | NAMES, ()),
    # ---- reading documents
    "Job.from_document(V)": ("", lambda h, v: Job.from_document(v), set(), (UnreadableJob,)),
    "Try.from_document(V)": ("", lambda h, v: Try.from_document(v), ALL, ()),
    "Status.parse(V)": ("", lambda h, v: Status.parse(v), ALL, ()),
    # ---- runners and their settings
    "runner(V)": ("name", lambda h, v: h.fresh(handled=True).runner(v), NAMES | NULL, ()),
    "runner(handlers=V)": (
        "", lambda h, v: h.fresh(handled=True).runner("w", handlers=v), NULL, (HandlerError,)),
    "runner(handlers={k: V})": (
        "handlers", lambda h, v: h.fresh().runner("w", handlers={"k": v}), set(), ()),
    "runner(concurrency=V)": (
        "concurrency", lambda h, v: h.fresh(handled=True).runner("w", concurrency=v), WHOLE, ()),
    "runner(interval=V)": (
        "interval", lambda h, v: h.fresh(handled=True).runner("w", interval=v),
        WHOLE | {"0.5", "1.0", "float subclass"}, ()),
    "runner(poll=V)": (
        "poll", lambda h, v: h.fresh(handled=True).runner("w", poll=v), NULL | WHOLE | {"0.5", "1.0", "float subclass"}, ()),
    "Settings(concurrency=V)": ("concurrency", lambda h, v: Settings(concurrency=v), WHOLE, ()),
    "Settings(interval=V)": (
        "interval", lambda h, v: Settings(interval=v), WHOLE | {"0.5", "1.0", "float subclass"}, ()),
    "Settings(stop_deadline=V)": (
        "stop_deadline", lambda h, v: Settings(stop_deadline=v),
        COUNTS | {"-0.0", "0.5", "1.0", "5e-324", "float subclass"}, ()),
    "Settings(lease=V)": ("lease", lambda h, v: Settings(lease=v), set(), (ConfigError,)),
    "Settings(beat=V)": (
        "beat", lambda h, v: Settings(beat=v), WHOLE | {"0.5", "1.0", "float subclass"}, ()),
    "Settings(margin=V)": (
        "margin", lambda h, v: Settings(margin=v), COUNTS | {"-0.0", "0.5", "1.0", "5e-324", "float subclass"}, ()),
    "Settings(poll=V)": ("poll", lambda h, v: Settings(poll=v), NULL | WHOLE | {"0.5", "1.0", "float subclass"}, ()),
    "Settings(stream_wait=V)": (
        "stream_wait", lambda h, v: Settings(stream_wait=v), WHOLE | {"0.5", "1.0", "float subclass"}, ()),
    "running(V)": ("name", lambda h, v: entered(h.unreachable().running(v)), set(), (Reached,)),
    "run(V)": ("name", lambda h, v: h.unreachable().run(v), set(), (Reached,)),
    "run(signals=V)": ("signals", lambda h, v: h.unreachable().run("w", signals=v), set(), (Reached,)),
    "subscribe(V)": ("listener", lambda h, v: listen(v), CALLABLE, ()),
    # ---- the original's names
    "original.put(V, job)": ("", lambda h, v: original.put(v, Job.new("mail")), set(), (ConfigError,)),
    "original.put(queue, V)": ("jobs", lambda h, v: original.put(h.queue, v), set(), ()),
    "original.Runner(V, ...)": ("name", lambda h, v: h.original(name=v), NAMES, ()),
    "original.Runner(collection=V)": (
        "", lambda h, v: h.original(collection=v), set(), (ConfigError,)),
    "original.Runner(kind=V)": ("kind", lambda h, v: h.original(kind=v), NAMES, ()),
    "original.Runner(fn=V)": ("fn", lambda h, v: h.original(fn=v), CALLABLE, ()),
    "original.Runner(connect=V)": (
        "connect", lambda h, v: h.original(collection=h.raw, connect=v), NULL | CALLABLE, (ConfigError,)),
    "original.Runner(interval=V)": (
        "interval", lambda h, v: h.original(interval=v), WHOLE | {"0.5", "1.0", "float subclass"}, ()),
    "original.Runner(concurrency=V)": ("concurrency", lambda h, v: h.original(concurrency=v), WHOLE, ()),
}  # fmt: skip

#: What servers differ in: whether the decoder of the default one takes these is its own affair.
UNTOLD = {"DatetimeMS far"}


async def entered(context: Any) -> None:
    async with context:
        pass


async def call(here: Here, how: Any, value: Any) -> Any:
    result = how(here, value)
    return await result if inspect.isawaitable(result) else result


@pytest.fixture
def here(queue, namespace, uri, raw):
    return Here(queue, namespace, uri, raw)


@pytest.mark.parametrize("name", TABLE)
async def test_a_value_is_taken_and_comes_back_or_is_refused_by_its_arguments_name(name, here, python_server):
    argument, how, takes, others = TABLE[name]
    assert takes <= ALL
    tried = 0
    for value_name in sorted(ALL - takes - (UNTOLD if python_server and JobNotFound in others else set())):
        with pytest.raises((BadArgument, *others)) as caught:
            await call(here, how, VALUES[value_name])
        text = str(caught.value)
        assert 10 < len(text) < 400, (value_name, text[:500])
        assert "\n" not in text or not isinstance(caught.value, BadArgument), (value_name, text)
        if isinstance(caught.value, BadArgument) and argument:
            assert caught.value.name == argument, (value_name, text)
        tried += 1
    assert here.raw.count_documents({}) == 0, "something was written"
    for value_name in sorted(takes - (UNTOLD if python_server else set())):
        result = await call(here, how, VALUES[value_name])
        if isinstance(result, Job) and not name.startswith(("job(", "Job.new")):
            back = await here.queue.get(result.id)
            assert raw_of(back) == raw_of(result), value_name
            here.raw.delete_many({})
        tried += 1
    assert tried >= len(ALL) - len(UNTOLD)


def raw_of(job: Job) -> bytes:
    return bson.encode(job.to_document(), codec_options=CODEC)


@pytest.mark.timeout(300)
async def test_whatever_put_takes_runs_when_it_is_due_and_else_stays_as_it_is(here, seen, python_server):
    left_out = {"100,000 keys", "Binary"} | (UNTOLD if python_server else set())
    kinds = set()
    for name, (_, how, takes, _) in TABLE.items():
        if name.startswith(("put(", "sync.put(", "job.")):
            # servers differ in which ids are one and the same: 0 and -0.0, bytes and binaries
            some = {"text", "ObjectId", "UUID", "date", "2**31", "0.5"} if name == "job.id = V" else takes
            for value_name in sorted(some - left_out):
                kinds.add((await call(here, how, VALUES[value_name])).kind)
    soon, before = to_ms(server_now(here.raw)) + 5_000, {id_key(one["_id"]): one for one in here.raw.find()}
    due = {key for key, one in before.items() if one["status"] in RUNNABLE and date_ms(one["runat"]) <= soon}
    assert len(due) > 200
    queue = Queue(here.uri, here.namespace)
    for kind in kinds:
        queue.handler(kind)(nothing)
    async with queue, queue.running("w", interval=3):  # each period has a read for each of hundreds of kinds
        await seen.wait("try", count=len(due), outcome="success", timeout=200)
    for one in here.raw.find():
        key = id_key(one["_id"])
        same = ("data",) if key in due else tuple(one)
        assert [repr(one[name]) for name in same] == [repr(before[key][name]) for name in same]
        assert key not in due or one["status"] == Status.SUCCESS
    assert not seen.of("job.unreadable")
