"""The doctor's checks of the server, each in its good and its bad state."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from bson.timestamp import Timestamp
from pymongo import MongoClient
from pymongo.errors import PyMongoError, ServerSelectionTimeoutError

from streamjobs.clients import Source
from streamjobs.clock import wall
from streamjobs.doctor import Finding, Level, examine, finding, server
from streamjobs.doctor.finding import Only
from streamjobs.embedded import Server
from tests.doctored import failing, see


def test_no_server_is_the_only_finding(monkeypatch, driver_litter):
    monkeypatch.setattr(server, "_ANSWER", 0.2)
    (found,) = examine(Source("mongodb://127.0.0.1:1/", "a.b", None))
    assert (found.name, found.level) == ("reachable", Level.FAIL)
    assert "STREAMJOBS_URI" in found.fix


def test_a_set_without_a_primary_is_told_from_no_server():
    client = SimpleNamespace(
        admin=SimpleNamespace(command=failing(ServerSelectionTimeoutError("none"))),
        topology_description=SimpleNamespace(topology_type_name="ReplicaSetNoPrimary"),
    )
    (found,) = server.reachable(SimpleNamespace(client=client))
    assert "rs.status()" in found.fix


def test_a_secondary_is_told():
    hello = {"isWritablePrimary": False}
    client = SimpleNamespace(admin=SimpleNamespace(command=lambda _: hello))
    (found,) = server.reachable(SimpleNamespace(client=client, server=finding.ServerClock(), hello={}))
    assert (found.level, "directConnection" in found.fix) == (Level.FAIL, True)


def test_a_standalone_is_told_how_to_become_a_replica_set(tmp_path):
    alone = Server(tmp_path / "alone", options=["--standalone"])
    if alone.program.sort == "mongod":
        pytest.skip("a mongod standalone is a matter of --replSet, which the embedded file always gives")
    alone.start()
    try:
        found = see(Source(alone.uri, "app.jobs", None))
    finally:
        alone.kill()
    assert found["topology"].level is Level.FAIL
    assert "rs.initiate()" in found["topology"].fix
    for name in ("stream", "oplog", "privilege insert"):
        assert (found[name].level, "standalone" in found[name].text) == (Level.SKIP, True)


def topology_of(kind: str = "ReplicaSetWithPrimary", **hello: Any) -> Finding:
    client = SimpleNamespace(topology_description=SimpleNamespace(topology_type_name=kind))
    subject = finding.Subject(source=None, client=client, only=Only(), margin=2, hello=hello)
    (found,) = server.topology(subject)
    return found


def test_sets_and_clusters():
    assert topology_of(setName="rs0", hosts=["a:1"]).level is Level.OK
    told = topology_of("Single", setName="rs0", hosts=["a:1", "b:1"])
    assert (told.level, "directConnection" in told.fix) == (Level.WARN, True)
    assert "unsharded" in topology_of(msg="isdbgrid").text


@pytest.mark.parametrize(
    ("told", "wire", "level"),
    [("5.0.31", 13, Level.FAIL), ("6.0.0", 17, Level.OK), ("8.2.1-rc0", 27, Level.OK), (None, 13, Level.FAIL), (None, 17, Level.OK)],
)  # fmt: skip
def test_versions(told, wire, level):
    command = failing(PyMongoError("no")) if told is None else lambda _: {"version": told}
    client = SimpleNamespace(admin=SimpleNamespace(command=command))
    (found,) = server.version(SimpleNamespace(client=client, hello={"maxWireVersion": wire}))
    assert found.level is level


def test_what_the_uri_says_of_concerns_is_told_to_be_overridden(uri, namespace):
    joint = "&" if "?" in uri else "?"
    more = f"{uri}{joint}w=1&readPreference=secondary&readConcernLevel=majority"
    found = see(Source(more, namespace, None))
    for said in ("w=1", "readPreference=secondary", "readConcernLevel=majority"):
        assert said in found["concerns"].text
    assert found["concerns"].level is Level.OK
    assert found["oplog"].level is Level.OK  # asked at the primary, whatever the URI prefers


def test_a_factory_that_drops_our_options_is_told(uri, raw):
    def factory(cls: Any, **options: Any) -> Any:
        options |= {"retryWrites": False, "maxPoolSize": 2}
        return cls(uri, **options)

    found = see(Source(raw, None, factory))
    assert (found["concerns"].level, found["pool"].level) == (Level.FAIL, Level.FAIL)
    assert "2 connections" in found["pool"].text


def test_a_pool_of_one_is_told(uri, namespace):
    more = f"{uri}{'&' if '?' in uri else '?'}maxPoolSize=1"
    assert see(Source(more, namespace, None))["pool"].level is Level.WARN


@pytest.mark.parametrize(("free", "level"), [(5, Level.WARN), (800_000, Level.OK), (0, Level.OK)])
def test_connections_that_the_server_has_left(source, free, level, uri):
    with MongoClient(uri, connect=False) as client:
        status = {"connections": {"available": free, "current": 7}}
        fake = SimpleNamespace(options=client.options, admin=SimpleNamespace(command=lambda _: status))
        (found,) = server.pool(SimpleNamespace(client=fake, source=source))
    assert (found.level, "7" in found.text) == (level, True)


@pytest.mark.parametrize(
    ("offsets", "members", "host"),
    [
        ({"a:1": (5, 1)}, Level.OK, Level.OK),
        ({"a:1": (5, 1), "b:1": (7, 1)}, Level.OK, Level.OK),
        ({"a:1": (0, 1), "b:1": (1500, 1), "c:1": (3, 1)}, Level.WARN, Level.OK),
        ({"a:1": (-1100, 1), "b:1": (1100, 1)}, Level.FAIL, Level.OK),
        ({"a:1": (0, 1), "b:1": (2001, 500)}, Level.WARN, Level.OK),  # perhaps, perhaps not
        ({"a:1": (0, 1), "b:1": (0, 1500)}, Level.WARN, Level.OK),  # too slow to tell
        ({"a:1": (9000, 1), "b:1": (9001, 1)}, Level.OK, Level.WARN),
        ({"a:1": (-9000, 1)}, Level.OK, Level.WARN),
    ],
)
def test_clocks_against_the_margin(offsets, members, host):
    found = server.judge(offsets, 2.0)
    assert [one.level for one in found] == [members, host]


def test_the_hosts_clock_is_measured(source, monkeypatch):
    found = see(source)
    assert (found["clocks"].level, found["this host's clock"].level) == (Level.OK, Level.OK)
    monkeypatch.setattr("streamjobs.clock.wall", lambda: wall() + 10)
    found = see(source)
    assert (found["clocks"].level, found["this host's clock"].level) == (Level.OK, Level.WARN)
    seconds = re.match(r"([\d.]+) s ahead of the server's", found["this host's clock"].text)
    assert seconds, found["this host's clock"].text
    assert float(seconds[1]) == pytest.approx(10, abs=1)
    assert found["this host's clock"].fix


def test_each_member_is_asked_by_itself_and_a_silent_one_is_told():
    """Members of the topology in turn: what the selector lets through, and who does not answer."""
    only, asked = Only(), []
    descriptions = {
        (host, 1): SimpleNamespace(address=(host, 1), server_type_name=sort)
        for host, sort in (("a", "RSPrimary"), ("b", "RSSecondary"), ("c", "Unknown"), ("d", "RSArbiter"))
    }

    def command(_: str, **__: Any) -> dict[str, Any]:
        (one,) = only(list(descriptions.values()))
        asked.append(one.address[0])
        if one.address[0] == "c":
            raise ServerSelectionTimeoutError("no answer")
        ahead = 5 if one.address[0] == "b" else 0
        return {"localTime": datetime.now(UTC) + timedelta(seconds=ahead)}

    client = SimpleNamespace(
        admin=SimpleNamespace(command=command),
        topology_description=SimpleNamespace(server_descriptions=lambda: descriptions),
    )
    found = server.clocks(SimpleNamespace(client=client, only=only, margin=2.0, sharded=False))
    assert set(asked) == {"a", "b", "c"}
    assert [found[0].level, found[2].level] == [Level.FAIL, Level.WARN]
    assert "b:1 is 5.0 s ahead of a:1" in found[0].text
    assert "c:1 does not answer" in found[2].text
    assert len(only(list(descriptions.values()))) == 4


@pytest.mark.parametrize(
    ("seconds", "young", "level"),
    [(60, True, Level.OK), (60, False, Level.WARN), (86_400, False, Level.OK)],
)
def test_windows_of_the_oplog(seconds, young, level):
    found = server.judge_oplog(seconds, young=young)
    assert (found.level, bool(found.fix)) == (level, level is Level.WARN)


@pytest.mark.parametrize(
    ("first", "stats", "level"),
    [
        ({"ts": Timestamp(1000, 1), "o": {"msg": "initiating set"}}, {"maxSize": 100, "size": 99}, Level.OK),
        ({"ts": Timestamp(1000, 1), "o": {}}, {"maxSize": 100, "size": 99}, Level.WARN),
        ({"ts": Timestamp(1000, 1), "o": {}}, {"maxSize": 100, "size": 50}, Level.OK),
        ({"ts": Timestamp(1000, 1), "o": {}}, {}, Level.OK),
        (None, {}, Level.SKIP),
    ],
)
def test_an_oplog_that_is_not_full_has_dropped_nothing(first, stats, level):
    local = SimpleNamespace(command=lambda *_: stats)
    database = {"oplog.rs": SimpleNamespace(find_one=lambda *_, **__: first)}
    client = SimpleNamespace(get_database=lambda *_, **__: database, local=local)
    hello = {"setName": "rs0", "lastWrite": {"opTime": {"ts": Timestamp(1060, 1)}}}
    subject = finding.Subject(source=None, client=client, only=Only(), margin=2, hello=hello)
    (found,) = server.oplog(subject)
    assert found.level is level
