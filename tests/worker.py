"""A runner process for the tests: runs jobs, and writes down when each handler began and ended.

    python tests/worker.py URI NAMESPACE NAME HISTORY SETTINGS

The history is a file of JSON lines, written before and after each handler's work, so that it survives kill -9.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys

import structlog

from streamjobs import Queue
from streamjobs.clock import boot


def main() -> None:
    uri, namespace, name, history, settings = sys.argv[1:]
    structlog.configure(
        processors=[
            structlog.stdlib.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(20),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    file = os.open(history, os.O_CREAT | os.O_APPEND | os.O_WRONLY)

    def note(what: str, job) -> None:
        line = {
            "what": what,
            "job": str(job.id),
            "number": job.number,
            "runner": name,
            "pid": os.getpid(),
            "at": boot(),
        }
        os.write(file, (json.dumps(line) + "\n").encode())

    jobs = Queue(uri, namespace)

    async def work(job) -> None:
        note("start", job)
        try:
            await asyncio.sleep(random.random() * job.data.get("seconds", 0.01))
        finally:
            note("end", job)

    jobs.handler("once")(work)
    jobs.handler("many", retries=20)(work)

    @jobs.handler("flaky", retries=20, retry_interval=0.05)
    async def flaky(job) -> None:
        await work(job)
        if random.random() < 0.3:
            raise ValueError("again")

    asyncio.run(jobs.run(name, **json.loads(settings)))


if __name__ == "__main__":
    main()
