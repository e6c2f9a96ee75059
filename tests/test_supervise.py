"""A supervisor and its runner processes: started, restarted, recycled, stopped, and never left behind."""

import json
import os
import signal
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from streamjobs import events
from streamjobs.cli import supervise
from streamjobs.cli.supervise import Supervisor, resident
from tests.command import LONG
from tests.supervised import fleet, fleet_place, nothing_left, plan, put

SCHEMA = Draft202012Validator(events.schema())


@pytest.fixture
def here(tmp_path, uri, namespace):
    with fleet_place(tmp_path, uri, namespace) as place:
        yield place


def test_processes_share_the_work_and_stop_in_order(here, raw):
    one = fleet(here)
    ids = put(raw, here, "short", 40)
    done = one.events("try", count=40)
    assert {event["job"] for event in done} == {str(id_) for id_ in ids}
    assert {event["runner"] for event in done} <= {"fleet-1", "fleet-2"}
    started = one.events("process.started", count=2)
    assert {event["runner"] for event in started} == {"fleet-1", "fleet-2"}
    assert len({event["pid"] for event in started}) == 2
    one.signal(signal.SIGTERM)
    assert one.wait() == 0
    ended = [json.loads(line) for line in one.err if '"process.ended"' in line]
    assert [(event["level"], event["exit"]) for event in ended] == [("info", 0)] * 2
    assert raw.count_documents({"status": 4}) == 40
    assert raw.count_documents({"control": "runner"}) == 0
    for line in one.err:
        SCHEMA.validate(json.loads(line))
    nothing_left(one)


def test_lines_of_many_processes_stay_whole(here, raw):
    one = fleet(here, processes=3)
    put(raw, here, "chatter", 12)
    one.events("try", count=12)
    one.signal(signal.SIGTERM)
    assert one.wait() == 0
    lines = [json.loads(line) for line in one.err]  # each is one object
    assert sum(line["event"] == "chatter" and len(line["text"]) == 3000 for line in lines) == 12 * 200


def test_readable_lines_name_their_runner(here):
    one = here.run("--processes", "2", "--name", "fleet", "--log", "text")
    for number in (1, 2):
        one.until(rf"fleet-{number}.*runner.started")
    one.signal(signal.SIGINT)
    assert one.wait() == 0
    assert not [line for line in one.err if line.startswith("{")]


def test_lines_that_only_look_like_events_stop_nothing(here, raw):
    one = here.run("--processes", "1", "--name", "fleet", "--log", "text", target="fleet:jobs")
    one.until(r"fleet-1.*runner.started")
    put(raw, here, "odd")
    one.until(r"fleet-1 .*delay=5 minutes")
    one.until(r"^\[{100000}$")
    one.until(r"fleet-1 .*try 1 success")
    one.signal(signal.SIGINT)
    assert one.wait() == 0


def test_the_end_of_a_process_is_noticed_though_what_it_has_forked_lives_on(here, raw):
    one = fleet(here, processes=1)
    (id_,) = put(raw, here, "fork")
    child = one.events("forked")[0]["child"]
    try:
        assert one.events("process.ended")[0]["reason"] == "was killed by SIGKILL"
        one.events("try", job=str(id_), outcome="success")
        one.signal(signal.SIGTERM)
        assert one.process.wait(LONG) == 0
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_process_that_dies_is_restarted_and_its_job_runs(here, raw):
    one = fleet(here)
    (id_,) = put(raw, here, "die")
    (ended,) = one.events("process.ended")
    assert (ended["level"], ended["exit"]) == ("warning", -signal.SIGKILL)
    assert ended["reason"] == "was killed by SIGKILL"
    assert ended["retry_in"] == 1
    one.events("process.started", count=2, runner=ended["runner"])
    one.events("runner.started", count=2, runner=ended["runner"])
    one.events("try", job=str(id_), outcome="success")
    assert [entry.get("outcome") for entry in raw.find_one({"_id": id_})["tries"]] == ["lost", None]
    one.signal(signal.SIGTERM)
    assert one.wait() == 0


def test_a_process_that_ends_in_order_unasked_is_restarted(here):
    one = fleet(here, processes=1)
    (started,) = one.events("process.started")
    os.kill(started["pid"], signal.SIGTERM)
    (ended,) = one.events("process.ended")
    assert (ended["level"], ended["exit"], ended["retry_in"]) == ("warning", 0, 1)
    one.events("runner.started", count=2)


# ---- what cannot start


@pytest.mark.parametrize(
    ("target", "options", "told"),
    [
        ("nowhere:jobs", (), "no module nowhere"),
        ("broken:jobs", (), "ZeroDivisionError"),
        ("app:jobs", ("--name", "n" * 250), "1 to 200 characters"),
        ("app:jobs", ("--uri", "mongodb://127.0.0.1:1/?serverSelectionTimeoutMS=300"), "ConnectError"),
    ],
)
def test_a_process_that_cannot_start_ends_it(here, target, options, told):
    (here.folder / "broken.py").write_text("1 / 0")
    one = here.run("--processes", "3", *options, target=target)
    assert one.wait() == 1
    assert sum('"process.started"' in line for line in one.err) == 1
    assert any(told in line for line in one.err), one.err
    failed = [json.loads(line) for line in one.err if '"supervisor.failed"' in line]
    assert len(failed) == 1
    assert "before its runner had started" in failed[0]["reason"]


def test_it_gives_up_when_none_runs_and_none_can_start(here, raw, monkeypatch, seen):
    monkeypatch.chdir(here.folder)
    monkeypatch.setattr(supervise, "_DELAYS", (0.01,))
    put(raw, here, "die", flag=True)
    one = Supervisor(plan(here, processes=1))
    assert one.run() == 1
    codes = [event["exit"] for event in seen.of("process.ended")]
    assert codes == [-9, 1, 1, 1, 1, 1]
    (failed,) = seen.of("supervisor.failed")
    assert "5 processes in a row" in failed["reason"]


def test_it_does_not_give_up_while_one_runs(here, raw, monkeypatch, seen):
    monkeypatch.chdir(here.folder)
    monkeypatch.setattr(supervise, "_DELAYS", (0.01,))
    one = Supervisor(plan(here))
    ends = 0

    def act(name, level, fields):
        nonlocal ends
        if name == "process.started" and fields["runner"] == "fleet-2" and not ends:
            (here.folder / "flag").touch()  # the first is up; no other can start from now on
        elif name == "process.ended":
            ends += 1
            if ends == 8:
                os.kill(os.getpid(), signal.SIGTERM)

    with events.subscribe(act):
        assert one.run() == 0
    assert not seen.of("supervisor.failed")
    ended = [event for event in seen.of("process.ended") if event["runner"] == "fleet-2"]
    assert len(ended) >= 8
    assert {event["exit"] for event in ended} == {1}


def test_a_program_that_cannot_be_run_is_told(here, monkeypatch, seen):
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    assert Supervisor(plan(here)).run() == 1
    assert "could not be started" in seen.of("supervisor.failed")[0]["reason"]


def test_delays_grow_and_a_process_that_lasted_begins_again(here):
    one = Supervisor(plan(here))
    one._any_ready = True
    place = supervise._Place("fleet-1", None)
    waits = [one._count_end(place, True, 3.0, "ended")[1] for _ in range(8)]
    assert waits == [1, 2, 4, 8, 16, 30, 30, 30]
    assert one._count_end(place, True, 61.0, "ended")[1] == 1
    assert one._count_end(place, True, 3.0, "ended")[1] == 1


def test_recycling_needs_processes(here):
    for option in ("--recycle-jobs", "--recycle-memory"):
        done = here.call("run", "app:jobs", option, "5", code=2)
        assert "give --processes" in done.stderr
    here.call("run", "app:jobs", "--processes", "0", code=2)
    assert "lease" in here.call("run", "app:jobs", "--processes", "2", "--lease", "1", code=2).stderr


# ---- recycling


def test_processes_are_recycled_after_so_many_jobs_one_at_a_time(here, raw):
    one = fleet(here, "--recycle-jobs", "5", processes=3)
    count = 0
    while len({event["runner"] for event in one.events("process.recycled", count=0)}) < 3:
        put(raw, here, "short", 30)
        count += 30
        one.events("try", count=count, outcome="success")
    one.events("process.recycled", count=3)
    one.signal(signal.SIGTERM)
    assert one.wait() == 0
    jobs = list(raw.find({"kind": "short"}))
    assert [job["status"] for job in jobs] == [4] * count
    for job in jobs:  # what was held and had not begun was put back, and no attempt used
        assert {entry.get("outcome") for entry in job["tries"][:-1]} <= {"released"}
        assert "outcome" not in job["tries"][-1]
    under_way = None
    for line in map(json.loads, one.err):
        if line["event"] == "process.recycled":
            assert under_way is None, "two at once"
            assert (line["reason"], line["count"]) == ("jobs", 5)
            under_way = line["runner"]
        elif line["event"] == "process.ended":
            assert line["level"] == "info", line
        elif line["event"] == "process.started" and line["runner"] == under_way:
            under_way = None  # the next waits for its runner.started too, whose line may come a little later


def test_a_process_that_has_grown_is_recycled(here, raw):
    one = fleet(here, "--recycle-memory", "250", processes=1)
    put(raw, here, "grow", mb=300)
    (event,) = one.events("process.recycled")
    assert event["reason"] == "memory"
    assert event["memory"] >= 250
    one.events("runner.started", count=2)


def test_a_recycled_process_drains_first(here, raw):
    one = fleet(here, "--recycle-jobs", "1", processes=1)
    (long,) = put(raw, here, "long")
    one.events("begun")
    put(raw, here, "short")
    one.events("process.recycled")
    one.events("runner.stopping")
    one.signal(signal.SIGTERM)  # the first: the drain that is under way goes on
    one.events("supervisor.stopping")
    assert raw.find_one({"_id": long})["status"] == 2
    one.signal(signal.SIGTERM)
    assert one.wait() == 0
    assert raw.find_one({"_id": long})["tries"][0]["outcome"] == "interrupted"


def test_memory_is_that_of_the_process(here):
    own = resident(os.getpid())
    kept = bytearray(os.urandom(1000) * 50_000)
    assert 40 < resident(os.getpid()) - own < 80
    assert len(kept) == 50_000_000
    assert resident(2**22 + 1) == 0


# ---- health


def test_health_is_as_old_as_the_oldest_of_all(here, tmp_path):
    path = tmp_path / "health"
    one = Supervisor(plan(here, health=path))
    one._places = [supervise._Place(f"fleet-{n}", tmp_path / f"health-{n}") for n in (1, 2)]
    one._look()
    assert not path.exists()
    for place, age in zip(one._places, (100, 200), strict=True):
        place.health.touch()
        os.utime(place.health, (1_700_000_000 - age,) * 2)
    one._look()
    assert path.stat().st_mtime == 1_700_000_000 - 200
    os.utime(one._places[1].health, (1_700_000_000,) * 2)
    one._look()
    assert path.stat().st_mtime == 1_700_000_000 - 100
    one._places[0].health.unlink()
    os.utime(one._places[1].health, (1_700_000_009,) * 2)
    one._look()
    assert path.stat().st_mtime == 1_700_000_000 - 100
    one._forget_health()
    assert list(tmp_path.glob("health*")) == []


def test_the_health_file_is_there_while_all_run_and_gone_after(here):
    path = Path(here.folder) / "health"
    path.touch()  # of one that was killed
    one = fleet(here, "--health-file", str(path))
    assert {file.name for file in here.folder.glob("health-*")} == {"health-1", "health-2"}
    one.signal(signal.SIGTERM)
    assert one.wait() == 0
    assert list(here.folder.glob("health*")) == []
