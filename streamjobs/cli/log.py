"""Events and handlers' log lines on stderr: JSON lines for machines, readable ones for people."""

from __future__ import annotations

import enum
import json
import logging
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import datetime
from typing import Any, TextIO, cast

import structlog
from rich.text import Text

from streamjobs.cli import show

_LEVELS = {"debug": "dim", "info": "", "warning": "yellow", "error": "red", "critical": "bold red"}
_LOCK = threading.Lock()  # of stderr: lines are written whole
_HEAD = ("event", "level", "timestamp")
#: Not worth a reader's line: said elsewhere in it, or only of use to a program.
_QUIET = {
    *_HEAD,
    "logger",
    "owner",
    "runner",
    "job",
    "kind",
    "kinds",
    "try",
    "number",
    "due",
    "offset_ms",
    "exception",
}


#: What every record of logging has, or structlog's own call; the rest is the caller's ``extra``.
_RECORD = {*vars(logging.makeLogRecord({})), "message", "asctime", *_HEAD, "self", "method_name"}


class Form(enum.StrEnum):
    """What stderr gets."""

    AUTO = "auto"
    JSON = "json"
    TEXT = "text"

    @property
    def is_json(self) -> bool:
        """Whether it is JSON lines; ``auto`` is text on a terminal."""
        return self is Form.JSON or (self is Form.AUTO and not sys.stderr.isatty())


def configure(form: Form, *, debug: bool = False) -> None:
    """Send events and log lines to stderr, unless the application has configured structlog or logging itself."""
    render = _as_json if form.is_json else _as_text
    ours = not structlog.is_configured()
    if ours:
        structlog.configure(
            processors=[
                structlog.contextvars.merge_contextvars,
                structlog.processors.add_log_level,
                _name_logger,
                structlog.processors.TimeStamper(fmt="iso", utc=True),
                structlog.processors.StackInfoRenderer(),
                structlog.processors.format_exc_info,
                render,
            ],
            wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG if debug else logging.INFO),
            logger_factory=_Factory(sys.stderr),
            cache_logger_on_first_use=True,
        )
    root = logging.getLogger()
    if not root.handlers:
        # the application's structlog may write to this logger: a bridge would hand each line back to it, for ever
        root.addHandler(_Bridge() if ours else logging.StreamHandler(sys.stderr))
        root.setLevel(logging.INFO)
        logging.captureWarnings(capture=True)


def reading(event: Mapping[str, Any], *, runner: bool = False) -> Text:
    """An event as a line for people: time, event, kind, job, what; with ``runner``, whose it is."""
    level = str(event.get("level", "info"))
    parts: list[tuple[object, str] | str] = [(_clock(event.get("timestamp")), "dim"), " "]
    if runner:
        parts += [(f"{event.get('runner', '-'):<9}", "dim"), " "]
    parts += [(f"{event.get('event', '')!s:<16}", _LEVELS.get(level) or "bold"), " "]
    kinds = event.get("kinds")
    kind = event.get("kind") or (" ".join(map(str, kinds)) if isinstance(kinds, list) else "")  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
    if kind:
        parts += [(kind, "cyan"), " "]
    if event.get("job"):
        parts += [(f"…{str(event['job'])[-6:]}", "dim"), " "]
    own = "logger" not in event  # a handler may name its line as it likes
    parts += _try(event) if own and event.get("event") == "try" and "outcome" in event else _rest(event)
    text = show.line(*parts)
    text.rstrip()
    if event.get("exception"):
        text.append("\n" + show.safe(event["exception"], lines=True), "dim")
    return text


def pass_on(line: bytes) -> None:
    """Write a line of another process to stderr as it is; it ends with a newline."""
    with _LOCK, suppress(OSError, ValueError):
        sys.stderr.buffer.write(line)
        sys.stderr.buffer.flush()


def pass_on_as_text(line: bytes) -> None:
    """The same, with an event as a line for people that names its runner."""
    event = parse(line)
    if event is not None:
        with suppress(Exception):  # not ours after all: it looks like an event, and is passed on as it is
            line = (_rendered(event, runner=True) + "\n").encode("utf-8", "backslashreplace")
    pass_on(line)


def parse(line: bytes) -> dict[str, Any] | None:
    """The event of a JSON line; None if it is something else."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return cast("dict[str, Any]", event) if isinstance(event, dict) and "event" in event else None


def _try(event: Mapping[str, Any]) -> list[tuple[object, str] | str]:
    """How a try went: its number, outcome, times and error."""
    outcome, status = str(event["outcome"]), str(event.get("status", ""))
    parts: list[tuple[object, str] | str] = [
        f"try {event.get('number')} ",
        (outcome, show.STYLES.get(outcome, "")),
    ]
    if status not in (outcome, ""):
        parts += [" → ", (status, show.STYLES.get(status, ""))]
    started, ended = event.get("started_ms"), event.get("ended_ms")
    if isinstance(started, (int, float)) and isinstance(ended, (int, float)):
        parts.append((f"  started {_span(started)} after due, ran {_span(ended - started)}", "dim"))
    if event.get("delay") is not None:
        parts.append(f"  again in {event['delay']:g} s")
    if event.get("message"):
        name = f"{event['error']}: " if event.get("error") else ""
        parts += ["  ", (f"{name}{event['message']}", "yellow")]
    return parts


def _rest(event: Mapping[str, Any]) -> list[tuple[object, str] | str]:
    parts: list[tuple[object, str] | str] = []
    for key, value in event.items():
        if key not in _QUIET:
            parts += [(f"{key}=", "dim"), f"{value} "]
    return parts


def _span(ms: float) -> str:
    return f"{ms:.1f} ms" if abs(ms) < 1000 else f"{ms / 1000:.2f} s"


def _clock(stamp: Any) -> str:
    try:
        return datetime.fromisoformat(str(stamp)).astimezone().strftime("%H:%M:%S.%f")[:-3]
    except ValueError:
        return "--:--:--.---"


def _as_json(_logger: Any, _method: str, event: Any) -> str:
    line = {**{key: event.get(key) for key in _HEAD}, **event}
    try:
        return json.dumps(line, default=str, allow_nan=False)
    except Exception:  # noqa: BLE001 - a handler's values; its job may not fail for its log
        return json.dumps({str(key): _plain(value) for key, value in line.items()})


def _plain(value: Any) -> Any:
    if isinstance(value, (str, int)) or value is None:
        return value
    try:
        return repr(value)
    except Exception:  # noqa: BLE001 - as above
        return f"({type(value).__name__})"


def _as_text(logger: Any, method: str, event: Any) -> str:
    try:
        return _rendered(event)
    except Exception:  # noqa: BLE001 - a handler's values; its job may not fail for its log
        return _as_json(logger, method, event)


def _rendered(event: Mapping[str, Any], *, runner: bool = False) -> str:
    out = show.console(stderr=True)
    with out.capture() as captured:
        out.print(reading(event, runner=runner), soft_wrap=True, end="")
    return captured.get()


def _name_logger(logger: Any, _method: str, event: Any) -> Any:
    # tells a handler's line from an event
    if logger.name is not None:
        event["logger"] = logger.name
    return event


class _Lines:
    """A structlog logger that writes whole lines; nobody's job fails because nobody reads them."""

    def __init__(self, stream: TextIO, name: str | None) -> None:
        self._stream = stream
        self.name = name

    def write(self, text: str) -> None:
        """Write a line."""
        with _LOCK:
            try:
                self._stream.write(text + "\n")
                self._stream.flush()
            except (OSError, ValueError):
                pass

    debug = info = warning = warn = error = err = critical = fatal = exception = failure = log = msg = write


class _Factory:
    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __call__(self, name: str | None = None, *_: Any) -> _Lines:
        return _Lines(self._stream, None if name == "streamjobs" else name)


class _Bridge(logging.Handler):
    """The standard library's log lines, in the same form."""

    def emit(self, record: logging.LogRecord) -> None:
        """Hand a record to structlog."""
        try:
            logger: Any = structlog.get_logger(record.name)
            write: Callable[..., Any] = logger.log
            # structlog knows only the standard levels
            level = min(max(record.levelno // 10 * 10, logging.DEBUG), logging.CRITICAL)
            more = {str(key): value for key, value in vars(record).items() if key not in _RECORD}
            if record.stack_info:
                more["stack"] = record.stack_info
            write(level, record.getMessage(), exc_info=record.exc_info or None, **more)
        except Exception:  # noqa: BLE001 - logging's own rule: an error of logging is not the program's
            self.handleError(record)
