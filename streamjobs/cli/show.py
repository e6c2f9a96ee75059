"""How jobs look on a terminal. Whatever comes from a job is shown as it is, and obeyed by nobody.

Kinds, data, errors and reasons are written by whoever may put a job: control characters would be commands to
the terminal, and square brackets markup to rich, so all text passes :func:`safe` and is given as ``Text``.
"""

from __future__ import annotations

import json
import os
import sys
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, cast

from bson.binary import UuidRepresentation
from bson.datetime_ms import DatetimeMS
from bson.json_util import JSONMode, JSONOptions, dumps
from rich.console import Console
from rich.table import Table
from rich.text import Text

from streamjobs.indexes import INDEXES, Index
from streamjobs.job import ASAP, RUNNABLE, Job, Status, Try

_ROOMY = 120
_KIND = 24
_OTHERS = 46  # columns that id, status, tries and the gaps take
_DATE = 25
_WIDE = 200  # columns where there is no terminal: a pipe should not crop
#: Relaxed Extended JSON, in and out.
JSON = JSONOptions(
    json_mode=JSONMode.RELAXED,
    tz_aware=True,
    tzinfo=UTC,
    uuid_representation=UuidRepresentation.STANDARD,
)
STYLES = {
    "new": "cyan", "working": "yellow", "waiting": "blue", "success": "green", "failed": "red", "cancelled": "magenta",
    "failure": "red", "lost": "red", "snoozed": "blue", "interrupted": "yellow", "released": "yellow",
}  # fmt: skip


def console(*, stderr: bool = False) -> Console:
    """A console that takes no text for markup, and does not crop where nobody has a screen."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else _WIDE
    return Console(stderr=stderr, width=width, markup=False, highlight=False, emoji=False)


def safe(text: object, *, lines: bool = False) -> str:
    """A text without anything that a terminal would obey; with ``lines``, newlines and tabs stay."""
    return "".join(
        one if one.isprintable() or (lines and one in "\n\t") else _visible(one) for one in str(text)
    )


def line(*parts: tuple[object, str] | str) -> Text:
    """One line of text: plain parts, and parts with a style."""
    out = Text()
    for part in parts:
        text, style = (part, "") if isinstance(part, str) else part
        out.append(safe(text), style)
    return out


def error(problem: BaseException) -> None:
    """Say on stderr, in one line, what went wrong."""
    text = safe(" ".join(str(problem).split("\n")).strip() or type(problem).__name__)
    stream = console(stderr=True)
    stream.print(Text.assemble(("error: ", "bold red"), text), soft_wrap=True)


def as_json(value: Any) -> None:
    """Print one document of relaxed Extended JSON."""
    sys.stdout.write(dumps(value, json_options=JSON, indent=2) + "\n")


def documents(jobs: Iterable[Job]) -> list[dict[str, Any]]:
    """The jobs as they are stored."""
    return [job.to_document() for job in jobs]


def when(value: Any) -> str:
    """A date of a document: UTC, to the millisecond."""
    if isinstance(value, datetime):
        return "-" if value == ASAP else value.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]
    return "-" if value is None else f"{int(value)} ms" if isinstance(value, DatetimeMS) else repr(value)


def state(name: str) -> Text:
    """A status or outcome, in its colour."""
    return line((name, STYLES.get(name, "")))


def table(*columns: str) -> Table:
    """A plain table; a column that begins with ``>`` is of numbers."""
    one = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        number = column.startswith(">")
        whole = number or column in ("id", "status", "outcome", "runner")
        one.add_column(
            column.lstrip(">"), justify="right" if number else "left", no_wrap=whole, overflow="fold"
        )
    return one


def jobs_table(jobs: Sequence[Job], width: int) -> Table:
    """One line a job; when each was put only where there is room, its note as far as there is."""
    roomy = width >= _ROOMY
    one = table("id", "kind", "status", ">tries", *(["created (UTC)"] if roomy else []), "note")
    kinds = min(max((len(safe(job.kind)) for job in jobs), default=0), _KIND)
    room = max(_KIND, width - _OTHERS - kinds - (_DATE if roomy else 0))
    one.columns[1].max_width = kinds
    for job in jobs:
        created = [when(job.created)] if roomy else []
        note = Text(safe(_note(job)))
        note.truncate(room, overflow="ellipsis")
        one.add_row(line(str(job.id)), line(job.kind), state(job.state), str(job.number - 1), *created, note)
    return one


def _note(job: Job) -> str:
    """What an operator wants to know first: what it waits for, or why it ended."""
    last = next((entry.err for entry in reversed(job.history) if entry.err), "")
    parts: list[str] = []
    if job.status in RUNNABLE and not job.asap:
        parts.append(f"due {when(job.runat)[:19]}")
    if job.status == Status.CANCELLED:
        parts.append(_reason(job) or last)
    elif job.status != Status.SUCCESS:
        parts.append(last)
    return "; ".join(_cut(part) for part in parts if part)


def stats_table(counts: Mapping[str, Mapping[str, int]]) -> Table:
    """Kinds by statuses, with what nobody has left out."""
    known = [str(status) for status in Status if status]
    names = {name for row in counts.values() for name in row}
    columns = [name for name in known if name in names] + sorted(names - set(known))
    one = table("kind", *(f">{safe(name)}" for name in columns), ">all")
    for kind, row in counts.items():
        cells = [str(row.get(name) or "-") for name in columns]
        one.add_row(line(kind), *cells, str(sum(row.values())))
    return one


def indexes_table(absent: Sequence[Index], made: Sequence[Index]) -> Table:
    """The declared indexes: their keys, what each is for, whether it is there."""
    one = table("name", "keys", "there", "serves")
    for index in INDEXES:
        said = (
            ("made", "green")
            if index in made
            else ("missing", "red")
            if index in absent
            else ("yes", "green")
        )
        keys = ", ".join(key if way == 1 else f"{key} {way}" for key, way in index.keys)
        one.add_row(index.name, keys, line(said), index.serves)
    return one


def job_page(job: Job, out: Console) -> None:
    """All about one job: what it is, what happened to it, what will."""
    out.print(
        line((str(job.id), "bold"), "  ", (job.kind, "bold"), "  ", (job.state, STYLES.get(job.state, "")))
    )
    for name, value in _facts(job):
        out.print(line((f"  {name:<12}", "dim"), value), soft_wrap=True)
    out.print(Text("  data", "dim"))
    text = json.dumps(json.loads(dumps(job.data, json_options=JSON)), indent=2, ensure_ascii=False)
    out.print(Text(safe(_indent(text, 4), lines=True)), soft_wrap=True)
    history = job.history
    out.print(Text("  tries", "dim") if history else Text("  no tries yet", "dim"))
    number = 0
    for entry in history:
        number += entry.folded or 1
        _print_try(number, entry, out)


def _print_try(number: int, entry: Try, out: Console) -> None:
    if entry.folded:
        out.print(
            line(
                f"    {number - entry.folded + 1}-{number}  ",
                (f"{entry.folded} tries, folded into one", "dim"),
            )
        )
        return
    outcome = entry.outcome or ("failure" if entry.err is not None else "success")
    times = [("claimed", entry.claimed), ("started", entry.started), ("ended", entry.when)]
    told = "  ".join(f"{name} {when(value)}" for name, value in times if value is not None)
    ran = _ran(entry)
    parts: list[tuple[object, str] | str] = [
        f"    {number}  ",
        (outcome, STYLES.get(outcome, "")),
        "  ",
        told,
    ]
    out.print(line(*parts, f"{ran}  by ", entry.runner or "?"), soft_wrap=True)
    if entry.err and not (entry.trace or "").rstrip().endswith(entry.err):
        out.print(Text(safe(_indent(entry.err, 7), lines=True), "red"), soft_wrap=True)
    if entry.trace:
        out.print(Text(safe(_indent(entry.trace.rstrip(), 7), lines=True), "dim"), soft_wrap=True)


def _ran(entry: Try) -> str:
    if not isinstance(entry.started, datetime) or not isinstance(entry.when, datetime):
        return ""
    return f"  ran {(entry.when - entry.started).total_seconds():.3f} s"


def _facts(job: Job) -> list[tuple[str, str]]:
    out = [("created", f"{when(job.created)} UTC")]
    if not job.asap:
        out.append(("not before", f"{when(job.runat)} UTC"))
    left = max(1, job.retries)
    wait = f", {job.retryinterval / 1e9:g} s after a failure" if job.retryinterval else ""
    if job.status in (*RUNNABLE, Status.WORKING):
        out.append(("attempts", f"{left} left{wait}"))
    lease = job.extra.get("lease")
    if job.status == Status.WORKING:
        holder: Mapping[str, Any] = cast("Mapping[str, Any]", lease) if isinstance(lease, Mapping) else {}
        said = (
            f"{holder.get('owner')} since {when(holder.get('claimed'))} UTC"
            if holder
            else "nobody known (no lease)"
        )
        out.append(("held by", said))
    if job.status == Status.CANCELLED:
        out.append(("cancelled", _reason(job) or "no reason given"))
    return out


def _reason(job: Job) -> str:
    cancel = job.extra.get("cancel")
    return str(cast("Mapping[str, Any]", cancel).get("reason", "")) if isinstance(cancel, Mapping) else ""


def _visible(one: str) -> str:
    if one == "\n":
        return "\\n"
    if one == "\t":
        return "\\t"
    if unicodedata.category(one) == "Zs":
        return " "
    code = ord(one)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _cut(text: str, most: int = 100) -> str:
    first = text.strip().partition("\n")[0]
    return first if len(first) <= most else first[: most - 1] + "…"


def _indent(text: str, by: int) -> str:
    return "\n".join(" " * by + one for one in text.split("\n"))
