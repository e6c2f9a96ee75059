"""``streamjobs demo``: a server, two runners and a few jobs; it shows what happens and leaves nothing behind."""

from __future__ import annotations

import queue
import secrets
import signal
import subprocess
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Annotated, Any

import pymongo
import typer
from pymongo import MongoClient
from pymongo.errors import PyMongoError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from streamjobs import events
from streamjobs.cli import log, place, show
from streamjobs.cli.demo_jobs import jobs as handlers
from streamjobs.cli.processes import Hooks, RunnerProcess, caught
from streamjobs.clock import boot
from streamjobs.embedded import temporary
from streamjobs.errors import StreamJobsError
from streamjobs.job import Job
from streamjobs.sync import SyncQueue

_TARGET = "streamjobs.cli.demo_jobs:jobs"
_RUNNERS = ("runner-1", "runner-2")
_START = 20.0
_JOBS = 30.0
_STOP = 8.0
_CLEAR = 5.0
_ROOMY = 90
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_FINAL = ("success", "failed", "cancelled")

Event = dict[str, Any]
#: Events of all processes in the order in which they were read; a process's end is an event without a name.
Events = queue.SimpleQueue[Event]

DemoUri = Annotated[
    str | None,
    typer.Option(
        "--uri",
        envvar="STREAMJOBS_URI",
        metavar="URI",
        help="A replica set to use instead of a server of its own; the demo's database there is dropped at the end.",
        show_default=False,
    ),
]


def demo(uri: DemoUri = None) -> None:
    """Show it at work: two runners, a dozen jobs, what happened to each and how long it took.

    Starts a server in a temporary folder, unless you name one. About ten seconds; nothing is left behind.
    """
    out = show.console()
    shown = Show(out)
    try:
        with shown.interrupts.caught():
            _demo(uri, out, shown)
    except Interrupted as interrupted:
        out.print("stopped; nothing is left")
        raise typer.Exit(128 + interrupted.number) from None


def _demo(uri: str | None, out: Console, shown: Show) -> None:
    database = f"streamjobs_demo_{secrets.token_hex(4)}"
    collection = f"{database}.jobs"
    with (
        _server(uri, out) as address,
        place.connected(address, collection) as jobs,
        _dropped(address, database),
    ):
        shown.interrupts.check()
        jobs.create_indexes()
        out.print("starting two runners")
        with events.subscribe(shown.listen), _runners(address, collection, shown) as runners:
            shown.until_started()
            _put_jobs(jobs, shown)
            shown.until_done()
            for runner in runners:
                runner.terminate()
            shown.until_stopped()
            for runner in runners:
                if runner.wait(_STOP):
                    raise StreamJobsError(f"{runner.name} {runner.describe_end()}")
        shown.interrupts.check()
        found = {job.id: job for job in jobs.list(limit=1000)}
        out.print()
        out.print(_summary([found[job.id] for job in shown.jobs], shown.tries, out.width))
        out.print("In ms: wake, from due until a runner knows; claim, until it has the job;")
        out.print("run, the handler; record, until the outcome is written.")


class Interrupted(Exception):  # noqa: N818 - it is nobody's error
    """A signal asked to end; ``number`` says which."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


class Interrupts:
    """SIGINT, SIGTERM and SIGHUP as something to look at, so that they tear nothing that is half done.

    Args:
        events: gets an empty event, to wake who waits there.

    """

    def __init__(self, events: Events) -> None:
        self._events = events
        self._number: int | None = None

    def check(self) -> None:
        """Raise Interrupted once a signal has come."""
        if self._number is not None:
            raise Interrupted(self._number)

    @contextmanager
    def caught(self) -> Generator[None]:
        """Take the signals for as long as the context is open."""

        def note(number: int) -> None:
            if self._number is None:
                self._number = number
                self._events.put({})

        with caught(_SIGNALS, note):
            yield


@dataclass
class Show:
    """The events of both runners as they come, and what is known of each job by them."""

    out: Console
    coming: Events = field(default_factory=Events)
    interrupts: Interrupts = field(init=False)
    runners: dict[str, RunnerProcess] = field(default_factory=dict[str, RunnerProcess])
    jobs: list[Job] = field(default_factory=list[Job])
    tries: dict[str, list[Event]] = field(default_factory=dict[str, list[Event]])
    _started: set[str] = field(default_factory=set[str])
    _ended: set[str] = field(default_factory=set[str])
    _done: set[str] = field(default_factory=set[str])
    _stopping: bool = False

    def __post_init__(self) -> None:
        self.interrupts = Interrupts(self.coming)

    def listen(self, name: str, level: str, fields: Event) -> None:
        """Take an event of this process: a job was put or cancelled."""
        now = datetime.now(UTC).isoformat()
        if level != "debug":
            self.coming.put({"event": name, "level": level, "timestamp": now, "runner": "you", **fields})

    def until_started(self) -> None:
        """Show events until all runners have started."""
        self._until(lambda: self._started >= set(self.runners), _START, "starting the runners")

    def until_done(self) -> None:
        """Show events until every job has come to its end."""
        self._until(lambda: self._done >= {str(job.id) for job in self.jobs}, _JOBS, "running the jobs")
        self._stopping = True

    def until_stopped(self) -> None:
        """Show events until all runners have ended."""
        self._until(lambda: self._ended >= set(self.runners), _STOP, "stopping the runners")

    def _until(self, done: Any, seconds: float, what: str) -> None:
        until = boot() + seconds
        while not done():
            try:
                event = self.coming.get(timeout=max(0.0, until - boot()))
            except queue.Empty:
                raise StreamJobsError(f"{what} took too long") from None
            self._one(event)

    def _one(self, event: Event) -> None:
        self.interrupts.check()
        name, runner = event.get("event"), event["runner"]
        if name is None:
            self._ended.add(runner)
            if not self._stopping:
                raise StreamJobsError(
                    f"{runner} {self.runners[runner].describe_end()} in the middle of the demo"
                )
            return
        self.out.print(log.reading(event, runner=True), soft_wrap=True)
        if name == "runner.started":
            self._started.add(runner)
        elif name == "try":
            self.tries.setdefault(event["job"], []).append(event)
            if event["status"] in _FINAL:
                self._done.add(event["job"])
        elif name == "job.cancelled":
            self._done.add(event["job"])


def _put_jobs(jobs: SyncQueue, shown: Show) -> None:
    """A few of each kind."""
    wanted: list[tuple[str, dict[str, Any], float | None]] = [
        ("reminder", {"what": "two seconds are over"}, 2.0),
        ("unwanted", {}, 2.0),
        ("flaky", {}, None),
        ("broken", {}, None),
        ("patient", {}, None),
        ("hello", {"name": "Ada"}, None),
        ("hello", {"name": "Grace"}, None),
        ("hello", {"name": "Edsger"}, None),
        ("resize", {"image": "cat.png"}, None),
        ("resize", {"image": "dog.png", "width": 800}, None),
        ("invoice", {"customer": "ACME", "prices": [9.5, 20]}, None),
        ("invoice", {"customer": "Wrong Ltd", "prices": "many"}, None),
    ]
    for kind, data, delay in wanted:
        shown.interrupts.check()
        shown.jobs.append(_put_one(jobs, kind, data, delay))
    unwanted = next(job for job in shown.jobs if job.kind == "unwanted")
    jobs.cancel(unwanted.id, "nobody wants it any more")


def _put_one(jobs: SyncQueue, kind: str, data: dict[str, Any], delay: float | None) -> Job:
    # the queue of the command line knows no handlers: what they say of retries is said here
    handler = handlers.handlers[kind]
    return jobs.put(kind, data, delay=delay, retries=handler.retries, retry_interval=handler.retry_interval)


def _summary(jobs: list[Job], tries: dict[str, list[Event]], width: int) -> Table:
    """What each job went through, a line a try."""
    short = ["job"] if width >= _ROOMY else []
    one = show.table(
        "kind", *short, "status", ">try", "outcome", "runner", ">wake", ">claim", ">run", ">record"
    )
    for job in jobs:
        head: list[Text | str] = [
            show.line(job.kind),
            *(show.line(f"…{str(job.id)[-6:]}") for _ in short),
            show.state(job.state),
        ]
        mine = tries.get(str(job.id), [])
        for entry in mine:
            seen, claimed, started, ended, recorded = (
                entry.get(f"{name}_ms") for name in ("seen", "claimed", "started", "ended", "recorded")
            )
            known = None if seen is None else max(0.0, seen)  # a delayed job is known before it is due
            spans = [known, _less(claimed, known), _less(ended, started), _less(recorded, ended)]
            told: list[Text | str] = [
                str(entry["number"]),
                show.state(entry["outcome"]),
                show.line(entry["runner"]),
            ]
            cells: list[Text | str] = ["-" if ms is None else f"{ms:.1f}" for ms in spans]
            one.add_row(*head, *told, *cells)
            head = [""] * len(head)
        if not mine:
            one.add_row(*head, "-", "-", "-", "-", "-", "-", "-")
    return one


def _less(later: float | None, earlier: float | None) -> float | None:
    return None if later is None or earlier is None else later - earlier


@contextmanager
def _server(uri: str | None, out: Console) -> Generator[str]:
    if uri is not None:
        out.print(f"using the server at {place.shown(uri)}", soft_wrap=True)
        yield uri
        return
    out.print("starting a server in a temporary folder")
    with temporary() as server:
        yield server.uri


@contextmanager
def _dropped(uri: str, database: str) -> Generator[None]:
    """Drop a database at the end."""
    try:
        yield
    finally:
        client: MongoClient[dict[str, Any]] = MongoClient(uri, appname="streamjobs/demo")
        with suppress(PyMongoError), pymongo.timeout(_CLEAR), client:
            client.drop_database(database)


@contextmanager
def _runners(uri: str, collection: str, shown: Show) -> Generator[list[RunnerProcess]]:
    """Two runners; killed if they are still there at the end."""
    try:
        for name in _RUNNERS:
            shown.interrupts.check()
            shown.runners[name] = _runner(name, uri, collection, shown.coming)
        yield list(shown.runners.values())
    finally:
        for runner in shown.runners.values():
            runner.kill()
            runner.wait(_STOP)


def _runner(name: str, uri: str, collection: str, coming: Events) -> RunnerProcess:
    def line(text: bytes) -> None:
        event = log.parse(text)
        if event is None:
            message = text.decode("utf-8", "replace").rstrip("\n")
            event = {"event": "stderr", "level": "error", "message": message}
        coming.put({"runner": name, **event})

    return RunnerProcess(
        name,
        _TARGET,
        ["--collection", collection, "--log", "json", "--stop-deadline", "3"],
        {"STREAMJOBS_URI": uri},
        Hooks(line, lambda _process: coming.put({"runner": name})),
        output=subprocess.DEVNULL,
    )
