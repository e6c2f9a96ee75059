"""The application of the benchmark ``processes``: a handler that burns 20 ms of a core."""

import os
import time

from streamjobs import Queue

BURN = 0.02
jobs = Queue(os.environ.get("STREAMJOBS_URI", "mongodb://localhost:27017"), "bench.jobs")


@jobs.handler("bench", retries=5)
def burn() -> None:
    """Compute, in a thread, until this thread has used its share."""
    until = time.thread_time() + BURN
    while time.thread_time() < until:
        sum(range(100))
