"""Puts a job a second until ctrl+C: the original's example/creator.

STREAMJOBS_URI=mongodb://localhost:27017/?replicaSet=rs0 python examples/creator.py
"""

import asyncio
import itertools
import os

from streamjobs import Queue
from streamjobs.original import Job, put

URI = os.environ.get("STREAMJOBS_URI", "mongodb://localhost:27017/?replicaSet=rs0")
COUNT = int(os.environ.get("COUNT", "0"))  # 0: for ever


async def main() -> None:
    async with Queue(URI, "example.jobs") as jobs:
        for number in itertools.count(1):
            job = Job.new("notifications")
            job.data["message"] = f"Hello world {number}"
            await put(jobs, job)
            print(f"put {job.id}", flush=True)
            if number == COUNT:
                return
            await asyncio.sleep(1)


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except KeyboardInterrupt:
        print("stopped")
