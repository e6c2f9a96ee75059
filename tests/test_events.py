"""The catalogue is what is emitted, and what is documented; and nobody else's logging is touched."""

from __future__ import annotations

import ast
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import structlog

import streamjobs
from streamjobs import events
from streamjobs.errors import BadArgument
from streamjobs.events import CATALOGUE, FIELDS, emit, subscribe, wanted
from tests.conftest import check_event

ROOT = Path(streamjobs.__file__).parent
DOCS = ROOT.parent / "docs"


@pytest.fixture
def seen():
    """Instead of the one that listens to every test: here nobody listens unless the test says so."""


@pytest.fixture
def configured():
    """structlog as an application would configure it; what it was told, in order."""
    told: list[dict[str, Any]] = []

    def keep(_logger: Any, method: str, event: dict[str, Any]) -> Any:
        told.append({"level": method, **event})
        raise structlog.DropEvent

    def configure(level: int = 0, **more: Any) -> list[dict[str, Any]]:
        structlog.configure(
            processors=[structlog.contextvars.merge_contextvars, keep],
            wrapper_class=structlog.make_filtering_bound_logger(level),
            **more,
        )
        return told

    yield configure
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


# ---- the catalogue


def test_the_documents_are_what_the_catalogue_generates():
    assert (DOCS / "events.md").read_text(encoding="utf-8") == events.page()
    assert json.loads((DOCS / "events.schema.json").read_text(encoding="utf-8")) == events.schema()


def emitted() -> list[tuple[str, str, set[str], bool]]:
    """(place, event, keyword fields, whether more come by ** or a caller) of every emit() and emit_wanted() in the source."""
    out: list[tuple[str, str, set[str], bool]] = []
    for path in sorted(ROOT.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        ours = {"emit", "emit_wanted"}
        passing = ours | ({"_log"} if path.name == "events.py" else set())
        for function in ast.walk(tree):  # one that passes its parameter on is read at its callers
            if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)) and function.name not in passing:
                parameters = {one.arg for one in function.args.args}
                if any(_called(node) in ours and _first(node) in parameters for node in ast.walk(function)):
                    passing.add(function.name)
        for node in ast.walk(tree):
            name = _first(node, constant=True) if _called(node) in passing else None
            if name is not None:
                fields = {one.arg for one in node.keywords if one.arg is not None}
                more = any(one.arg is None for one in node.keywords) or _called(node) not in ours
                out.append((f"{path.name}:{node.lineno}", name, fields, more))
    return out


def _called(node: ast.AST) -> str | None:
    if not isinstance(node, ast.Call):
        return None
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)


def _first(node: Any, *, constant: bool = False) -> Any:
    if not node.args:
        return None
    return getattr(node.args[0], "value" if constant else "id", None)


def test_every_event_that_is_emitted_is_in_the_catalogue_and_every_one_there_is_emitted():
    assert {name for _, name, _, _ in emitted()} == set(CATALOGUE)


def test_every_field_that_is_emitted_is_one_of_the_events():
    for place, name, fields, _ in emitted():
        event = CATALOGUE[name]
        assert fields - {"level"} <= {*event.fields, *event.optional}, place


def test_every_field_that_an_event_must_have_is_given_where_all_are_written_out():
    for place, name, fields, more in emitted():
        if not more and name != "listener.failed":
            assert fields >= set(CATALOGUE[name].fields), place


def test_the_catalogue_uses_known_fields_and_levels_and_every_field_is_used():
    used = set()
    for name, event in CATALOGUE.items():
        assert event.name == name
        assert event.level in {"debug", "info", "warning", "error"}
        assert set(event.levels) <= {"debug", "info", "warning", "error"}
        assert not event.levels or event.level in event.levels
        assert not set(event.fields) & set(event.optional)
        assert event.when.endswith(".")
        used |= {*event.fields, *event.optional}
    assert used == set(FIELDS)


# ---- without structlog


SOME = {"string": "text", "integer": 1, "number": 1.5, "array": ["text"]}


def every() -> None:
    for name, event in CATALOGUE.items():
        emit(name, **{field: SOME[FIELDS[field][0]] for field in event.fields})


def test_without_structlog_only_warnings_and_worse_go_to_the_stdlib_logger_and_nothing_to_stdout(
    caplog, capsys
):
    assert not structlog.is_configured()
    caplog.set_level(logging.DEBUG)
    every()
    wrong = {name for name, event in CATALOGUE.items() if event.level in ("warning", "error")}
    assert {one.getMessage().split()[0] for one in caplog.records} == wrong
    assert {one.name for one in caplog.records} == {"streamjobs"}
    for one in caplog.records:
        assert one.levelname.lower() == CATALOGUE[one.getMessage().split()[0]].level
    assert capsys.readouterr() == ("", "")


def test_a_record_of_the_stdlib_logger_shows_the_fields_and_survives_what_looks_like_a_format(caplog):
    emit("server.away", runner="100%s %(x)s", owner="o", error="E", message="line\nbreak")
    (record,) = caplog.records
    assert (
        record.getMessage() == "server.away runner='100%s %(x)s' owner='o' error='E' message='line\\nbreak'"
    )


def test_the_applications_level_for_the_stdlib_logger_counts(caplog):
    caplog.set_level(logging.CRITICAL, logger="streamjobs")
    assert not wanted("error")
    every()
    assert not caplog.records


def test_fields_of_an_event_that_nobody_wants_are_not_built(configured):
    class Costly:
        def __str__(self):
            raise AssertionError("built")

    for level in ("debug", "info"):
        assert not wanted(level)
    emit("claim", count=Costly(), runner=Costly())
    emit("job.put", kinds=[Costly()])
    configured(logging.ERROR)
    emit("server.away", runner=Costly())


@pytest.mark.parametrize("level", [0, 10, 20, 30, 40])
def test_what_structlogs_filter_lets_through_is_wanted(level, configured):
    told = configured(level)
    numbers = {"debug": 10, "info": 20, "warning": 30, "error": 40}
    assert {name for name in numbers if wanted(name)} == {
        name for name, one in numbers.items() if one >= level
    }
    every()
    assert [one["event"] for one in told] == [
        name for name, event in CATALOGUE.items() if numbers[event.level] >= level
    ]


# ---- with structlog


def test_with_structlog_events_arrive_as_structure_and_its_configuration_is_untouched(
    configured, caplog, capsys
):
    told = configured()
    before = structlog.get_config()
    structlog.contextvars.bind_contextvars(request="r1")
    emit("job.put", count=2, kinds=["b", "a"], job=None, took_ms=1.23456)
    emit("try", level="warning", job=5, number=1, due=1.0)
    assert told == [
        {
            "level": "info",
            "event": "job.put",
            "count": 2,
            "kinds": ["b", "a"],
            "took_ms": 1.235,
            "request": "r1",
        },
        {"level": "warning", "event": "try", "job": "5", "number": 1, "due": 1.0, "request": "r1"},
    ]
    assert structlog.get_config() == before
    assert not caplog.records
    assert capsys.readouterr() == ("", "")


def test_structlog_over_the_stdlib_is_asked_for_its_level(configured, caplog):
    told = configured()
    structlog.configure(
        processors=structlog.get_config()["processors"],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
    )
    caplog.set_level(logging.WARNING)
    assert not wanted("info")
    assert wanted("warning")
    emit("job.put", count=1)
    emit("server.away", runner="r")
    # BoundLogger hands all that it is told to the processors; what is not wanted was not told
    assert [one["event"] for one in told] == ["server.away"]


def test_importing_and_using_the_package_configures_no_logging_and_prints_nothing():
    code = """
import logging, structlog, streamjobs
from streamjobs import events
for name, event in events.CATALOGUE.items():
    if event.level in ("debug", "info"):
        events.emit(name, count=1)
assert not structlog.is_configured()
assert logging.getLogger().handlers == [] and logging.getLogger("streamjobs").handlers == []
assert logging.getLogger("streamjobs").level == logging.NOTSET
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_job_log_is_structlog_where_configured_and_the_stdlib_elsewhere(configured, caplog):
    caplog.set_level(logging.INFO)
    events.job_logger(job="j1").info("told", n=5)
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("streamjobs.job", "INFO")
    assert "event='told'" in record.getMessage()
    assert "job='j1'" in record.getMessage()
    told = configured()
    events.job_logger(job="j1").info("told", n=5)
    assert told == [{"level": "info", "event": "told", "job": "j1", "n": 5}]


# ---- listeners


def test_a_listener_gets_every_event_with_plain_fields_of_its_own():
    told: list[Any] = []
    first: list[Any] = []

    def spoil(name, level, fields):
        first.append(dict(fields))
        fields.clear()

    with subscribe(spoil), subscribe(lambda *event: told.append(event)):
        emit("job.put", count=2.0, kinds={"a"}, job=object, took_ms=0.12345)
    emit("job.put", count=2)
    ((name, level, fields),) = told
    assert (name, level) == ("job.put", "info")
    assert fields == first[0] == {"count": 2, "kinds": ["a"], "job": str(object), "took_ms": 0.123}


def test_a_listener_that_raises_harms_nothing_and_is_told_of(caplog):
    told: list[str] = []

    def bad(name, level, fields):
        raise RuntimeError("no")

    with subscribe(bad), subscribe(lambda name, level, fields: told.append(name)):
        emit("job.put", count=1, kinds=[], took_ms=0.0)
        emit("server.back", runner="r", owner="o")
    assert told == ["job.put", "server.back"]
    assert [one.getMessage() for one in caplog.records] == [
        "listener.failed error='RuntimeError' message='no'"
    ] * 2


def test_a_listener_hears_until_its_context_is_left_also_by_an_error():
    told: list[str] = []

    def keep(name, level, fields):
        told.append(name)

    def fail():
        emit("job.put", count=1)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), subscribe(keep), subscribe(keep):
        fail()
    emit("job.put", count=1)
    assert told == ["job.put"] * 2
    assert not wanted("info")


def test_a_listener_hears_from_its_level_on_and_what_nobody_wants_is_not_built():
    told: list[str] = []
    with subscribe(lambda name, level, fields: told.append(name), level="warning"):
        emit("job.put", count=1, kinds=[], took_ms=0.0)
        emit("lease.late", runner="r", owner="o", error="e", message="m")
    assert told == ["lease.late"]
    with subscribe(print, level="info"):
        assert wanted("info")
        assert not wanted("debug")
    with pytest.raises(BadArgument, match="debug, info, warning, error"), subscribe(print, level="loud"):
        pass


async def test_a_listener_that_raises_does_not_harm_a_put(queue, raw, caplog):
    def bad(name, level, fields):
        raise RuntimeError("no")

    with subscribe(bad):
        job = await queue.put("mail")
    assert raw.find_one()["_id"] == job.id
    assert "listener.failed" in caplog.text


# ---- values


def test_a_text_without_lone_surrogates_is_printable_and_errors_are_cut():
    assert events.printable("a\udc80b") == "a?b"
    about = events.about(ValueError("\ud800" + "x" * 5_000))
    assert about["error"] == "ValueError"
    assert len(about["message"]) == 1_000
    json.dumps(about).encode("utf-8")


def test_the_schema_refuses_what_an_event_does_not_have():
    good = {"count": 1, "kinds": ["a"], "took_ms": 1.5}
    check_event("job.put", "info", good)
    for bad in ({**good, "x": 1}, {"count": 1}, {**good, "count": "1"}, {**good, "kinds": "a"}):
        with pytest.raises(Exception, match=r"."):
            check_event("job.put", "info", bad)
    with pytest.raises(Exception, match=r"."):
        check_event("job.put", "error", good)
