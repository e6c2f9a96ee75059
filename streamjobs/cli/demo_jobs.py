"""The handlers of ``streamjobs demo``: one of each sort, small enough to read."""

import asyncio
import time

from streamjobs import Job, Queue, Snooze

jobs = Queue("mongodb://localhost:27017", "streamjobs_demo.jobs")


@jobs.handler("hello")
async def hello(job: Job) -> None:
    """A coroutine that gets the job."""
    job.log.info("hello", to=job.data["name"])


@jobs.handler("resize")
def resize(image: str, width: int = 100) -> None:
    """A plain function runs in a thread, and may block. Its parameters are filled from the job's data."""
    time.sleep(0.05 + width / 10_000)
    del image


@jobs.handler("invoice")
async def invoice(job: Job, customer: str, prices: list[float]) -> None:
    """Parameters are checked against their types: a job whose prices are no numbers fails by itself."""
    await asyncio.sleep(0.02)
    job.log.info("invoiced", customer=customer, total=sum(prices))


@jobs.handler("flaky", retries=3, retry_interval=0.5)
async def flaky(job: Job) -> None:
    """Fails once, and is tried again."""
    if job.number == 1:
        raise ConnectionError("the other side hung up")


@jobs.handler("broken", retries=2, retry_interval=0.3)
async def broken() -> None:
    """Fails for good."""
    raise RuntimeError("this never works")


@jobs.handler("patient")
async def patient(job: Job) -> Snooze | None:
    """Not yet: looks again later, without using an attempt."""
    return Snooze(0.4) if job.number == 1 else None


@jobs.handler("reminder")
async def reminder(job: Job) -> None:
    """Put with a delay."""
    job.log.info("it is time", what=job.data["what"])


@jobs.handler("unwanted")
async def unwanted() -> None:
    """Cancelled before it runs."""
