"""A job runner for MongoDB that listens to the change stream instead of polling.

::

    jobs = Queue("mongodb://localhost:27017/?replicaSet=rs0", "app.jobs")

    @jobs.handler("resize", retries=5, retry_interval=30)
    async def resize(job): ...

    job = await jobs.put("resize", {"image": 7}, delay=60)
    await jobs.run("worker-1", concurrency=20)

Read on in the order of a job's life: ``job`` and ``transitions`` (what it is, how it changes), ``queue`` (how it
is put), ``runner/`` (how it is woken for, claimed, executed and finished), ``events`` (how it is watched).
"""

from streamjobs.clients import ClientFactory
from streamjobs.context import current_job
from streamjobs.errors import (
    BadArgument,
    BadData,
    ConfigError,
    ConnectError,
    ForkError,
    HandlerError,
    IdTaken,
    JobError,
    JobNotFound,
    JobState,
    LeaseLost,
    PutUnknown,
    StreamJobsError,
    StreamRefused,
    UnreadableJob,
)
from streamjobs.events import subscribe
from streamjobs.handler import Cancel, Handler, Snooze
from streamjobs.job import ASAP, Job, Status, Try
from streamjobs.queue import Queue
from streamjobs.runner import Runner
from streamjobs.settings import Settings
from streamjobs.sync import SyncQueue
from streamjobs.version import __version__

__all__ = [
    "ASAP",
    "BadArgument",
    "BadData",
    "Cancel",
    "ClientFactory",
    "ConfigError",
    "ConnectError",
    "ForkError",
    "Handler",
    "HandlerError",
    "IdTaken",
    "Job",
    "JobError",
    "JobNotFound",
    "JobState",
    "LeaseLost",
    "PutUnknown",
    "Queue",
    "Runner",
    "Settings",
    "Snooze",
    "Status",
    "StreamJobsError",
    "StreamRefused",
    "SyncQueue",
    "Try",
    "UnreadableJob",
    "__version__",
    "current_job",
    "subscribe",
]
