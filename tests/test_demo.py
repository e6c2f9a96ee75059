"""The demo, to its end and cut short: nothing is ever left."""

import os
import signal

import pytest
from pymongo import MongoClient

from tests.command import Running, processes, wait_gone

KINDS = ("reminder", "unwanted", "flaky", "broken", "patient", "hello", "resize", "invoice")


@pytest.fixture
def demo(tmp_path):
    """Start it with a temporary folder of its own, by which its processes are known."""
    opened = []

    def start(**env):
        inherited = {
            key: value for key, value in os.environ.items() if key not in ("STREAMJOBS_URI", "COLUMNS")
        }
        one = Running("demo", stream="stdout", env={**inherited, "TMPDIR": str(tmp_path), **env})
        opened.append(one)
        return one

    yield start
    for one in opened:
        one.__exit__()


def assert_nothing_left(tmp_path):
    assert processes(str(tmp_path)) == []
    assert list(tmp_path.iterdir()) == []


def test_the_demo_shows_every_job(demo, tmp_path):
    one = demo()
    assert one.wait() == 0, one.err
    assert one.err == []
    text = "\n".join(one.out)
    assert "\x1b" not in text
    begin = next(index for index, line in enumerate(one.out) if line.startswith("kind "))
    assert "record" in one.out[begin]
    rows = {line.split()[0]: line.split() for line in one.out[begin + 1 :] if line[:1].isalpha()}
    statuses = {kind: rows[kind][2] for kind in KINDS if kind != "invoice"}
    assert statuses == {
        "reminder": "success", "unwanted": "cancelled", "flaky": "success", "broken": "failed", "patient": "success",
        "hello": "success", "resize": "success",
    }  # fmt: skip
    table = "\n".join(one.out[begin:])
    for outcome in ("failure", "snoozed", "success"):
        assert outcome in table
    for runner in ("runner-1", "runner-2"):
        assert any(f"{runner}  runner.stopped" in line for line in one.out)
    assert_nothing_left(tmp_path)


def test_the_demo_on_a_given_server_drops_its_database(demo, tmp_path, uri):
    one = demo(STREAMJOBS_URI=uri)
    assert one.wait() == 0, one.err
    assert_nothing_left(tmp_path)
    with MongoClient(uri) as client:
        assert [name for name in client.list_database_names() if name.startswith("streamjobs_demo_")] == []


@pytest.mark.parametrize(
    "moment", ["starting a server", "starting two runners", "runner.started", r"\btry\b", "stopping"]
)
def test_ctrl_c_leaves_nothing(demo, tmp_path, moment):
    one = demo()
    one.until(moment)
    one.signal(signal.SIGINT)
    one.signal(signal.SIGINT)  # impatience does no harm
    code = one.wait()
    # what is asked of a demo that has shown all comes too late
    late = moment == "stopping" and code == 0 and one.out[-1].startswith("run, the handler")
    assert code == 130 or late, (code, one.out, one.err)
    assert one.err == []
    assert_nothing_left(tmp_path)


def test_a_runner_that_dies_ends_the_demo(demo, tmp_path):
    one = demo()
    victim = int(one.until(r"runner-2 .*runner.started.*pid=(\d+)")[1])
    os.kill(victim, signal.SIGKILL)
    assert one.wait() == 1
    assert one.err == ["error: runner-2 was killed by SIGKILL in the middle of the demo"]
    assert_nothing_left(tmp_path)


def test_a_demo_that_is_killed_takes_its_processes_along(demo, tmp_path):
    one = demo()
    one.until(r"\btry\b")
    others = [pid for pid in processes(str(tmp_path)) if pid != one.process.pid]
    assert len(others) == 3
    one.process.kill()
    one.wait()
    for pid in others:
        wait_gone(pid)
