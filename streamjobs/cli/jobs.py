"""Commands on jobs: put, list, show, stats, retry, cancel, indexes."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, cast

import typer
from bson.json_util import loads

from streamjobs.cli import place, show
from streamjobs.errors import BadArgument, BadData, PutUnknown, StreamJobsError, meant
from streamjobs.indexes import INDEXES, command
from streamjobs.job import Job
from streamjobs.sync import SyncQueue

_UNITS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}

JsonOut = Annotated[bool, typer.Option("--json", help="Print one document of relaxed MongoDB Extended JSON.")]
Id = Annotated[str, typer.Argument(metavar="ID", help="The job's _id.", show_default=False)]


def put(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="The job's kind.", show_default=False)],
    data: Annotated[
        str,
        typer.Argument(
            metavar="JSON",
            help="Its data, an object (Extended JSON), or - to read it from stdin.",
            show_default=False,
        ),
    ] = "{}",
    *,
    at: Annotated[
        str | None,
        typer.Option("--at", metavar="TIME", help="Not before this, as 2030-01-31T09:00:00Z or with +02:00."),
    ] = None,
    delay: Annotated[
        str | None,
        typer.Option("--in", metavar="SPAN", help="Not before so long from now: 90 (seconds), 5m, 2h, 1d."),
    ] = None,
    retries: Annotated[
        int | None, typer.Option("--retries", metavar="N", help="Attempts in all; 0 and 1 are both one.")
    ] = None,
    retry_interval: Annotated[
        str | None,
        typer.Option("--retry-interval", metavar="SPAN", help="Between a failed try and the next."),
    ] = None,
    uri: place.Uri = None,
    collection: place.Collection = None,
    app: place.App = None,
    json: JsonOut = False,
) -> None:
    """Put a job.

    [dim]streamjobs put resize '{"image": 7}' --in 5m --retries 3[/dim]
    """
    content = parse_data(_stdin() if data == "-" else data)
    moment = None if at is None else _moment(at)
    if moment is not None and delay is not None:
        raise BadArgument("--in", delay, "give --at or --in, not both")
    wait = None if delay is None else _span("--in", delay)
    between = None if retry_interval is None else _span("--retry-interval", retry_interval)
    if app is not None:
        _check_handler(app, kind, content, data)
    with place.connected(uri, collection, app) as jobs:
        job = _put(jobs, kind, content, delay=wait, at=moment, retries=retries, retry_interval=between)
    when = "" if job.asap else f", not before {show.when(job.runat)} UTC"
    _tell(job, json, f"put{when}")


def list_jobs(
    *,
    kind: Annotated[str | None, typer.Option("--kind", help="Only of this kind.")] = None,
    status: Annotated[
        str | None,
        typer.Option(
            "--status", help="Only in this status: new, working, waiting, success, failed, cancelled."
        ),
    ] = None,
    due: Annotated[
        bool | None,
        typer.Option(
            "--due/--not-due", help="Only those that may run now, or may not yet.", show_default=False
        ),
    ] = None,
    limit: Annotated[int, typer.Option("--limit", metavar="N", help="At most so many.")] = 100,
    uri: place.Uri = None,
    collection: place.Collection = None,
    app: place.App = None,
    json: JsonOut = False,
) -> None:
    """List jobs, newest first.

    [dim]streamjobs list --kind resize --status failed[/dim]
    """
    with place.connected(uri, collection, app) as jobs:
        found = jobs.list(kind=kind, status=status, due=due, limit=limit)
    if json:
        show.as_json(show.documents(found))
        return
    out = show.console()
    out.print(show.jobs_table(found, out.width) if found else "no jobs")
    if len(found) == limit:
        show.console(stderr=True).print(f"the newest {limit}: there may be more, see --limit")


def show_job(
    id: Id,  # noqa: A002 - its name on the command line
    *,
    uri: place.Uri = None,
    collection: place.Collection = None,
    app: place.App = None,
    json: JsonOut = False,
) -> None:
    """Show one job: its data, and when each try was claimed, started and ended, with its error."""
    with place.connected(uri, collection, app) as jobs:
        job = jobs.get(place.parse_id(id))
    if json:
        show.as_json(job.to_document())
    else:
        show.job_page(job, show.console())


def stats(
    *,
    uri: place.Uri = None,
    collection: place.Collection = None,
    app: place.App = None,
    json: JsonOut = False,
) -> None:
    """Count jobs by kind and status."""
    with place.connected(uri, collection, app) as jobs:
        counts = jobs.count()
    if json:
        show.as_json(counts)
    else:
        show.console().print(show.stats_table(counts) if counts else "no jobs")


def retry(
    id: Id,  # noqa: A002
    *,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Also a working job that no lease protects. Only if its runner is dead."
        ),
    ] = False,
    uri: place.Uri = None,
    collection: place.Collection = None,
    app: place.App = None,
    json: JsonOut = False,
) -> None:
    """Make a job new again, to run now, whether it failed, succeeded, waits or was cancelled."""
    with place.connected(uri, collection, app) as jobs:
        job = jobs.retry(place.parse_id(id), force=force)
    _tell(job, json, f"runs again, {max(1, job.retries)} left")


def cancel(
    id: Id,  # noqa: A002
    *,
    reason: Annotated[
        str, typer.Option("--reason", help="Why; kept in the document.", show_default=False)
    ] = "",
    uri: place.Uri = None,
    collection: place.Collection = None,
    app: place.App = None,
    json: JsonOut = False,
) -> None:
    """Cancel a new or waiting job before it runs."""
    with place.connected(uri, collection, app) as jobs:
        job = jobs.cancel(place.parse_id(id), reason)
    _tell(job, json)


def indexes(
    *,
    create: Annotated[bool, typer.Option("--create", help="Make those that are missing.")] = False,
    uri: place.Uri = None,
    collection: place.Collection = None,
    app: place.App = None,
    json: JsonOut = False,
) -> None:
    """Show the indexes that the collection should have; exit code 1 if some are missing.

    A runner never makes them: run [bold]streamjobs indexes --create[/bold] once.
    """
    with place.connected(uri, collection, app) as jobs:
        made = jobs.create_indexes() if create else []
        absent = jobs.missing_indexes()
    if json:
        show.as_json([
            {"name": index.name, "keys": dict(index.keys), "serves": index.serves, "there": index not in absent,
             "made": index in made}
            for index in INDEXES
        ])  # fmt: skip
    else:
        show.console().print(show.indexes_table(absent, made))
    if absent:
        if not json:
            show.console(stderr=True).print(f"make them with: {command(jobs.namespace)}", soft_wrap=True)
        raise typer.Exit(1)


def _stdin() -> str:
    try:
        return sys.stdin.read()
    except (OSError, UnicodeDecodeError) as error:
        raise BadArgument("JSON", "-", f"stdin can't be read ({error})") from None


def parse_data(text: str) -> dict[str, Any]:
    """A job's data from Extended JSON."""
    try:
        value = loads(text, json_options=show.JSON)
    except RecursionError:
        raise BadArgument("JSON", text, "it is nested too deeply") from None
    except Exception as error:  # noqa: BLE001 - the parser raises whatever the types that it makes do
        raise BadArgument("JSON", text, f"it is no Extended JSON ({str(error)[:100]})") from None
    if not isinstance(value, Mapping):
        raise BadArgument("JSON", text, 'give an object, as {"image": 7}')
    return dict(cast("Mapping[str, Any]", value))


def _check_handler(app: str, kind: str, data: Mapping[str, Any], text: str) -> None:
    """Refuse what the app's own handlers would not run, before it uses up its attempts."""
    handlers = place.load(app).handlers
    if handlers and kind not in handlers:
        raise BadArgument(
            "KIND", kind, f"{meant(kind, handlers)}{app} has handlers for {', '.join(sorted(handlers))}; a kind that others run goes "
            "without --app"
        )  # fmt: skip
    if kind in handlers:
        job = Job.new(kind)
        job.data.update(data)
        try:
            handlers[kind].arguments(job)
        except BadData as error:
            raise BadArgument("JSON", text, str(error)) from None


def _put(jobs: SyncQueue, kind: str, data: Mapping[str, Any], **options: Any) -> Job:
    try:
        return jobs.put(kind, data, **options)
    except PutUnknown as unknown:
        job = unknown.jobs[0]
    try:
        return jobs.put(job)  # the same _id: it can't end up there twice
    except PutUnknown:
        raise StreamJobsError(
            f"the server gave no answer, so job {job.id} may be there or not: look with 'streamjobs show {job.id}' "
            "before you put another"
        ) from None


def _tell(job: Job, json: bool, what: str = "") -> None:
    if json:
        show.as_json(job.to_document())
        return
    text = show.line(
        (str(job.id), "bold"), "  ", job.kind, "  ", (job.state, show.STYLES.get(job.state, "")), f"  {what}"
    )
    show.console().print(text, soft_wrap=True)


def _span(name: str, text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d|)", text.strip())
    if match is None:
        raise BadArgument(name, text, "give a span, as 90 (seconds), 1.5s, 5m, 2h or 1d")
    return float(match[1]) * _UNITS[match[2]]


def _moment(text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is None:
        raise BadArgument("--at", text, "give an ISO time with an offset or Z, as 2030-01-31T09:00:00Z")
    return moment
