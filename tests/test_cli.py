"""The commands on jobs, each as a process of its own."""

import json
import re
import sys

import pytest
from bson import json_util
from bson.objectid import ObjectId

from streamjobs import __version__
from tests.command import Place


@pytest.fixture
def here(tmp_path, uri, namespace):
    with Place(tmp_path, uri, namespace) as place:
        yield place


def error_of(done):
    lines = done.stderr.strip().split("\n")
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


# ---- put, list, show, stats, retry, cancel, indexes


def test_version_and_help(here):
    assert here.call("--version").stdout.strip() == f"streamjobs {__version__}"
    text = here.call("--help").stdout
    for word in (
        "run",
        "dev",
        "demo",
        "put",
        "list",
        "show",
        "stats",
        "retry",
        "cancel",
        "indexes",
        "doctor",
    ):
        assert re.search(rf"\b{word}\b", text)
    assert "STREAMJOBS_URI" in text
    assert "Exit codes" in text


def test_put_writes_what_it_was_told(here, raw):
    done = here.call(
        "put", "resize", '{"image": {"$numberLong": "7"}, "at": {"$date": "2026-01-01T00:00:00Z"}}'
    )
    job = raw.find_one()
    assert done.stdout.split()[:3] == [str(job["_id"]), "resize", "new"]
    assert job["data"]["image"] == 7
    assert job["data"]["at"].year == 2026
    assert job["runat"].year == 1

    told = here.put("resize", "{}", "--in", "2h", "--retries", "3", "--retry-interval", "1.5m")
    job = raw.find_one({"_id": told["_id"]})
    assert round((job["runat"] - job["created"]).total_seconds()) == 7200
    assert (job["retries"], job["retryinterval"]) == (3, 90_000_000_000)

    told = here.put("resize", "--at", "2040-01-01T00:00:00+02:00")
    assert raw.find_one({"_id": told["_id"]})["runat"].isoformat() == "2039-12-31T22:00:00+00:00"


def test_put_reads_data_from_stdin_and_settings_from_the_app(here, raw):
    here.call("put", "hello", "-", "--app", "app:jobs", stdin='{"name": "Ada"}')
    job = raw.find_one()
    assert job["data"] == {"name": "Ada"}
    assert (job["retries"], job["retryinterval"]) == (4, 2_000_000_000)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["helo"], "KIND: did you mean hello? app:jobs has handlers for hello, long, stuck"),
        (["mail", "{}"], "KIND: app:jobs has handlers for"),
    ],
)
def test_put_for_an_app_refuses_a_kind_that_it_does_not_run(here, raw, words, said):
    assert said in error_of(here.call("put", *words, "--app", "app:jobs", code=2))
    assert raw.find_one() is None


def test_put_for_an_app_refuses_data_that_its_handler_would_not_take(here, raw):
    (here.folder / "typed.py").write_text(
        'from streamjobs import Queue\njobs = Queue("mongodb://127.0.0.1:1", "app.jobs")\n'
        '@jobs.handler("mail")\ndef mail(to: str): ...\n'
    )
    for data, said in (("{}", "parameter 'to' is missing"), ('{"to": 7}', "parameter 'to' of a 'mail' job")):
        assert said in error_of(here.call("put", "mail", data, "--app", "typed:jobs", code=2))
    assert raw.find_one() is None
    here.call("put", "mail", '{"to": "ann"}', "--app", "typed:jobs")
    assert raw.find_one()["data"] == {"to": "ann"}


#: Python's parser refuses a depth like this before 3.14; from then on it reads it, and put refuses it.
TOO_DEEP = "JSON: it is nested too deeply" if sys.version_info < (3, 14) else "data: nest it at most 90 deep"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["put", "a", "[1]"], "JSON: give an object"),
        (["put", "a", "{"], "JSON: it is no Extended JSON"),
        (["put", "a", '{"$oid": "x"}'], "JSON:"),
        (["put", "a", '{"a":' * 20_000 + "1" + "}" * 20_000], TOO_DEEP),
        (["put", "", "{}"], "kind: give a text"),
        (["put", "a", "--in", "soon"], "--in: give a span"),
        (["put", "a", "--at", "2030-01-01T00:00:00"], "--at: give an ISO time with an offset"),
        (["put", "a", "--at", "2030-01-01T00:00:00Z", "--in", "5"], "give --at or --in, not both"),
        (["put", "a", "--retries", "-1"], "retries: give a whole number"),
        (["list", "--status", "odd"], "status: give one of new, working"),
        (["list", "--limit", "0"], "limit: give a whole number"),
        (["list", "--collection", "nonsense"], "--collection: give database.collection"),
        (["list", "--uri", "nonsense"], "the MongoDB URI can't be used"),
    ],
)
def test_usage_is_refused_in_one_line(here, command, said):
    assert said in error_of(here.call(*command, code=2))


def test_list_selects(here, raw):
    first = here.put("a")["_id"]
    later = here.put("b", "--in", "1h")["_id"]
    third = here.put("a")["_id"]
    raw.update_one({"_id": third}, {"$set": {"status": 5}})

    def listed(*options):
        return [job["_id"] for job in json_util.loads(here.call("list", "--json", *options).stdout)]

    assert listed() == [third, later, first]
    assert listed("--kind", "b") == [later]
    assert listed("--status", "failed") == [third]
    assert listed("--due") == [first]
    assert listed("--not-due") == [later]
    done = here.call("list", "--limit", "2")
    assert sum(str(one) in done.stdout for one in (first, later, third)) == 2
    assert "--limit" in done.stderr
    assert here.call("list", "--kind", "none").stdout.strip() == "no jobs"
    assert here.call("list", "--kind", "none", "--json").stdout.strip() == "[]"


def test_show_tells_the_story(here, raw):
    runner = here.run()
    runner.event("runner.started")
    id_ = str(here.put("hello", '{"fail": "no\\nway", "when": {"$date": "2026-01-01T00:00:00Z"}}')["_id"])
    runner.event("try")  # the handler's own line, which is named so
    runner.event("try")
    text = here.call("show", id_).stdout
    for part in (id_, "hello", "failed", "failure", "claimed 20", "started 20", "ended 20", "ValueError: no"):
        assert part in text
    document = json_util.loads(here.call("show", id_, "--json").stdout)
    assert document == json_util.loads(json_util.dumps(raw.find_one({"_id": ObjectId(id_)})))


def test_an_id_that_is_not_there_is_3(here, raw):
    raw.insert_one({"_id": "mine", "status": 1, "kind": "a", "data": {}, "runat": raw_date(), "retries": 0})
    assert "mine" in here.call("show", "mine").stdout
    for command in ("show", "retry", "cancel"):
        assert "no job with _id" in error_of(here.call(command, str(ObjectId()), code=3))
    assert "no job with _id 'x'" in error_of(here.call("show", "x", code=3))
    raw.insert_one({"_id": "broken", "kind": 3})
    assert "can't be a job" in error_of(here.call("show", "broken", code=1))


def raw_date():
    return json_util.loads('{"$date": "2026-01-01T00:00:00Z"}')


def test_retry_and_cancel(here, raw):
    id_ = here.put("a", "--in", "1h")["_id"]
    assert "cancelled" in here.call("cancel", str(id_), "--reason", "no need").stdout
    assert raw.find_one()["status"] == 6
    assert "no need" in here.call("show", str(id_)).stdout
    assert "it is cancelled" in error_of(here.call("cancel", str(id_), code=4))
    assert json_util.loads(here.call("retry", str(id_), "--json").stdout)["status"] == 1
    raw.update_one({}, {"$set": {"status": 2}})
    assert "--force" in error_of(here.call("retry", str(id_), code=4))
    assert " new" in here.call("retry", str(id_), "--force").stdout


def test_stats(here):
    assert here.call("stats").stdout.strip() == "no jobs"
    for kind in ("a", "a", "b"):
        here.put(kind)
    assert json.loads(here.call("stats", "--json").stdout) == {"a": {"new": 2}, "b": {"new": 1}}
    assert [line.split() for line in here.call("stats").stdout.strip().split("\n")] == [
        ["kind", "new", "all"], ["a", "2", "2"], ["b", "1", "1"],
    ]  # fmt: skip


def test_indexes(here, raw):
    done = here.call("indexes", code=1)
    assert done.stdout.count("missing") == 3
    assert "--create" in done.stderr
    assert [one["there"] for one in json.loads(here.call("indexes", "--json", code=1).stdout)] == [False] * 3
    assert here.call("indexes", "--create").stdout.count("made") == 3
    assert "due" in raw.index_information()
    told = json.loads(here.call("indexes", "--create", "--json").stdout)
    assert [(one["name"], one["there"], one["made"]) for one in told] == [
        ("due", True, False), ("owner", True, False), ("control", True, False),
    ]  # fmt: skip
    assert told[0]["keys"] == {"kind": 1, "status": 1, "runat": 1, "created": 1, "_id": 1}


def test_a_hostile_job_commands_no_terminal(here, raw):
    hostile = "a\x1b[31m[bold]b[/bold]\x9b2J\u202e\r\x07"
    id_ = here.put(hostile, json.dumps({hostile: hostile}), "--in", "1h")["_id"]
    tries = [{"runner": hostile, "when": raw_date(), "err": hostile, "trace": hostile, "outcome": hostile}]
    raw.update_one({}, {"$set": {"tries": tries, "status": 5}})
    other = here.put(hostile, "--in", "1h")["_id"]
    outputs = [here.call("list"), here.call("cancel", str(other), "--reason", hostile)]
    colours = {"FORCE_COLOR": "1", "TERM": "xterm-256color"}
    commands = (["list"], ["show", str(id_)], ["show", str(other)], ["stats"])
    outputs += [here.call(*command, env=colours) for command in commands]
    outputs.append(here.call("cancel", str(id_), env=colours, code=4))
    for done in outputs:
        text = done.stdout + done.stderr
        for bad in ("\x1b[31m[bold]", "\x9b", "\u202e", "\r", "\x07"):
            assert bad not in text
        assert "[bold]b[/bold]" in text or "error" in text
    assert "\\x1b[31m[bold]b[/bold]\\x9b2J\\u202e\\r"[:24] in outputs[0].stdout


# ---- no server, wrong names


def test_no_server_is_told_quickly_and_without_the_password(here):
    bad = "mongodb://bob:s3cret%2Fx@127.0.0.1:1/?replicaSet=rs0"
    said = error_of(here.call("put", "a", "--uri", bad, code=1))
    assert "127.0.0.1:1" in said
    assert "--uri or STREAMJOBS_URI" in said
    assert "s3cret" not in said
    said = error_of(here.call("stats", "--app", "app:jobs", place=False, code=1))
    assert "app.jobs" in said
    assert "s3cret" not in said


@pytest.mark.parametrize(
    "bad", ["mongodb://bob:s3cret@@h", "mongodb://bob:s3c/ret@h", "mongodb://bob:s3cret@h:x"]
)
def test_a_wrong_uri_is_refused_without_the_password(here, bad):
    for command in (["list", "--uri", bad], ["run", "app:jobs", "--uri", bad]):
        said = error_of(here.call(*command, code=2))
        assert not re.search("s3c|ret@", said)


@pytest.mark.parametrize(
    ("target", "said", "code"),
    [
        ("app", "as in app:jobs", 2),
        ("nowhere:jobs", "no module nowhere", 2),
        ("app:nothing", "it has app:jobs", 2),
        ("app:number", "this is a int", 2),
        ("broken:jobs", "ZeroDivisionError: division by zero", 1),
        ("missing:jobs", "No module named 'not_installed'", 1),
    ],
)
def test_a_wrong_target_is_told(here, target, said, code):
    (here.folder / "broken.py").write_text("1 / 0")
    (here.folder / "missing.py").write_text("import not_installed")
    for command in (["run", target], ["dev", target], ["list", "--app", target]):
        assert said in error_of(here.call(*command, code=code))


def test_an_app_without_handlers_is_told(here):
    (here.folder / "empty.py").write_text(
        'from streamjobs import Queue\njobs = Queue("mongodb://h", "app.jobs")\n'
    )
    for command in (["run", "empty:jobs"], ["dev", "empty:jobs"]):
        assert "register some with @queue.handler" in error_of(here.call(*command, code=2))


def test_a_collection_alone_does_not_move_an_app(here):
    assert "give --uri" in error_of(here.call("run", "app:jobs", "--collection", "x.y", place=False, code=2))


def test_settings_that_cannot_work_are_refused(here):
    assert "lease" in error_of(here.call("run", "app:jobs", "--lease", "1", code=2))
