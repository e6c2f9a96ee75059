"""Every event: the catalogue, which is part of the API, and the one place that emits.

An event is one structured line through structlog, where the application has configured structlog; its
configuration is never touched. Where it has not, only warnings and worse are built, and go to the standard
library's logger ``streamjobs``. ``docs/events.md`` and ``docs/events.schema.json`` are made from
:data:`CATALOGUE` by ``python -m streamjobs.events``.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import structlog

from streamjobs.errors import BadArgument

Listener = Callable[[str, str, dict[str, Any]], None]

_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}

#: Fields by name: JSON type, unit or meaning. A field means the same in every event.
FIELDS: dict[str, tuple[str, str]] = {
    "runner": ("string", "the runner's name"),
    "owner": ("string", "the runner's id in leases, fresh for each run"),
    "job": ("string", "_id of the job"),
    "kind": ("string", "kind of the job"),
    "kinds": ("array", "kinds, as texts; of a put the first 100"),
    "number": ("integer", "number of the try, from 1"),
    "count": ("integer", "how many jobs"),
    "asked": ("integer", "how many were tried"),
    "source": ("string", "what told of the job: put, stream, read, timer, look"),
    "status": ("string", "the job's status after it"),
    "outcome": (
        "string",
        "success, failure, snoozed, cancelled, released, interrupted or lost",
    ),
    "error": ("string", "type of the error"),
    "message": ("string", "text of the error or reason, cut at 1,000 characters"),
    "due": ("number", "when the job was due (an ASAP job: created), ms since 1970 UTC on the server's clock"),
    "seen_ms": ("number", "ms from due to when this runner knew of it"),
    "claimed_ms": ("number", "ms from due to the reply of the claim"),
    "started_ms": ("number", "ms from due to the handler's first line; absent if it was not called"),
    "ended_ms": ("number", "ms from due to the handler's end"),
    "recorded_ms": ("number", "ms from due to the reply that recorded the outcome"),
    "offset_ms": ("number", "the server's clock minus this host's, ms, as estimated"),
    "took_ms": ("number", "ms that the call took"),
    "state": ("string", "connecting, live, gap, degraded, refused, closed"),
    "reason": ("string", "why"),
    "code": ("integer", "the server's error code"),
    "retry_in": ("number", "seconds until the next attempt"),
    "names": ("array", "names, as texts"),
    "fix": ("string", "what to do about it"),
    "held": ("integer", "jobs held at the moment"),
    "slots": ("integer", "how many jobs it holds at most"),
    "since_ms": ("number", "ms since it began"),
    "pid": ("integer", "process id"),
    "host": ("string", "host name"),
    "to": ("string", "id of the runner that is told"),
    "runners": ("integer", "live runners that listen"),
    "holds": ("integer", "slots of ids whose jobs it claims at once, of 256"),
    "watches": ("integer", "slots of ids that it looks after 50 ms later"),
    "taken": ("string", "id of the runner whose jobs were taken back"),
    "lease": ("number", "the lease, seconds"),
    "delay": ("number", "seconds asked for"),
    "stack": ("string", "where the event loop's thread is, the innermost call last"),
    "supervisor": ("string", "the supervisor's name; its runners are called that with -1, -2 and so on"),
    "processes": ("integer", "how many processes it keeps"),
    "exit": ("integer", "the exit code; minus the signal's number where one ended it"),
    "memory": ("number", "resident memory in MB (1,000,000 bytes)"),
}


@dataclass(frozen=True, slots=True)
class Event:
    """One entry of the catalogue. ``level`` is the usual one; ``levels`` are all that it may have."""

    name: str
    level: str
    when: str
    fields: tuple[str, ...]
    optional: tuple[str, ...] = ()
    levels: tuple[str, ...] = ()


_RUN = ("runner", "owner")
_PROCESS = ("supervisor", "runner")
_TRY = ("job", "kind", "number", *_RUN)

CATALOGUE: dict[str, Event] = {
    event.name: event
    for event in (
        Event("job.put", "info", "A put or put_many was acknowledged.", ("count", "kinds", "took_ms"), ("job",)),
        Event("job.retried", "info", "An operator or program made a job new again.", ("job", "status")),
        Event("job.cancelled", "info", "A waiting job was cancelled.", ("job", "status", "reason")),
        Event("job.woken", "debug", "This runner learnt of a job.", ("job", "kind", "source", *_RUN)),
        Event("wake.dropped", "info", "More jobs of these kinds were told of than are kept; they are read again.", ("kinds", *_RUN)),
        Event(
            "job.unreadable",
            "warning",
            "A document that can't be a job, or a held one that can't be freed, was met; it is left as it is. Once per process and document.",
            ("job", "reason", *_RUN),
        ),
        Event("job.passed", "debug", "A full runner passed a job on to one with a free slot.", ("job", "kind", "to", *_RUN)),
        Event("claim", "debug", "A call that claimed jobs was answered.", ("count", "asked", "took_ms", *_RUN)),
        Event("claim.unknown", "warning", "A claim got no answer; it is being settled.", ("asked", "error", "message", *_RUN)),
        Event("claim.settled", "info", "A claim without an answer was looked up.", ("count", "asked", *_RUN)),
        Event("try.started", "debug", "A handler is about to be called.", _TRY),
        Event(
            "try",
            "info",
            "A try ended and its outcome was recorded. Warning for failures and losses.",
            (*_TRY, "outcome", "status", "due", "seen_ms", "claimed_ms", "ended_ms", "recorded_ms", "offset_ms"),
            ("started_ms", "error", "message", "delay"),
            ("info", "warning"),
        ),
        Event("outcome.kept", "warning", "Outcomes could not be written; they are kept and written again.", ("count", "error", "message", *_RUN)),
        Event("outcome.lost", "error", "The outcome came after the lease was taken: it is not recorded.", _TRY, ("outcome", "reason")),
        Event("outcome.overflow", "error", "The document had no room for its try; failed with a short one.", _TRY, ("message",)),
        Event("handler.cancelled", "warning", "A running handler was cancelled.", (*_TRY, "reason")),
        Event("handler.stuck", "warning", "Stop's deadline passed and a handler still runs; it stays held.", (*_TRY, "since_ms")),
        Event("loop.blocked", "warning", "A handler blocks the event loop; the lease is renewed all the same.", (*_RUN, "since_ms"), ("job", "kind", "number")),
        Event("loop.stuck", "error", "The event loop has been blocked for max_block: health is bad, and streamjobs run exits.", (*_RUN, "since_ms", "stack"), ("job", "kind", "number")),
        Event("loop.turned", "info", "The event loop turns again.", (*_RUN, "since_ms")),
        Event("lease.registered", "info", "The runner's record was written; it may claim.", (*_RUN, "lease")),
        Event("lease.late", "warning", "A renewal failed; it is repeated. Once per outage.", (*_RUN, "error", "message")),
        Event("lease.renewed", "info", "Renewals succeed again.", _RUN),
        Event("lease.untrusted", "error", "The lease could not be renewed in time: what was held is given up.", (*_RUN, "held")),
        Event("lease.lost", "error", "The record was fenced or is gone: what was held is lost; a fresh owner registers.", (*_RUN, "held", "reason")),
        Event("lease.kept", "warning", "The record of a stopped runner could not be removed; others remove it when its lease is over.", (*_RUN, "error", "message")),
        Event("takeback", "warning", "Jobs of a runner that is gone were freed.", (*_RUN, "taken", "count", "reason")),
        Event("orphans.released", "warning", "Jobs that named this runner without its knowledge were released.", (*_RUN, "count")),
        Event(
            "stream.state",
            "info",
            "The stream's state changed. Warning for gap and degraded, error for refused.",
            (*_RUN, "state", "reason"),
            ("code", "retry_in", "since_ms"),
            ("info", "warning", "error"),
        ),
        Event(
            "slots.changed",
            "debug",
            "The fleet changed, and with it this runner's slots of ids; none where all listen to all.",
            ("runners", "kinds", "holds", "watches", *_RUN),
        ),
        Event("server.away", "warning", "A command of the runner failed; it is repeated. Once per outage.", (*_RUN, "error", "message")),
        Event("server.back", "info", "The runner's commands succeed again.", _RUN),
        Event("indexes.missing", "warning", "Declared indexes are not there.", (*_RUN, "names", "fix")),
        Event("runner.started", "info", "The runner is registered and its stream is open.", (*_RUN, "kinds", "slots", "pid", "host", "lease")),
        Event("runner.stopping", "info", "Stop was asked; no more claims.", (*_RUN, "reason", "held")),
        Event("runner.stopped", "info", "The runner has stopped.", (*_RUN, "held", "took_ms")),
        Event("runner.cut", "warning", "Two seconds after the stop's deadline the process was ended with code 1: a handler blocked its loop, or had left work in a thread.", (*_RUN, "reason")),
        Event("runner.failed", "error", "The runner stopped because of an error of its own.", (*_RUN, "error", "message")),
        Event("supervisor.started", "info", "A supervisor begins to start its processes.", ("supervisor", "processes", "pid", "host")),
        Event("supervisor.stopping", "info", "The supervisor stops its processes.", ("supervisor", "reason")),
        Event("supervisor.stopped", "info", "All processes have ended.", ("supervisor", "exit", "took_ms")),
        Event("supervisor.failed", "error", "Processes can't be started: the supervisor gives up.", ("supervisor", "runner", "reason")),
        Event("process.started", "info", "A process was started; `runner.started` follows when its runner is ready.", (*_PROCESS, "pid")),
        Event(
            "process.ended",
            "info",
            "A process ended. Warning unless it was asked to and did in order.",
            (*_PROCESS, "pid", "exit", "reason", "since_ms"),
            ("retry_in",),
            ("info", "warning"),
        ),
        Event("process.recycled", "info", "A process has reached a limit: it is stopped in order and replaced.", (*_PROCESS, "pid", "reason"), ("count", "memory")),
        Event("listener.failed", "error", "A function given to subscribe() raised.", ("error", "message")),
    )
}  # fmt: skip

_listeners: list[tuple[Listener, int]] = []  # with the least level that each wants
_logger: Any = structlog.get_logger("streamjobs")
_stdlib = logging.getLogger("streamjobs")


def wanted(level: str) -> bool:
    """Whether anyone would see an event of this level: ask before building one in a hot path."""
    number = _LEVELS[level]
    if any(number >= least for _, least in _listeners):
        return True
    if not structlog.is_configured():
        return number >= logging.WARNING and _stdlib.isEnabledFor(number)
    try:
        bound = _logger.bind()
    except Exception:  # noqa: BLE001 - a configuration that can't work harms nothing: emit will say so
        return True
    ask = getattr(bound, "is_enabled_for", None) or getattr(bound, "isEnabledFor", None)
    return True if ask is None else bool(ask(number))


def emit(name: str, *, level: str | None = None, **fields: Any) -> None:
    """Emit an event of the catalogue, if anyone wants it; fields that are None are left out."""
    level = level or CATALOGUE[name].level
    if wanted(level):
        emit_wanted(name, level=level, **fields)


def emit_wanted(name: str, *, level: str | None = None, **fields: Any) -> None:
    """Emit an event that somebody wants: :func:`wanted` was asked before it was built."""
    level = level or CATALOGUE[name].level
    told = {key: _plain(key, value) for key, value in fields.items() if value is not None}
    for listener, least in tuple(_listeners):
        if _LEVELS[level] < least:
            continue
        try:
            listener(name, level, dict(told))
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001 - a listener may harm nothing, nor end a thread by sys.exit()
            _log("listener.failed", "error", about(error))
    _log(name, level, told)


def _log(name: str, level: str, told: dict[str, Any]) -> None:
    try:
        _write(name, level, told)
    except Exception:  # noqa: BLE001 - a full disk behind the application's logging may harm nothing
        with suppress(Exception):
            _stdlib.warning("the event %s could not be logged", name, exc_info=True)


def _write(name: str, level: str, told: dict[str, Any]) -> None:
    if structlog.is_configured():
        if "message" in told and _message_is_taken():
            told = {"error_message" if key == "message" else key: value for key, value in told.items()}
        getattr(_logger, level)(name, **told)
    elif _LEVELS[level] >= logging.WARNING:
        _stdlib.log(
            _LEVELS[level], "%s %s", name, " ".join(f"{key}={value!r}" for key, value in told.items())
        )


def _message_is_taken() -> bool:
    """Whether the application's processors give ``message`` to an event's name, over ours or with an error."""
    lib = structlog.stdlib
    taking = (lib.render_to_log_kwargs, getattr(lib, "render_to_log_args_and_kwargs", None))
    return any(
        getattr(one, "to", None) == "message" or any(one is each for each in taking)
        for one in structlog.get_config()["processors"]
    )


def _plain(name: str, value: Any) -> Any:
    """A value as the JSON type that its field has."""
    kind = FIELDS[name][0]
    if kind == "array":
        return [str(item) for item in value]
    if kind == "string":
        return str(value)
    return int(value) if kind == "integer" else round(float(value), 3)


def about(error: BaseException) -> dict[str, str]:
    """The fields ``error`` and ``message`` of an exception."""
    try:
        text = str(error)
    except BaseException as inner:  # noqa: BLE001 - any class may be an error
        text = f"(its text can't be made: {type(inner).__name__})"
    return {"error": type(error).__name__[:200], "message": printable(text[:1000])}


def printable(text: str) -> str:
    """A text without lone surrogates, which no log could encode."""
    return text.encode("utf-8", "replace").decode("utf-8")


@contextmanager
def subscribe(listener: Listener, *, level: str = "debug") -> Generator[None, None, None]:
    """Call ``listener(name, level, fields)`` for every event of this level or above while the context is open.

    Called where the event happens, in the event loop or a thread: be quick, and do not block. Events that nobody
    wants are not even built, so ask for no lower level than you need.

    Args:
        listener: what to call.
        level: debug, info, warning or error.

    Raises:
        BadArgument: there is no such level.

    """
    if not callable(listener):
        raise BadArgument("listener", listener, "give a function (name, level, fields)")
    if level not in _LEVELS:
        raise BadArgument("level", level, f"give one of {', '.join(_LEVELS)}")
    entry = (listener, _LEVELS[level])
    _listeners.append(entry)
    try:
        yield
    finally:
        _listeners.remove(entry)


def job_logger(**bound: Any) -> Any:
    """What a handler gets as ``job.log``: structlog where configured, else the stdlib logger ``streamjobs.job``."""
    if structlog.is_configured():
        return structlog.get_logger("streamjobs.job").bind(**bound)
    return structlog.wrap_logger(
        logging.getLogger("streamjobs.job"),
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.processors.KeyValueRenderer(key_order=["event"]),
        ],
        wrapper_class=structlog.stdlib.BoundLogger,
    ).bind(**bound)


def schema() -> dict[str, Any]:
    """The JSON Schema of an event as a JSON line of the command line's ``--log json``."""

    def one(event: Event) -> dict[str, Any]:
        names = ("event", "level", "timestamp", *event.fields)
        properties: dict[str, Any] = {
            "event": {"const": event.name},
            "level": {"enum": list(event.levels or (event.level,))},
            "timestamp": {"type": "string", "format": "date-time"},
        }
        for name in (*event.fields, *event.optional):
            kind, text = FIELDS[name]
            properties[name] = {"type": kind, "description": text}
        return {
            "title": event.name,
            "description": event.when,
            "type": "object",
            "properties": properties,
            "required": list(names),
            "additionalProperties": False,
        }

    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "streamjobs event",
        "oneOf": [one(event) for event in CATALOGUE.values()],
    }


def page() -> str:
    """The catalogue as Markdown."""
    lines = [
        "# Events",
        "",
        "Made from `streamjobs/events.py` by `python -m streamjobs.events`; names, fields and units are frozen.",
        "Every event also has `event` (its name), `level` and, on the command line, `timestamp` (UTC, ISO 8601).",
        "[`events.schema.json`](events.schema.json) is the same as a JSON Schema. Where the application's structlog gives",
        '`message` to an event\'s name (`EventRenamer("message")` or `render_to_log_kwargs` among its processors; those of a',
        "`ProcessorFormatter` are not looked at), our field is `error_message`.",
        "",
        "| event | level | when | fields |",
        "|---|---|---|---|",
    ]
    for event in CATALOGUE.values():
        told = ", ".join([f"`{name}`" for name in event.fields] + [f"(`{name}`)" for name in event.optional])
        lines.append(
            f"| `{event.name}` | {' or '.join(event.levels or (event.level,))} | {event.when} | {told} |"
        )
    lines += ["", "Fields in brackets may be absent.", "", "| field | type | meaning |", "|---|---|---|"]
    lines += [f"| `{name}` | {kind} | {text} |" for name, (kind, text) in FIELDS.items()]
    return "\n".join(lines) + "\n"


def _write_docs() -> None:
    from pathlib import Path  # noqa: PLC0415 - only when run as a script

    docs = Path(__file__).parent.parent / "docs"
    (docs / "events.md").write_text(page(), encoding="utf-8")
    (docs / "events.schema.json").write_text(json.dumps(schema(), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    _write_docs()
