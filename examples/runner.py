"""Runs the creator's jobs until ctrl+C: the original's example/runner.

STREAMJOBS_URI=mongodb://localhost:27017/?replicaSet=rs0 python examples/runner.py
"""

import asyncio
import os
import signal

from streamjobs import Queue
from streamjobs.original import Job, Runner

URI = os.environ.get("STREAMJOBS_URI", "mongodb://localhost:27017/?replicaSet=rs0")


def notify(job: Job) -> None:
    print(f"{job.kind}: {job.data['message']}", flush=True)


async def main() -> None:
    jobs = Queue(URI, "example.jobs")
    runner = Runner("example-runner", jobs, "notifications", notify)
    await runner.start()
    print("listening; ctrl+C stops", flush=True)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, runner.stop)
    await runner.stopped.wait()
    print("stopped", runner.err or "")


if __name__ == "__main__":
    asyncio.run(main())
