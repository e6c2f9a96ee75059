"""A folder with an application whose jobs try a supervisor, and what is asked of it in several files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from streamjobs.cli import log
from streamjobs.cli.supervise import Plan
from tests.command import Place, wait_gone

QUICK = ("--interval", "3", "--lease", "3", "--beat", "0.5", "--margin", "0.5")
FLEET = """
import asyncio, os, signal, sys, time
from pathlib import Path
from app import jobs

flag = Path(__file__).with_name("flag")
if flag.exists():
    raise RuntimeError("the flag is up")
kept = []

@jobs.handler("short", retries=9)
async def short(job):
    await asyncio.sleep(0.05)

@jobs.handler("die", retries=2)
async def die(job):
    if job.data.get("flag"):
        flag.touch()
    if job.number == 1:
        os.kill(os.getpid(), signal.SIGKILL)

@jobs.handler("fork", retries=2)
async def fork(job):
    if job.number == 1:
        if not (child := os.fork()):  # it has all that this process has open, and outlives it
            time.sleep(1000)
        job.log.info("forked", child=child)
        os.kill(os.getpid(), signal.SIGKILL)

@jobs.handler("odd")
async def odd(job):
    job.log.info("try", outcome="put off", delay="5 minutes")
    print("[" * 100_000, file=sys.stderr, flush=True)

@jobs.handler("grow")
async def grow(job):
    kept.append(bytearray(os.urandom(1000) * (job.data["mb"] * 1000)))

@jobs.handler("chatter")
def chatter(job):
    for _ in range(200):
        job.log.info("chatter", text="x" * 3000)

@jobs.handler("frozen", retries=3)
def frozen(job):
    job.log.info("begun")
    os.kill(os.getpid(), signal.SIGSTOP)
"""


@contextmanager
def fleet_place(folder: Path, uri: str, namespace: str) -> Iterator[Place]:
    (folder / "fleet.py").write_text(FLEET)
    with Place(folder, uri, namespace) as place:
        yield place


def fleet(here, *options, processes=2):
    one = here.run(
        "--processes", str(processes), "--name", "fleet", *QUICK, *options, target="fleet:jobs"
    )  # fmt: skip
    one.events("runner.started", count=processes)
    return one


def put(raw, here, kind, count=1, **data):
    document = here.put(kind, json.dumps(data), "--app", "fleet:jobs", "--in", "1h")
    raw.delete_one({"_id": document.pop("_id")})
    many = [{**document, "runat": datetime(1, 1, 1, tzinfo=UTC)} for _ in range(count)]
    return raw.insert_many(many).inserted_ids


def nothing_left(one):
    assert one.process.poll() is not None
    for line in one.err:
        if '"event": "process.started"' in line:
            wait_gone(json.loads(line)["pid"])


def stopped_in(one):
    """Seconds from the first signal to the supervisor's last event."""
    (began,), (ended,) = one.events("supervisor.stopping"), one.events("supervisor.stopped")
    return (
        datetime.fromisoformat(ended["timestamp"]) - datetime.fromisoformat(began["timestamp"])
    ).total_seconds()


def plan(here, **more):
    return Plan(
        **{
            "name": "fleet", "target": "fleet:jobs", "processes": 2, "stop_deadline": 5.0, "form": log.Form.JSON,
            "options": QUICK, "environment": {
                "STREAMJOBS_URI": here._place["uri"], "STREAMJOBS_COLLECTION": here._place["collection"],
            },
            **more,
        }
    )  # fmt: skip
