"""The commands that run handlers: events, signals, exit codes."""

import itertools
import json
import shlex
import signal
import socket
import subprocess
from contextlib import suppress

import pytest
from bson import json_util
from jsonschema import Draft202012Validator

from streamjobs import events
from tests.command import LONG, Place, Running, processes, wait_gone

SCHEMA = Draft202012Validator(events.schema())
HANGS = """
import asyncio, threading, time
from app import jobs

@jobs.handler("spin", retries=3)
async def spin(job):
    job.log.info("begun")
    time.sleep(1000)

@jobs.handler("leave", retries=3)
async def leave(job):
    job.log.info("begun")
    await asyncio.to_thread(threading.Event().wait, 1000)
"""


@pytest.fixture
def here(tmp_path, uri, namespace):
    with Place(tmp_path, uri, namespace) as place:
        yield place


def test_run_runs_a_job_and_stops_in_order(here, raw):
    health = here.folder / "health"
    runner = here.run("--name", "one", "--health-file", str(health), "--debug")
    started = runner.event("runner.started")
    assert (started["runner"], started["kinds"]) == ("one", ["hello", "long", "stuck"])
    assert health.exists()
    id_ = here.put("hello", '{"name": "Ada"}')["_id"]
    own = runner.event("try")
    assert (own["logger"], own["name"], own["job"]) == ("streamjobs.job", "Ada", str(id_))
    done = runner.event("try")
    assert (done["outcome"], done["job"]) == ("success", str(id_))
    runner.signal(signal.SIGTERM)
    assert runner.event("runner.stopping")["reason"] == "SIGTERM"
    runner.event("runner.stopped")
    assert runner.wait() == 0
    assert not health.exists()
    assert raw.find_one({"_id": id_})["status"] == 4
    assert runner.out == []
    lines = [json.loads(line) for line in runner.err]
    assert "try.started" in {line["event"] for line in lines}
    for line in lines:
        if "logger" not in line:
            SCHEMA.validate(line)


def test_a_second_signal_cancels_the_handlers(here, raw):
    runner = here.run()
    runner.event("runner.started")
    id_ = here.put("long", "--retries", "3")["_id"]
    runner.event("begun")
    runner.signal(signal.SIGTERM)
    runner.event("runner.stopping")
    runner.signal(signal.SIGTERM)
    runner.event("handler.cancelled")
    assert runner.event("try")["outcome"] == "interrupted"
    assert runner.wait() == 0
    job = raw.find_one({"_id": id_})
    assert (job["status"], job["retries"]) == (1, 3)


def test_a_third_signal_exits(here):
    runner = here.run()
    runner.event("runner.started")
    here.put("stuck", "--retries", "3")
    runner.event("begun")
    runner.signal(signal.SIGTERM)
    runner.event("runner.stopping")
    runner.signal(signal.SIGTERM)
    runner.signal(signal.SIGINT)  # the same number twice at once would come as one
    assert runner.wait() in (128 + signal.SIGINT, 128 + signal.SIGTERM)


def test_a_handler_stuck_in_a_thread_does_not_keep_the_process(here, raw):
    runner = here.run("--stop-deadline", "0.2", "--health-file", str(here.folder / "health"))
    runner.event("runner.started")
    here.put("stuck", "--retries", "3")
    runner.event("begun")
    runner.signal(signal.SIGTERM)
    runner.event("handler.stuck")
    assert runner.event("runner.stopped")["held"] == 1
    assert runner.wait() == 1
    assert not (here.folder / "health").exists()
    assert raw.find_one({"kind": "stuck"})["status"] == 2


def signal_until_ended(running):
    """Send signals, since those that come at once may be delivered as one."""
    for number in itertools.cycle((signal.SIGTERM, signal.SIGINT)):
        running.signal(number)
        with suppress(subprocess.TimeoutExpired):
            return running.process.wait(0.2)
    return None


@pytest.mark.parametrize("command", ["run", "dev"])
def test_a_third_signal_exits_though_a_handler_blocks_the_loop(here, command):
    (here.folder / "hangs.py").write_text(HANGS)
    where = here.where
    options = ["--folder", "data"] if command == "dev" else where
    with Running(command, "hangs:jobs", *options, "--log", "json", cwd=here.folder) as running:
        running.event("runner.started")
        if command == "dev":
            where = shlex.split(next(line for line in running.out if line.startswith("put")))[-4:]
        here.call("put", "spin", *where, "--retries", "3", place=False)
        running.event("begun")
        assert signal_until_ended(running) in (128 + signal.SIGINT, 128 + signal.SIGTERM)
    for pid in processes(str(here.folder / "data")):
        wait_gone(pid)


@pytest.mark.parametrize(
    ("kind", "why", "status"),
    [("spin", "loop is blocked", 2), ("leave", "goes on: asyncio_", 1)],
)
def test_no_handler_keeps_the_process_for_long_after_the_deadline(here, raw, kind, why, status):
    (here.folder / "hangs.py").write_text(HANGS)
    running = here.run(
        "--stop-deadline", "0.2", "--health-file", str(here.folder / "health"), target="hangs:jobs"
    )
    running.event("runner.started")
    here.put(kind, "--retries", "3")
    running.event("begun")
    running.signal(signal.SIGTERM)
    assert why in running.event("runner.cut")["reason"]
    assert running.wait() == 1
    assert not (here.folder / "health").exists()
    assert raw.find_one({"kind": kind})["status"] == status


def test_text_for_people(here):
    runner = here.run("--log", "text")
    runner.until("runner.started")
    here.put("hello", '{"fail": "\\u001b[31m[bold]no[/bold]"}', "--retries", "1")
    assert "failure → failed" in runner.until(r"\btry\b.*ValueError").string
    runner.signal(signal.SIGINT)
    assert runner.wait() == 0
    assert "\\x1b[31m[bold]no[/bold]" in "\n".join(runner.err)
    assert "\x1b" not in "\n".join(runner.err)


def test_run_without_a_server(here):
    with Running("run", "app:jobs", "--log", "json", cwd=here.folder) as runner:
        assert runner.event("runner.failed")["error"] == "ConnectError"
        assert runner.wait() == 1
        assert all(json.loads(line) for line in runner.err)
        assert "s3cret" not in "".join(runner.err)


def test_ctrl_c_while_no_server_answers_ends_it_at_once(here):
    with socket.create_server(("127.0.0.1", 0)) as mute:
        mute.settimeout(LONG)
        uri = f"mongodb://127.0.0.1:{mute.getsockname()[1]}"
        with Running("run", "app:jobs", "--uri", uri, "--log", "json", cwd=here.folder) as runner:
            with mute.accept()[0]:
                runner.signal(signal.SIGINT)
                assert runner.process.wait(5) == 0
            runner.wait()
        assert [json.loads(line)["event"] for line in runner.err] == ["runner.stopped"]


# ---- dev


def test_dev_starts_a_server_and_stops_it(here):
    folder = here.folder / "data"
    with Running("dev", "app:jobs", "--folder", str(folder), "--log", "json", cwd=here.folder) as dev:
        dev.event("runner.started")
        command = shlex.split(next(line for line in dev.out if line.startswith("put")))[2:]
        document = json_util.loads(here.call(*command, "--json", place=False).stdout)
        dev.event("try")
        assert dev.event("try")["outcome"] == "success"
        assert processes(str(folder))
        dev.signal(signal.SIGINT)
        assert dev.wait() == 0
    assert processes(str(folder)) == []
    with Running("dev", "app:jobs", "--folder", str(folder), "--log", "json", cwd=here.folder) as dev:
        dev.event("runner.started")
        where = shlex.split(next(line for line in dev.out if line.startswith("put")))[4:]
        assert "success" in here.call("show", str(document["_id"]), *where, place=False).stdout
        dev.process.kill()
        server = [pid for pid in processes(str(folder)) if pid != dev.process.pid]
        dev.wait()
        for pid in server:
            wait_gone(pid)
