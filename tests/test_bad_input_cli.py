"""Every argument and option of the command line, and every environment variable, with texts that can't be meant."""

from __future__ import annotations

import functools
import re
from typing import Any

import pytest
from bson import json_util
from click.testing import CliRunner
from typer.main import get_command

from streamjobs import ConnectError, SyncQueue
from streamjobs.cli import app, place, running
from tests.command import APP

#: What a shell may hand over; it can hold no NUL.
TEXTS = {
    "empty": "",
    "blank": "  ",
    "a word": "mail",
    "a word with a colon": "mail:jobs",
    "a dotted word": "a.b",
    "an operator": '{"$gt": ""}',
    "a field": "$data.secret",
    "a variable": "$$ROOT",
    "a colour": "\x1b[31mred\x1b]8;;http://x\x07",
    "a line": "one\ntwo",
    "other bytes": "\udcff\udcfe",
    "a lone surrogate": "\ud800",
    "reversed": "\u202eabc",
    "markup": "[bold]b[/bold]",
    "very long": "x" * 5_000,
    "0": "0",
    "1": "1",
    "-1": "-1",
    "a half": "0.5",
    "a huge number": "9" * 400,
    "2**63": str(2**63),
    "nan": "nan",
    "inf": "inf",
    "-inf": "-inf",
    "1e999": "1e999",
    "hex": "0x10",
    "other digits": "٣",
    "yes": "true",
    "a day": "2030-01-01",
    "no zone": "2030-01-01T00:00:00",
    "a moment": "2030-01-01T00:00:00Z",
    "after the last": "9999-12-31T23:59:59-05:00",
    "before the first": "0001-01-01T00:00:00+05:00",
    "a span": "5m",
    "a list": "[1]",
    "an object": "{}",
    "half an object": '{"a": ',
    "deep": '{"a":' * 2000,
    "a wrong id": '{"$oid": "x"}',
    "a wrong date": '{"a": {"$date": {"$numberLong": "99999999999999999999999"}}}',
    "a wrong binary": '{"a": {"$binary": 5}}',
    "a wrong regex": '{"a": {"$regularExpression": 5}}',
    "a wrong uuid": '{"a": {"$uuid": "x"}}',
    "a wrong decimal": '{"a": {"$numberDecimal": "x"}}',
    "a wrong long": '{"a": {"$numberLong": "x"}}',
    "a wrong timestamp": '{"a": {"$timestamp": {"t": -1, "i": "x"}}}',
    "a reference": '{"$ref": "a", "$id": 1}',
    "a path": "/nowhere/at/all",
    "a URI": "mongodb://user:s3cret@",
    "a URI with a bad option": "mongodb://user:s3cret@127.0.0.1:1/?w=x",
    "a URI with a bad escape": "mongodb://user:s3%zzcret@127.0.0.1:1/",
    "an option": "--help-me",
    "the end of options": "--",
}

COMMAND = get_command(app)  # made once: it takes longer than most of what it then refuses
NOWHERE = "mongodb://user:s3cret@127.0.0.1:1/?serverSelectionTimeoutMS=20"
RUN = ["run", "app:jobs", "--log", "text", "--uri", NOWHERE]
#: Where a text goes (as V). What is asked of a server is asked of a real one; runners find none.
PLACES: dict[str, list[str]] = {
    "put KIND": ["put", "V"],
    "put JSON": ["put", "mail", "V"],
    **{f"put {name}": ["put", "mail", name, "V"] for name in ("--at", "--in", "--retries", "--retry-interval")},
    **{f"list {name}": ["list", name, "V"] for name in ("--kind", "--status", "--limit", "--uri", "--collection", "--app")},
    "put --collection": ["put", "mail", "--collection", "V"],
    "show ID": ["show", "V"],
    "retry ID": ["retry", "V"],
    "cancel ID": ["cancel", "V"],
    "cancel --reason": ["cancel", "0123456789abcdef01234567", "--reason", "V"],
    "stats --uri": ["stats", "--uri", "V"],
    "indexes --collection": ["indexes", "--collection", "V"],
    "run TARGET": ["run", "V", "--uri", NOWHERE],
    **{
        f"run {name}": [*RUN, name, "V"]
        for name in ("--name", "--concurrency", "--stop-deadline", "--interval", "--poll", "--lease", "--beat",
                     "--margin", "--health-file", "--log", "--collection")
    },
    "run --uri": ["run", "app:jobs", "--log", "text", "--uri", "V"],
    "dev TARGET": ["dev", "V"],
    "dev --port": ["dev", "app:number", "--port", "V"],
    "dev --collection": ["dev", "app:number", "--collection", "V"],
    "dev --concurrency": ["dev", "app:number", "--concurrency", "V"],
    "a command": ["V"],
}  # fmt: skip
#: Environment variables, and a command that reads them.
VARIABLES: dict[str, list[str]] = {
    "STREAMJOBS_URI": ["list"],
    "STREAMJOBS_COLLECTION": ["list"],
    "STREAMJOBS_SERVER": ["dev", "app:jobs"],
}


def reached(*_: Any, **__: Any) -> None:
    """Instead of a runner that runs until it is stopped."""
    raise ConnectError("all was taken")


@pytest.fixture
def here(tmp_path, monkeypatch, uri, namespace):
    (tmp_path / "app.py").write_text(APP)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(running.log, "configure", lambda *_, **__: None)
    monkeypatch.setattr(running, "serve", reached)
    monkeypatch.setattr(place, "_ANSWER", 0.3)
    monkeypatch.setattr(
        SyncQueue, "close", lambda _: None
    )  # one connection for all commands on the real server
    monkeypatch.setattr(place, "choose", kept := functools.cache(place.choose))
    kept(uri, namespace, None)
    monkeypatch.setenv("STREAMJOBS_URI", uri)
    monkeypatch.setenv("STREAMJOBS_COLLECTION", namespace)
    yield tmp_path
    kept(uri, namespace, None).sync._source.close_sync()


def tell(command: list[str], **env: str) -> Any:
    """Run a command in this process, and hold what it says against what every command must hold."""
    done = CliRunner().invoke(COMMAND, command, env=env)
    text = done.output
    assert done.exception is None or isinstance(done.exception, SystemExit), (command, done.exc_info)
    assert done.exit_code in (0, 1, 2, 3, 4), command
    assert "Traceback" not in text, text
    if command[0] != "put" or done.exit_code:  # a kind is shown
        assert not re.search("s3cret|s3%|zzcret", text), text
    assert not set(text) & {"\x1b", "\x07", "\u202e", "\x9b"}, (command, text)
    if done.exit_code:
        assert text.strip(), command
        assert len(text) < 1_500, (command, len(text), text[:300])
    return done


@pytest.mark.usefixtures("driver_litter")
@pytest.mark.parametrize("where", PLACES)
def test_a_text_in_any_place_works_or_is_refused_in_a_few_words(where, here, raw):
    codes = {}
    for name, text in TEXTS.items():
        codes[name] = tell([text if word == "V" else word for word in PLACES[where]]).exit_code
    assert len(codes) == len(TEXTS)
    if where.startswith("put") and "collection" not in where:
        written = raw.count_documents({})
        assert written == sum(code == 0 for code in codes.values())
    else:
        assert raw.count_documents({}) == 0


@pytest.mark.usefixtures("driver_litter")
@pytest.mark.parametrize("variable", VARIABLES)
def test_a_text_in_any_variable_works_or_is_refused_in_a_few_words(variable, here):
    for name, text in TEXTS.items():
        if name == "a lone surrogate":  # no environment can hold it
            continue
        code = tell(VARIABLES[variable], **{variable: text}).exit_code
        assert code in (0, 1, 2), name


def test_what_put_took_is_what_is_there(here, raw):
    for name, text in TEXTS.items():
        done = tell(["put", "mail", json_util.dumps({"text": text})])
        if name in ("a lone surrogate", "other bytes"):
            assert done.exit_code == 2
        else:
            assert done.exit_code == 0, (name, done.output)
            assert raw.find_one_and_delete({})["data"] == {"text": text}
