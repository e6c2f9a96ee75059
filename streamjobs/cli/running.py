"""``run`` and ``dev``: a process that runs handlers."""

from __future__ import annotations

import asyncio
import json
import shlex
import signal
import sys
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from pymongo.errors import PyMongoError

from streamjobs.cli import log, place, show
from streamjobs.cli.leaving import BLOCKED, Leaving
from streamjobs.cli.processes import Parent
from streamjobs.cli.supervise import Plan, Supervisor
from streamjobs.embedded import Server
from streamjobs.errors import BadArgument, StreamJobsError
from streamjobs.queue import Queue
from streamjobs.runner import Runner
from streamjobs.runner.signals import on_signals
from streamjobs.settings import Settings, default_name

_DEFAULT = Settings()
Target = Annotated[
    str,
    typer.Argument(
        metavar="MODULE:NAME",
        help="The Queue object, as in app:jobs for 'jobs' in app.py.",
        show_default=False,
    ),
]
Concurrency = Annotated[
    int | None,
    typer.Option(
        "--concurrency",
        metavar="N",
        help=f"Jobs at the same time. [dim]\\[default: {_DEFAULT.concurrency}][/dim]",
    ),
]
StopDeadline = Annotated[
    float | None,
    typer.Option(
        "--stop-deadline",
        metavar="S",
        help=f"Seconds that handlers may go on after a stop was asked. [dim]\\[default: {_DEFAULT.stop_deadline:g}][/dim]",
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show debug events too.")]
LogForm = Annotated[
    log.Form,
    typer.Option(
        "--log", help="What stderr gets: JSON lines or text. auto is text on a terminal.", show_default=True
    ),
]


def _tuning(flag: str, text: str, default: float | None = None) -> Any:
    shown = "" if default is None else f" [dim]\\[default: {default:g}][/dim]"
    return typer.Option(flag, metavar="S", rich_help_panel="Tuning", help=text + shown)


Interval = Annotated[
    float | None,
    _tuning("--interval", "Seconds between full reads, whatever the stream tells.", _DEFAULT.interval),
]
Poll = Annotated[
    float | None, _tuning("--poll", "Query so often instead of listening, where there are no change streams.")
]
Lease = Annotated[
    float | None,
    _tuning("--lease", "Seconds after which a silent runner's jobs are taken back.", _DEFAULT.lease),
]
Beat = Annotated[float | None, _tuning("--beat", "Seconds between renewals of the lease.", _DEFAULT.beat)]
Margin = Annotated[
    float | None, _tuning("--margin", "Seconds by which servers' clocks may differ.", _DEFAULT.margin)
]
MaxBlock = Annotated[
    float | None,
    _tuning("--max-block", "Seconds that a handler may block the event loop.", _DEFAULT.max_block),
]
ExitWhenBlocked = Annotated[
    bool,
    typer.Option(
        "--exit-when-blocked/--stay-when-blocked",
        rich_help_panel="Tuning",
        help=f"What to do then: end with code {BLOCKED}, so that others get the jobs, or go on holding them.",
    ),
]


Name = Annotated[
    str | None,
    typer.Option("--name", help="The runner's name. [dim]\\[default: host-pid][/dim]", show_default=False),
]
HealthFile = Annotated[
    Path | None,
    typer.Option(
        "--health-file",
        metavar="PATH",
        help="A file to touch while all is well, for probes; gone after a stop.",
    ),
]


def _several(flag: str, metavar: str, text: str) -> Any:
    return typer.Option(flag, metavar=metavar, min=1, rich_help_panel="Several processes", help=text)


Processes = Annotated[
    int | None, _several("--processes", "N", "Keep so many runner processes, called NAME-1 and so on.")
]
RecycleJobs = Annotated[
    int | None, _several("--recycle-jobs", "N", "Replace a process after so many jobs, one at a time.")
]
RecycleMemory = Annotated[
    int | None, _several("--recycle-memory", "MB", "Replace a process whose resident memory exceeds this.")
]


def run(
    target: Target,
    *,
    uri: place.Uri = None,
    collection: place.Collection = None,
    name: Name = None,
    concurrency: Concurrency = None,
    stop_deadline: StopDeadline = None,
    log_form: LogForm = log.Form.AUTO,
    debug: Debug = False,
    health_file: HealthFile = None,
    processes: Processes = None,
    recycle_jobs: RecycleJobs = None,
    recycle_memory: RecycleMemory = None,
    interval: Interval = None,
    poll: Poll = None,
    lease: Lease = None,
    beat: Beat = None,
    margin: Margin = None,
    max_block: MaxBlock = None,
    exit_when_blocked: ExitWhenBlocked = True,
    parent: Annotated[str | None, typer.Option("--parent", hidden=True)] = None,
) -> None:
    """Run the handlers of a Queue until stopped: what production starts.

    SIGTERM or ctrl+C stops it: it takes no more jobs, and running handlers may go on until the stop deadline.
    A second signal cancels them at once (their jobs are put back), a third one exits.

    With --processes it starts runner processes, restarts those that die, and hands signals on.

    [dim]streamjobs run app:jobs --concurrency 20 --processes 4[/dim]
    """
    above = None if parent is None else Parent.parse(parent)
    if above is not None:
        above.bind()
    settings = _given(
        concurrency=concurrency, interval=interval, stop_deadline=stop_deadline, lease=lease, beat=beat,
        margin=margin, poll=poll, max_block=max_block,
    )  # fmt: skip
    name = name or default_name()
    if processes is not None:
        plan = Plan(
            name=name, target=target, processes=processes, options=_options(settings, debug=debug, stay=not exit_when_blocked),
            environment=_given(STREAMJOBS_URI=uri, STREAMJOBS_COLLECTION=collection),
            stop_deadline=Settings(**settings).stop_deadline, form=log_form, health=health_file,
            recycle_jobs=recycle_jobs, recycle_memory=recycle_memory,
        )  # fmt: skip
        log.configure(log_form, debug=debug)
        raise typer.Exit(Supervisor(plan).run())
    for flag, value in (("--recycle-jobs", recycle_jobs), ("--recycle-memory", recycle_memory)):
        if value is not None:
            raise BadArgument(flag, value, "give --processes with it: it is the supervisor that replaces")
    queue = place.load(target, uri, collection)
    log.configure(log_form, debug=debug)
    runner = queue.runner(name, **settings)
    runner.health = None if health_file is None else str(health_file)
    leaving = Leaving(runner)
    if exit_when_blocked:
        runner.on_stuck = lambda: leaving.now(BLOCKED)
    with nullcontext() if above is None else above.informed():
        _serve_logged(runner, leaving, log_form)


def _serve_logged(runner: Runner, leaving: Leaving, log_form: log.Form) -> None:
    try:
        serve(runner, leaving)
    except (StreamJobsError, PyMongoError):
        if log_form.is_json:  # runner.failed has said it, as JSON
            raise typer.Exit(1) from None
        raise


def dev(
    target: Target,
    *,
    folder: Annotated[
        Path, typer.Option("--folder", help="Where the server keeps its data from one run to the next.")
    ] = Path(".streamjobs"),
    port: Annotated[
        int | None,
        typer.Option(
            "--port", min=1, max=65535, help="The server's port. [dim]\\[default: a free one][/dim]"
        ),
    ] = None,
    collection: Annotated[
        str | None,
        typer.Option(
            "--collection", metavar="DB.COLL", help="Instead of the Queue's own.", show_default=False
        ),
    ] = None,
    concurrency: Concurrency = None,
    stop_deadline: StopDeadline = None,
    log_form: LogForm = log.Form.TEXT,
    debug: Debug = False,
) -> None:
    """Run the handlers of a Queue on a server of their own, which is started and stopped with them.

    Nothing needs to be installed or running. Ctrl+C stops both; the data stays in the folder.

    [dim]streamjobs dev app:jobs[/dim]
    """
    queue = place.load(target)
    log.configure(log_form, debug=debug)
    with _kept_server(folder, port) as server:
        queue.use(server.uri, collection)
        settings = _given(concurrency=concurrency, stop_deadline=stop_deadline)
        runner = queue.runner("dev", **settings)
        queue.sync.create_indexes()
        queue.sync.close()
        _introduce(target, queue, server, runner)
        leaving = Leaving(runner, server.stop)
        serve(runner, leaving)
        leaving.off()  # the server may take its time


def serve(runner: Runner, leaving: Leaving) -> None:
    """Run a runner until signals stop it.

    A handler that ignores its cancellation, or sits in a thread, would keep the process for as long as it
    likes: then the process ends here, at once, with code 1. So it does when a handler blocks the event loop or has
    left work in a thread, some time after the stop deadline.
    """
    loop = asyncio.Runner()
    try:
        loop.run(_serve(runner, leaving))
    finally:
        leaving.stopped = True
        if runner.stuck:
            leaving.now()
        leaving.signalled(1)  # where there was none: an error
        loop.close()


async def _serve(runner: Runner, leaving: Leaving) -> None:
    with on_signals((signal.SIGTERM, signal.SIGINT), runner, leaving.signalled):
        await runner.run()


@contextmanager
def _kept_server(folder: Path, port: int | None) -> Generator[Server]:
    folder.mkdir(parents=True, exist_ok=True)
    ignore = folder / ".gitignore"
    if not ignore.exists():
        ignore.write_text("*\n", encoding="utf-8")
    server = Server(folder.resolve(), port=port)
    server.start()
    try:
        yield server
    finally:
        server.stop()


def _introduce(target: str, queue: Queue, server: Server, runner: Runner) -> None:
    out = show.console()
    first = next(iter(queue.handlers.values()))
    data = f" {shlex.quote(json.dumps(dict.fromkeys(first.needs)))}" if first.needs else ""
    where = f"--app {target} --uri {server.uri} --collection {queue.namespace}"
    out.print(
        show.line(("server  ", "dim"), f"{server.uri} ({server.program.sort}), data in {server.folder}"),
        soft_wrap=True,
    )
    out.print(show.line(("jobs    ", "dim"), f"{queue.namespace}: {', '.join(runner.kinds)}"), soft_wrap=True)
    out.print(
        show.line(("put     ", "dim"), f"streamjobs put {shlex.quote(first.kind)}{data} {where}"),
        soft_wrap=True,
    )
    out.print(show.line(("stop    ", "dim"), "ctrl+C"))
    sys.stdout.flush()


def _options(settings: dict[str, Any], *, debug: bool, stay: bool) -> list[str]:
    """Settings as options of ``run`` again."""
    words = [word for key, value in settings.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    return [*words, *(["--debug"] if debug else []), *(["--stay-when-blocked"] if stay else [])]


def _given(**settings: Any) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if value is not None}
