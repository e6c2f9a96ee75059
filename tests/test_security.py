"""What SECURITY.md says: caps, secrets, texts of jobs in pipelines, filters and terminals."""

from __future__ import annotations

import inspect
import io
import logging
import re
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from bson import ObjectId
from pymongo.errors import PyMongoError
from rich.console import Console
from typer.testing import CliRunner

from streamjobs import (
    BadArgument,
    Cancel,
    ConfigError,
    ConnectError,
    Queue,
    Settings,
    check,
    clients,
    handler,
    job,
    putting,
    transitions,
)
from streamjobs.cli import app, log, place

SECURITY = Path(__file__).parent.parent / "SECURITY.md"


# ---- caps


def test_the_caps_of_the_page_are_those_of_the_code(uri, namespace):
    caps = dict(
        re.findall(r"^\| (.+?) \| ([\d,]+) \w+ \|", SECURITY.read_text(encoding="utf-8"), re.MULTILINE)
    )
    limits = {
        "a job's document when it is put": job.MAX_DOCUMENT,
        "nesting of a value in it": job.MAX_DEPTH,
        "`kind`, a runner's name": 200,
        "an `_id` that is no ObjectId": check.MAX_ID,
        "jobs in one `put_many`": putting.MAX_JOBS,
        "jobs that `list` returns": 100_000,
        "a delay, a retry interval, a snooze": 100,
        "jobs that a runner holds (`concurrency`)": 10_000,
        "an error's or a reason's text": transitions.MAX_ERROR,
        "a traceback": transitions.MAX_TRACE,
        "tries in a document": transitions.MAX_TRIES,
        "an error's text in an event": 1_000,
        "kinds named in the event of a put": putting._KINDS,
    }
    assert {name: int(value.replace(",", "")) for name, value in caps.items()} == limits
    queue = Queue(uri, namespace)
    at_most = (
        lambda n: queue.job("x" * n), lambda n: queue.runner("x" * n, handlers={"k": handler.Handler.of("k", print_)}),
    )  # fmt: skip
    for call in at_most:
        call(200)
        with pytest.raises(BadArgument):
            call(201)
    assert Settings(concurrency=10_000)
    with pytest.raises(BadArgument):
        Settings(concurrency=10_001)
    century = 100 * 365 * 86_400
    queue.job("mail", delay=century)
    with pytest.raises(BadArgument):
        queue.job("mail", delay=century + 1)


def print_(job: Any) -> None: ...


async def test_the_cap_of_put_many_is_kept_and_an_endless_source_is_not_read_to_its_end(
    queue, monkeypatch, raw
):
    monkeypatch.setattr(putting, "MAX_JOBS", 50)
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield queue.job("mail")

    with pytest.raises(BadArgument, match="put at most 50 in a call"):
        queue.sync.put_many(endless())
    assert taken == 51
    assert raw.count_documents({}) == 0
    assert len(queue.sync.put_many([queue.job("mail") for _ in range(50)])) == 50
    assert "100,000" in inspect.getdoc(Queue.put_many)
    queue.sync.close()


# ---- texts of jobs in pipelines

HOSTILE = ["$data.secret", "$$ROOT", "$$NOW", "$", '{"$set": 1}', "{$literal: 1}", "a.b", "$data"]


@pytest.mark.parametrize("text", HOSTILE)
async def test_a_text_that_looks_like_an_expression_is_stored_as_it_is_wherever_it_comes_from(
    text, queue, raw, seen
):
    """Kind, runner's name, data's keys and values, ids, errors, reasons, results and what a handler returns."""

    @queue.handler(text, retries=2)
    def work(job: Any) -> Any:
        match job.data["do"]:
            case "fail":
                raise ValueError(text)
            case "cancel":
                return Cancel(text)
            case "result":
                return {"$set": {"status": 1}, text: text}
        raise KeyError(text)

    async with queue.running(text):
        put = {
            what: await queue.put(text, {"do": what, "secret": "s3cret", text: text}, retries=1)
            for what in ("fail", "cancel", "result", "key")
        }
        for one in put.values():
            await seen.wait("try", job=one.id)
        waits = await queue.put(text, {"secret": "s3cret"}, delay=3600)
        await queue.cancel(waits.id, text)
        await queue.retry(put["fail"].id)
        await seen.wait("try", job=put["fail"].id, count=2)
    documents = {what: raw.find_one({"_id": one.id}) for what, one in {**put, "waits": waits}.items()}
    for one in documents.values():
        assert one["kind"] == text
        assert one["data"].get(text, text) == text
        assert one["data"].pop("secret") == "s3cret"
        assert "s3cret" not in repr(one)
        assert all(entry["runner"] == text for entry in one["tries"])
    assert documents["fail"]["tries"][0]["err"] == documents["fail"]["tries"][1]["err"] == text
    assert documents["cancel"]["cancel"]["reason"] == documents["waits"]["cancel"]["reason"] == text
    assert documents["key"]["tries"][0]["err"] == f"KeyError: {text!r}"
    assert documents["result"]["status"] == 4
    assert (await queue.list(kind=text))[0].kind == text
    assert list(await queue.count()) == [text]


@pytest.mark.parametrize("id_", ["$data.secret", "$$ROOT", '{"$gt": ""}', "a.b", "$"])
async def test_an_id_that_looks_like_an_expression_is_an_id(id_, queue, raw, seen):
    queue.handler("mail")(lambda job: None)
    one, other = queue.job("mail", {"secret": "s3cret"}), await queue.put("mail", delay=3600)
    one.id = id_
    await queue.put(one)
    async with queue.running("w"):
        await seen.wait("try", job=id_, outcome="success")
        await queue.retry(id_)
        await seen.wait("try", job=id_, outcome="success", count=2)
    assert (await queue.get(id_)).state == "success"
    assert (await queue.get(other.id)).state == "new"


# ---- terminals

ODD = "\x1b[31m\x1b]8;;http://evil\x07link\x1b]8;;\x07\x9b2J\x85\u202e\u2066\u200b\ufeff\ud7ff\r\b\x00[bold]b[/bold]"


def obeyed(text: str) -> set[str]:
    """What a terminal, or the eye, would obey; colours of ours are taken out first."""
    plain = re.sub(r"\x1b\[[\d;]*m", "", text)
    return {one for one in plain if unicodedata.category(one) in ("Cc", "Cf", "Cs", "Co") and one != "\n"}


@pytest.mark.parametrize("colours", [False, True])
async def test_no_command_prints_what_a_terminal_would_obey(colours, queue, raw, monkeypatch, uri, namespace):
    kind = ODD.replace("\0", "")
    date = queue.job("mail").created
    entry = {
        "runner": ODD,
        "when": date,
        "err": ODD,
        "trace": ODD,
        "outcome": ODD,
        "claimed": ODD,
        "started": date,
    }
    document = {
        "status": 5, "tries": [entry, ODD, {"err": ODD}], "created": date, "runat": date, "data": {ODD.replace("\0", ""): [ODD]},
        "retries": 1, "retryinterval": 0, "kind": kind, "cancel": {"reason": ODD}, "lease": {"owner": ODD, "claimed": ODD},
    }  # fmt: skip
    ids = [ObjectId(f"{status:024x}") for status in (1, 2, 3, 4, 5, 6, 77)]
    raw.insert_many([{"_id": id_, **document, "status": int(str(id_), 16)} for id_ in ids])
    raw.insert_one({"_id": ODD, **document, "status": 1})
    monkeypatch.setenv("STREAMJOBS_URI", uri)
    monkeypatch.setenv("STREAMJOBS_COLLECTION", namespace)
    if colours:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TERM", "xterm-256color")
    commands = [
        ["list"],
        ["list", "--json"],
        ["stats"],
        ["stats", "--json"],
        ["put", kind, "{}"],
        ["put", kind, "{}", "--json"],
    ]
    for id_ in [*map(str, ids), ODD]:
        commands += [
            ["show", id_],
            ["show", id_, "--json"],
            ["cancel", id_, "--reason", ODD],
            ["retry", id_],
            ["retry", id_, "--force"],
        ]
    commands += [
        [ODD],
        ["show", "none" + ODD],
        ["list", "--status", ODD],
        ["list", "--collection", ODD],
        ["list", "--uri", ODD],
        ["put", "a", ODD],
    ]
    for command in commands:
        done = CliRunner().invoke(app, command)
        assert done.exception is None or isinstance(done.exception, SystemExit), (command, done.exception)
        assert done.output.strip(), command
        assert not obeyed(done.output), (command, obeyed(done.output), done.output)


@pytest.mark.parametrize("name", ["try", "job.cancelled", "runner.failed", "a line of a handler's"])
def test_no_log_line_holds_what_a_terminal_would_obey(name):
    event = {
        "event": name, "level": "info", "timestamp": "2030-01-01T00:00:00Z", "kind": ODD, "job": ODD, "runner": ODD,
        "outcome": ODD, "status": ODD, "message": ODD, "error": ODD, "reason": ODD, "number": 1, "exception": ODD, ODD: ODD,
    }  # fmt: skip
    out = io.StringIO()
    Console(file=out, force_terminal=True, width=200).print(log.reading(event, runner=True))
    assert not obeyed(out.getvalue())
    assert not obeyed(log._as_json(None, "info", event))


# ---- secrets

PASSWORD = "s3cr%2Ft-w0rd"
PARTS = ("s3cr", "w0rd")


def told(error: BaseException) -> str:
    """All that an error says, with the errors behind it."""
    out, seen, todo = [], set(), [error]
    while todo:
        one = todo.pop()
        if id(one) not in seen:
            seen.add(id(one))
            out += [str(one), repr(one), repr(getattr(one, "args", ""))]
            todo += [other for other in (one.__cause__, one.__context__) if other is not None]
    return "\n".join(out)


BAD_URIS = [
    "mongodb://ann:{}@127.0.0.1:1/?w=-1", "mongodb://ann:{}@127.0.0.1:x/", "mongodb://ann:{}@", "mongo://ann:{}@h/",
    "mongodb://ann:{}@127.0.0.1:1/?retryWrites=false", "mongodb://ann:{}@127.0.0.1:1/?authMechanism=NO",
    "mongodb://ann:{}%zz@127.0.0.1:1/", "mongodb://ann:{}@h:1,/?replicaSet=", "mongodb+srv://ann:{}@h:1/",
]  # fmt: skip


@pytest.mark.parametrize("uri", BAD_URIS)
async def test_a_uri_that_cannot_work_shows_no_password_in_any_error_behind_its_own(uri, seen):
    with pytest.raises((ConfigError, BadArgument)) as caught:
        Queue(uri.format(PASSWORD), "app.jobs").sync.put("mail")
    text = told(caught.value)
    assert not any(part in text for part in PARTS), text


@pytest.mark.usefixtures("driver_litter")
async def test_a_server_that_does_not_answer_shows_no_password_anywhere(monkeypatch, seen, caplog):
    monkeypatch.setattr(clients, "COMMAND_TIMEOUT", 0.1)
    caplog.set_level(logging.DEBUG, "streamjobs")
    queue = Queue(f"mongodb://ann:{PASSWORD}@127.0.0.1:1/?appName=x", "app.jobs")
    queue.handler("mail")(print_)
    runner = queue.runner("w")
    texts = [repr(queue), str(queue), repr(queue.sync), repr(queue._source), repr(runner)]
    for call in (
        queue.put("mail"),
        queue.put_many([queue.job("mail")]),
        queue.get("x"),
        queue.list(),
        queue.count(),
        runner.run(),
    ):
        with pytest.raises((PyMongoError, ConnectError, Exception)) as caught:
            await call
        texts.append(told(caught.value))
    for call in (queue.sync.put, queue.sync.get, queue.sync.cancel):
        with pytest.raises(Exception) as caught:
            call("x")
        texts.append(told(caught.value))
    assert seen.of("runner.failed")
    texts += [str(seen.all), caplog.text]
    await queue.close()
    assert not any(part in text for part in PARTS for text in texts)


@pytest.mark.usefixtures("driver_litter")
@pytest.mark.parametrize(
    "command",
    [
        ["--help"],
        ["put", "--help"],
        ["run", "--help"],
        ["dev", "--help"],
        ["list"],
        ["stats"],
        ["show", "x"],
        ["put", "a"],
        ["indexes"],
    ],
)
def test_no_command_shows_the_password_of_the_environment(command, monkeypatch):
    monkeypatch.setenv("STREAMJOBS_URI", f"mongodb://ann:{PASSWORD}@127.0.0.1:1/")
    monkeypatch.setattr(place, "_ANSWER", 0.2)
    done = CliRunner().invoke(app, command)
    assert not any(part in done.output for part in PARTS)
    assert done.exit_code == (0 if "--help" in command else 1)


@pytest.mark.parametrize(
    "value", ["mongodb://ann:{}@h/", "mongodb://ann:{}@h" + "x" * 200, "mongodb://ann:" + "x" * 200 + "{}@h"]
)
def test_a_uri_in_the_wrong_argument_shows_no_password(value):
    uri = value.format(PASSWORD)
    for call in (lambda: Queue("app.jobs", uri), lambda: Queue([uri], "a.b"), lambda: Queue(uri.encode(), "a.b"),
                 lambda: Queue("mongodb://h/", "app.jobs").job("mail", {"a": {uri}}), lambda: Settings(poll=uri)):  # fmt: skip
        with pytest.raises((BadArgument, ConfigError)) as caught:
            call()
        assert not any(part in str(caught.value) for part in PARTS), str(caught.value)
