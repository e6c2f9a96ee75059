"""Doctor: what is wrong with a deployment, line by line, each with its fix."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from streamjobs.cli import place, show
from streamjobs.doctor import Finding, Level, examine, worst
from streamjobs.settings import Settings

_STYLES = {Level.OK: "green", Level.SKIP: "dim", Level.WARN: "yellow", Level.FAIL: "bold red"}
#: The exit code of the worst line.
CODES = {Level.OK: 0, Level.SKIP: 0, Level.WARN: 5, Level.FAIL: 1}
_LEVEL, _NAME = 4, 24  # columns


def doctor(
    *,
    margin: Annotated[
        float,
        typer.Option("--margin", metavar="SECONDS", help="How far clocks may be apart, as of your runners."),
    ] = Settings().margin,
    uri: place.Uri = None,
    collection: place.Collection = None,
    app: place.App = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Check server, privileges, indexes, clocks, runners and jobs, and say how to mend what is wrong.

    It changes nothing: the one control document that it writes to watch its event come is removed again. What would
    be too much to read is looked at in a sample, and says so. It ends with 0 if all is well, 5 if there
    are warnings, 1 if something fails.
    """
    queue = place.choose(uri, collection, app)
    address = uri if queue.source.uri is None else queue.source.uri
    out = show.console()
    found: list[Finding] = []
    for one in examine(queue.source, margin=margin):
        told = Finding(one.name, one.level, place.hide(one.text, address), place.hide(one.fix, address))
        found.append(told)
        if not json:
            _print(told, out)
    level = worst(found)
    if json:
        lines = [
            {"name": one.name, "level": one.level.value, "text": one.text, "fix": one.fix} for one in found
        ]
        show.as_json({"level": level.value, "collection": queue.namespace, "findings": lines})
    else:
        out.print()
        out.print(_summary(found))
    if CODES[level]:
        raise typer.Exit(CODES[level])


def _print(one: Finding, out: Console) -> None:
    """A line, folded under its beginning where the terminal is narrow, and the fix below it."""
    style = _STYLES[one.level]
    _fold(show.line((f"{one.level.value:<{_LEVEL}}", style), f"  {one.name:<{_NAME}}"), one.text, "", out)
    if one.fix:
        _fold(Text(" " * (_LEVEL + 2)), f"fix: {one.fix}", "cyan", out)


def _fold(begin: Text, text: str, style: str, out: Console) -> None:
    room = max(30, out.width - len(begin))
    for part in show.line((text, style)).wrap(out, room):
        part.rstrip()
        out.print(begin + part, soft_wrap=True)
        begin = Text(" " * len(begin))


def _summary(found: list[Finding]) -> Text:
    words = {Level.FAIL: "failed", Level.WARN: "to look at", Level.SKIP: "not seen", Level.OK: "well"}
    counts = {level: sum(one.level is level for one in found) for level in words}
    told = ", ".join(f"{count} {words[level]}" for level, count in counts.items() if count)
    return show.line((told, _STYLES[worst(found)]))
