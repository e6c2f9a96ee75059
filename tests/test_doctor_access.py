"""The doctor's checks of privileges, indexes and the stream, each in its good and its bad state."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from pymongo import MongoClient

from streamjobs import Queue
from streamjobs.clients import Source
from streamjobs.doctor import Level, access, examine
from streamjobs.embedded import Server
from streamjobs.indexes import command
from tests.doctored import APP, see
from tests.documents import stored


@pytest.mark.parametrize("name", ["due", "owner", "control"])
async def test_a_missing_index_is_told(queue, raw, name):
    raw.drop_index(name)
    found = await asyncio.to_thread(see, queue.source)
    wrong = [one for one in found.values() if one.name.startswith("index") and one.level is not Level.OK]
    assert [(one.name, one.level, one.fix) for one in wrong] == [
        (f"index {name}", Level.FAIL, command(queue.source.namespace))
    ]


async def test_an_index_that_the_server_does_not_use_is_told(queue, raw):
    raw.drop_index("control")
    raw.create_index("control", name="part", partialFilterExpression={"control": "x"})
    found = await asyncio.to_thread(see, queue.source)
    assert "partialFilterExpression" in found["index control"].text
    assert "dropIndex('part')" in found["index control"].fix


@pytest.mark.parametrize(("code", "fix"), [(13, "deploy/role.js"), (40573, "--poll")])
def test_a_refused_stream_is_told(source, raw, failpoint, code, fix):
    stored(raw)
    failpoint("alwaysOn", APP, ["aggregate"], errorCode=code)
    found = see(source)
    assert (found["stream"].level, fix in found["stream"].fix) == (Level.FAIL, True)


def test_an_event_that_comes_late_is_told(source, raw, failpoint):
    stored(raw)
    failpoint({"times": 1}, APP, ["getMore"], blockConnection=True, blockTimeMS=1200)
    found = see(source)
    assert (found["stream"].level, "replication lag" in found["stream"].fix) == (Level.WARN, True)


def test_an_event_that_does_not_come_is_told_and_nothing_is_left(source, raw, monkeypatch):
    id_ = stored(raw)
    monkeypatch.setattr(access, "_WAIT", 0)
    found = see(source)
    assert (found["stream"].level, "no event" in found["stream"].text) == (Level.FAIL, True)
    assert [one["_id"] for one in raw.find()] == [id_]


# ---- privileges


ACTIONS = ["find", "insert", "update", "remove", "changeStream", "listIndexes"]


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """A server that wants users: one with all six actions, one without each, an administrator."""
    folder = tmp_path_factory.mktemp("guarded")
    one = Server(folder)
    one.start()
    with MongoClient(one.uri) as client:
        client.app.command("createUser", "admin", pwd="p", roles=[{"role": "root", "db": "admin"}])
        for missing in [None, *ACTIONS]:
            given = [action for action in ACTIONS if action != missing]
            where = {"db": "app", "collection": "jobs"}
            grants = [{"resource": where, "actions": given}]
            client.app.command("createRole", f"no_{missing}", privileges=grants, roles=[])
            client.app.command("createUser", f"no_{missing}", pwd="p", roles=[f"no_{missing}"])
    queue = Queue(one.uri, "app.jobs")
    queue.sync.create_indexes()
    queue.sync.close()
    one.stop()
    one._options += ["--auth"]
    if one.program.sort == "mongod":
        key = folder / "key"
        key.write_text("k" * 64)
        key.chmod(0o600)
        one._options += ["--keyFile", str(key)]
    one.start()
    yield one
    one.kill()


def as_user(guarded: Server, name: str, password: str = "p") -> Source:
    joint = "&" if "?" in guarded.uri else "?"
    uri = guarded.uri.replace("//", f"//{name}:{password}@") + f"{joint}authSource=app"
    return Source(uri, "app.jobs", None)


def left(guarded: Server) -> list[Any]:
    with MongoClient(as_user(guarded, "admin").uri) as client:
        return list(client.app.jobs.find())


def test_the_role_of_a_runner_is_enough_for_all_but_what_it_may_not_see(guarded):
    found = see(as_user(guarded, "no_None"))
    for action in ACTIONS:
        assert found[f"privilege {action}"].level is Level.OK
    for name in ("stream", "index due", "index owner", "index control", "unreadable", "held without lease"):
        assert found[name].level is Level.OK, found[name]
    assert (found["oplog"].level, "read on database local" in found["oplog"].text) == (Level.SKIP, True)
    assert (found["pool"].level, "serverStatus" in found["pool"].text) == (Level.OK, True)
    assert left(guarded) == []


@pytest.mark.parametrize("action", ACTIONS)
def test_each_privilege_that_is_missing_is_told_and_nothing_is_left(guarded, action):
    if action == "changeStream" and guarded.program.sort == "python":
        pytest.skip("this server opens a stream for who may find")
    found = see(as_user(guarded, f"no_{action}"))
    wrong = [one for one in found.values() if one.name.startswith("privilege") and one.level is not Level.OK]
    names = {one.name for one in wrong}
    assert f"privilege {action}" in names
    assert names <= {f"privilege {action}", "privilege changeStream"}  # for which find is half
    for one in wrong:
        assert one.level is Level.FAIL
        assert one.fix.startswith("STREAMJOBS_DATABASE=app STREAMJOBS_COLLECTION=jobs mongosh")
        assert "streamjobsRunner" in one.fix
    if action in ("remove", "insert"):
        assert found["stream"].level is Level.SKIP
    assert left(guarded) == []


def test_a_wrong_password_and_no_user_are_told_apart(guarded):
    (found,) = examine(as_user(guarded, "admin", "wrong"))
    assert (found.level, "authSource" in found.fix) == (Level.FAIL, True)
    (fail, *_) = [one for one in examine(Source(guarded.uri, "app.jobs", None)) if one.level is Level.FAIL]
    assert (fail.name, fail.fix) == ("privilege find", "give user and password in the URI")
