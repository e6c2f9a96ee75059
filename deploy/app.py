"""The smallest application: a queue and one handler, for `streamjobs run app:jobs`."""
# ruff: noqa: INP001 - a module by itself, where the runner starts

import os

from streamjobs import Job, Queue

jobs = Queue(os.environ.get("STREAMJOBS_URI", "mongodb://localhost:27017/?replicaSet=rs0"), "app.jobs")


@jobs.handler("hello", retries=3, retry_interval=5)
async def hello(job: Job) -> None:
    """Log what the job carries."""
    job.log.info("hello", data=job.data)
