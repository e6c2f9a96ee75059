"""The doctor as a whole: nothing left behind, levels, limits."""

from __future__ import annotations

import asyncio
import json
import re
from datetime import UTC, datetime, timedelta

import pytest

from streamjobs import BadArgument, doctor
from streamjobs.doctor import Finding, Level, examine, worst
from streamjobs.doctor.finding import listed, since
from tests.command import Place
from tests.doctored import APP, see
from tests.documents import plain, stored
from tests.test_lease import held_job


async def test_where_all_is_well_no_line_warns_and_nothing_is_left(queue, raw, seen):
    queue.handler("mail")(lambda job: None)
    async with queue.running("w"):
        await queue.put("mail")
        await seen.wait("try", outcome="success")
        before = list(raw.find({"control": None}))
        found = await asyncio.to_thread(see, queue.source)
    assert {one.level for one in found.values()} <= {Level.OK, Level.SKIP}, found
    assert worst(found.values()) in (Level.OK, Level.SKIP)
    assert not any(one.fix for one in found.values())
    assert "mail" in found["runners"].text
    assert list(raw.find()) == before
    assert not seen.of("job.unreadable")


def test_on_a_collection_that_is_not_there_nothing_is_made(source, raw):
    found = see(source)
    assert raw.database.name not in raw.database.client.list_database_names()
    assert found["collection"].fix == f"streamjobs indexes --create --collection {source.namespace}"
    assert (found["collection"].level, found["stream"].level) == (Level.WARN, Level.SKIP)
    assert found["unserved kinds"].level is Level.SKIP


def test_what_a_killed_doctor_left_is_removed_and_what_another_just_wrote_is_not(source, raw):
    old = datetime.now(UTC) - timedelta(minutes=5)
    raw.insert_many(
        [
            {"_id": "doctor:old", "control": "doctor", "made": old},
            {"_id": "doctor:new", "control": "doctor", "made": datetime.now(UTC)},
            {"_id": "doctor:other", "made": old},
        ]
    )
    assert see(source)["stream"].level is Level.OK
    assert [one["_id"] for one in raw.find()] == ["doctor:new", "doctor:other"]


def test_the_worst_level_is_the_worst():
    def level(*levels):
        return worst(Finding("", one, "") for one in levels)

    assert level() is Level.OK
    assert level(Level.OK, Level.SKIP) is Level.SKIP
    assert level(Level.FAIL, Level.WARN, Level.OK) is Level.FAIL


@pytest.mark.parametrize("margin", [-1, float("nan"), 1e9])
def test_a_margin_that_is_none_is_refused(source, margin):
    with pytest.raises(BadArgument, match="margin"):
        next(examine(source, margin=margin))


def test_a_check_that_takes_too_long_is_given_up_and_the_others_go_on(source, raw, failpoint, monkeypatch):
    stored(raw)
    monkeypatch.setattr(doctor, "_LIMIT", 2.0)
    failpoint("alwaysOn", APP, ["count"], blockConnection=True, blockTimeMS=5000)
    found = see(source)
    assert found["unreadable"].level is Level.WARN
    assert "given up after" in found["unreadable"].text
    assert found["index due"].level is Level.FAIL


def test_an_error_of_the_server_is_a_finding(source, raw, failpoint):
    stored(raw)
    failpoint("alwaysOn", APP, ["count"], errorCode=6)
    assert "could not be looked at" in see(source)["lost tries"].text


def test_spans_and_lists():
    spans = [0.4, 42, 999, 1300, 59_000, 90_000, 600_000, 7_200_000, 864_000_000]
    assert [since(one) for one in spans] == [
        "0.4 ms", "42 ms", "999 ms", "1.3 s", "59 s", "90 s", "10 min", "2 h", "10 d",
    ]  # fmt: skip
    assert listed(["a"]) == "a"
    assert listed(list("abcdefg")) == "a, b, c, d, e and 2 more"


# ---- the command


@pytest.fixture
def here(tmp_path, uri, namespace):
    with Place(tmp_path, uri, namespace) as place:
        yield place


def test_the_command_says_each_line_and_ends_with_the_worst(here, raw):
    here.call("indexes", "--create")
    told = here.call("doctor", code=5).stdout
    assert re.search(r"^warn  runners +none is alive: ", told, re.MULTILINE)
    assert "      fix: streamjobs run MODULE:NAME" in told
    assert told.splitlines()[-1].startswith("1 to look at, ")
    here.run().event("runner.started")
    told = here.call("doctor").stdout
    assert re.search(r"^ok    runners +1 alive: .*\(10 slots: hello, long, stuck\)", told, re.MULTILINE)
    raw.drop_index("due")
    assert re.search(r"^fail  index due ", here.call("doctor", code=1).stdout, re.MULTILINE)
    told = json.loads(here.call("doctor", "--json", code=1).stdout)
    assert (told["level"], told["collection"]) == ("fail", f"{raw.database.name}.jobs")
    (due,) = [one for one in told["findings"] if one["name"] == "index due"]
    assert due == {
        "name": "index due", "level": "fail", "fix": f"streamjobs indexes --create --collection {raw.database.name}.jobs",
        "text": "missing: it serves finding what is due, listing and counting by kind and status",
    }  # fmt: skip


def test_the_command_folds_its_lines_under_their_beginning(here):
    here.call("indexes", "--create")
    lines = here.call("doctor", env={"COLUMNS": "70"}, code=5).stdout.splitlines()
    assert max(map(len, lines)) <= 70
    assert sum(line.startswith(" " * 30) for line in lines) >= 2


def test_the_command_without_a_server_or_with_a_wrong_setting(here):
    told = here.call("doctor", "--uri", "mongodb://bob:s3cret@127.0.0.1:1/", code=1)
    assert "fail  reachable" in told.stdout
    assert "s3cret" not in told.stdout + told.stderr
    assert "margin: give seconds" in here.call("doctor", "--margin", "-1", code=2).stderr
    assert "can't be used" in here.call("doctor", "--uri", "nonsense", code=2).stderr


def test_a_hostile_document_commands_no_terminal(here, raw):
    hostile = "a\x1b[31m[bold]b[/bold]\x9b2J\u202e\r\x07"
    here.call("indexes", "--create")
    stored(raw, kind=hostile)
    raw.insert_one({**plain(), "_id": hostile, "kind": 3})
    held_job(raw, hostile)
    stored(raw, status=2, lease={"owner": 7}, kind=hostile)
    raw.insert_one({"_id": f"runner:{hostile}", "control": "runner", "name": hostile, "kinds": [hostile]})
    told = here.call("doctor", env={"FORCE_COLOR": "1", "TERM": "xterm-256color"}, code=5).stdout
    assert "[bold]b[/bold]" in told
    for bad in ("\x1b[31m[bold]", "\x9b", "\u202e", "\r", "\x07"):
        assert bad not in told
