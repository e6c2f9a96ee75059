"""A runner process for the tests: runs jobs, and writes down when each handler began and ended.

Events go to stderr as JSON lines, with the moment on the history's clock. Its options are: ``settings`` of the
runner; ``apart``, for clients whose appName ends with the runner's name, so that a failpoint can strike one runner;
``ahead``, seconds by which it misreads the server's clock; ``mutation``, a guard that is switched off.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import structlog
from pymongo import MongoClient, monitoring

from streamjobs import Cancel, Job, Queue, Snooze
from streamjobs.clock import ServerClock, boot
from tests.history import Log
from tests.mutations import MUTATIONS

_WRITES = {"insert", "update", "delete", "findAndModify"}
LOOK = 0.02  # seconds between two looks at job.lost
TURN, LATE = (
    0.1,
    0.25,
)  # seconds between two turns of the loop that are looked at, and how late one is worth a note


class Noted:
    """Around a handler's work: its start and end in the history."""

    def __init__(self, log: Log, job: Job, sort: str) -> None:
        held = job.held
        self._log = log
        self._about = {
            "job": job.id,
            "token": held.token,
            "owner": held.owner,
            "runner": held.runner,
            "number": job.number,
            "sort": sort,
            "pid": os.getpid(),
        }

    def __enter__(self) -> None:
        self._log.note("start", **self._about)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._log.note("end", **self._about, how="returned" if kind is None else kind.__name__)


def register(jobs: Queue, log: Log) -> None:
    """A handler for each way to behave; how long it takes is in the job's data."""

    async def work(job: Job) -> None:
        with Noted(log, job, "async"):
            await asyncio.sleep(seconds(job))

    jobs.handler("once")(work)
    jobs.handler("many", retries=20)(work)

    @jobs.handler("flaky", retries=20, retry_interval=0.05)
    async def flaky(job: Job) -> None:
        await work(job)
        if random.Random(f"{job.id} {job.number}").random() < 0.3:
            raise ValueError("again")

    @jobs.handler("failing", retries=3, retry_interval=0.2)
    async def failing(job: Job) -> None:
        await work(job)
        raise ValueError("always")

    @jobs.handler("snoozing", retries=20)
    async def snoozing(job: Job) -> Snooze | None:
        await work(job)
        asked = sum(one.outcome == "snoozed" for one in job.history)
        return Snooze(0.3) if asked < 2 else None

    @jobs.handler("cancelling", retries=20)
    async def cancelling(job: Job) -> Cancel:
        await work(job)
        return Cancel("enough")

    @jobs.handler("thread", retries=20)
    def thread(job: Job) -> None:
        with Noted(log, job, "thread"):
            time.sleep(seconds(job))

    @jobs.handler("looking", retries=20)
    def looking(job: Job) -> None:
        with Noted(log, job, "looking"):
            until = boot() + seconds(job)
            while boot() < until:
                job.check()
                time.sleep(LOOK)

    @jobs.handler("blocking", retries=20)
    async def blocking(job: Job) -> None:
        with Noted(log, job, "blocking"):
            time.sleep(seconds(job))

    @jobs.handler("stubborn", retries=20)
    async def stubborn(job: Job) -> None:
        with Noted(log, job, "stubborn"):
            until = boot() + seconds(job)
            while (left := until - boot()) > 0:
                try:
                    await asyncio.sleep(left)
                except asyncio.CancelledError:
                    continue


def seconds(job: Job) -> float:
    """How long a handler takes; with ``upto`` something below that, the same for each run of a try."""
    upto = job.data.get("upto")
    if upto is None:
        return job.data.get("seconds", 0.01)
    return random.Random(f"{job.id} {job.number}").random() * upto


class Weak(monitoring.CommandListener):
    """Notes each write that does not wait for a majority."""

    def __init__(self, log: Log) -> None:
        self._log = log

    def started(self, event: Any) -> None:
        if event.command_name in _WRITES and event.command.get("writeConcern", {}).get("w") != "majority":
            self._log.note("weak", command=event.command_name, pid=os.getpid())

    def succeeded(self, event: Any) -> None:
        pass

    failed = succeeded


async def _lag(log: Log) -> None:
    """Note when this loop got no turn: blocked, frozen, or on a machine with too much to do."""
    while True:
        asleep = boot()
        await asyncio.sleep(TURN)
        late = boot() - asleep - TURN
        if late > LATE:
            log.note("lag", pid=os.getpid(), seconds=late)


def _events() -> None:
    def stamp(_logger: Any, _name: str, told: dict[str, Any]) -> dict[str, Any]:
        return {**told, "at": boot(), "pid": os.getpid()}

    structlog.configure(
        processors=[
            structlog.stdlib.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            stamp,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(20),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


def _misread(ahead: float) -> None:
    real = ServerClock.heard

    def heard(self: ServerClock, sent: float, hello: Any) -> None:
        real(self, sent, {**hello, "localTime": hello["localTime"] + timedelta(seconds=ahead)})

    ServerClock.heard = heard  # type: ignore[method-assign]


def main(uri: str, namespace: str, name: str, history: str, options: dict[str, Any]) -> None:
    """Run jobs until a signal comes."""
    _events()
    log = Log(Path(history))
    monitoring.register(Weak(log))
    if options.get("ahead"):
        _misread(options["ahead"])
    if options.get("mutation"):
        MUTATIONS[options["mutation"]]()

    def connect(cls: type[Any], **given: Any) -> Any:
        return cls(uri, **{**given, "appname": f"{given['appname']}/{name}"})

    if options.get("apart"):
        database, _, collection = namespace.partition(".")
        jobs = Queue(MongoClient(uri, connect=False)[database][collection], connect=connect)
    else:
        jobs = Queue(uri, namespace)
    register(jobs, log)

    async def run() -> None:
        lag = asyncio.create_task(_lag(log))
        try:
            await jobs.run(name, **options.get("settings", {}))
        finally:
            lag.cancel()

    asyncio.run(run())
