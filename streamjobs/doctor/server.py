"""Checks of the server and of the way to it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, cast

import pymongo
from bson.timestamp import Timestamp
from pymongo import MongoClient, ReadPreference
from pymongo.errors import OperationFailure, PyMongoError
from pymongo.read_concern import ReadConcern
from pymongo.uri_parser import parse_uri

from streamjobs import clock
from streamjobs.doctor.finding import Finding, Level, Subject, since, utc_ms

#: What a runner's own client needs: the stream keeps a connection, and so do a claim, outcomes and reads.
LEAST_POOL = 5
_LEAST_VERSION = (6, 0)
_LEAST_WIRE = 17  # MongoDB 6.0's
_ANSWER = 5.0  # seconds that a server gets to answer at all
_SAMPLES = 5
_WINDOW = 3_600.0  # seconds of oplog under which a runner's outage would often be a gap
_FULL = 0.9
_FEW = 100
_OVERRIDDEN = ("w", "j", "journal", "wtimeoutMS", "readPreference", "readConcernLevel", "retryReads")


def reachable(subject: Subject) -> list[Finding]:
    """Whether a primary answers, and lets this user in."""
    name = "reachable"
    try:
        with pymongo.timeout(_ANSWER):
            _greet(subject)  # pays for connecting
            took = _greet(subject)
    except PyMongoError as error:
        return [Finding(name, Level.FAIL, f"no answer: {short(error)}", _why_not(subject, error))]
    if subject.hello.get("isWritablePrimary") is False:
        fix = "name the replica set in the URI (replicaSet=...), and leave directConnection=true out"
        return [Finding(name, Level.FAIL, "the server that answers is not the primary", fix)]
    seen = subject.client.topology_description.server_descriptions()
    told = subject.hello.get("me") or " or ".join(f"{host}:{port}" for host, port in seen)
    return [Finding(name, Level.OK, f"{told} answers in {took * 1000:.1f} ms")]


def topology(subject: Subject) -> list[Finding]:
    """Whether there can be change streams at all."""
    name, hello = "topology", subject.hello
    if subject.sharded:
        text = "a sharded cluster, through mongos: this collection must be unsharded, on one shard"
        return [Finding(name, Level.OK, text)]
    if not subject.streams:
        fix = (
            "start mongod with --replSet rs0 and run rs.initiate() once: a replica set of one member will do"
        )
        return [Finding(name, Level.FAIL, "a standalone, which has no change streams or transactions", fix)]
    members = [*hello.get("hosts", []), *hello.get("passives", [])]
    told = f"replica set {hello['setName']} of {len(members)}: {', '.join(map(str, members))}"
    if subject.client.topology_description.topology_type_name == "Single" and len(members) > 1:
        fix = "leave directConnection=true out of the URI"
        return [Finding(name, Level.WARN, f"{told}, but only one is used: an election is an outage", fix)]
    return [Finding(name, Level.OK, told)]


def version(subject: Subject) -> list[Finding]:
    """Whether the server is new enough."""
    name = "version"
    try:
        told = str(subject.client.admin.command("buildInfo")["version"])
        new = tuple(int(part) for part in re.findall(r"\d+", told)[:2]) >= _LEAST_VERSION
    except PyMongoError:
        wire = subject.hello.get("maxWireVersion", 0)
        told, new = f"of wire version {wire}", wire >= _LEAST_WIRE
    if new:
        return [Finding(name, Level.OK, f"MongoDB {told}")]
    return [Finding(name, Level.FAIL, f"MongoDB {told}: streamjobs needs 6.0", "upgrade the server")]


def concerns(subject: Subject) -> list[Finding]:
    """What the client would do by itself, and what the library makes of it."""
    name = "concerns"
    client = _client_as_a_runners(subject)
    if client.options.retry_writes is False:
        fix = "have connect's function pass the options on that it is given"
        return [Finding(name, Level.FAIL, "the clients of connect have retryWrites=false", fix)]
    said = _said(subject)
    told = "writes majority, reads local at the primary, retryWrites on"
    return [Finding(name, Level.OK, told + (f"; overridden: the URI's {', '.join(said)}" if said else ""))]


def pool(subject: Subject) -> list[Finding]:
    """Whether there are connections enough for a runner, and on the server."""
    name = "pool"
    runner = _client_as_a_runners(subject).options.pool_options.max_pool_size
    if runner < LEAST_POOL:
        text = f"a runner's client gets {runner:.0f} connections, of which the stream keeps one"
        fix = "have connect's function pass on maxPoolSize, as every option that it is given"
        return [Finding(name, Level.FAIL, text, fix)]
    puts = subject.client.options.pool_options.max_pool_size
    if puts == 1:
        text = "maxPoolSize=1: a process's puts wait for each other (runners set their own)"
        return [Finding(name, Level.WARN, text, "leave maxPoolSize out of the URI")]
    most = "any number of" if math.isinf(puts) else f"{puts:.0f}"
    told = f"{most} connections for a process's puts; runners set their own"
    try:
        counted: Mapping[str, Any] = subject.client.admin.command("serverStatus")["connections"]
    except PyMongoError:
        return [Finding(name, Level.OK, f"{told}; what the server has left can't be seen (serverStatus)")]
    free = counted.get("available") or 0
    if 0 < free < _FEW:
        text = f"the server has {free} connections left, and {counted.get('current')} in use"
        fix = "raise net.maxIncomingConnections, or run fewer processes with more slots each"
        return [Finding(name, Level.WARN, text, fix)]
    return [Finding(name, Level.OK, f"{told}; {counted.get('current')} in use on the server")]


def clocks(subject: Subject) -> list[Finding]:
    """Whether the members' clocks agree within the margin, and this host's with theirs."""
    found: list[Finding] = []
    offsets: dict[str, tuple[float, float]] = {}
    for address, one in subject.client.topology_description.server_descriptions().items():
        told = f"{address[0]}:{address[1]}"
        if one.server_type_name in ("RSArbiter", "RSOther", "RSGhost"):
            continue  # no data, or not yet
        try:
            with pymongo.timeout(_ANSWER):
                offsets[told] = _offset(subject, address)
        except PyMongoError as error:
            fix = "check that it runs and can be reached from here: rs.status() says what the others see"
            found.append(Finding("clocks", Level.WARN, f"{told} does not answer: {short(error)}", fix))
    return [*judge(offsets, subject.margin, sharded=subject.sharded), *found]


def judge(
    offsets: Mapping[str, tuple[float, float]], margin: float, *, sharded: bool = False
) -> list[Finding]:
    """What members' clocks say.

    Args:
        offsets: by member, the milliseconds that it is ahead of this host, and how wrong that may be.
        margin: in seconds.
        sharded: whether the members are mongos.

    """
    if not offsets:
        return []
    fix = "synchronise the members' clocks (chronyc tracking, or the cloud's time service)"
    low, high = min(offsets, key=lambda one: offsets[one][0]), max(offsets, key=lambda one: offsets[one][0])
    apart, unsure = offsets[high][0] - offsets[low][0], max(error for _, error in offsets.values())
    told = f"{high} is {since(apart)} ahead of {low}" if len(offsets) > 1 else f"{low} is the only member"
    if sharded:
        told += ", of mongos; those of the shards can't be seen from here"
    limit = f"the margin is {margin:g} s"
    if apart - unsure > margin * 1000:
        text = f"{told}: {limit}, so that a job may be taken back while it runs"
        members = Finding("clocks", Level.FAIL, text, fix)
    elif apart + unsure > margin * 500:
        members = Finding("clocks", Level.WARN, f"{told} (give or take {since(unsure)}): {limit}", fix)
    else:
        members = Finding("clocks", Level.OK, f"{told}: {limit}")
    host, error = min(offsets.values(), key=lambda one: one[1])
    way = "behind" if host > 0 else "ahead of"
    told = f"{since(abs(host))} {way} the server's, give or take {since(error)}"
    if abs(host) - error > margin * 1000:
        text = f"{told}: streamjobs goes by the server's, but logs and other programs here do not"
        return [
            members,
            Finding("this host's clock", Level.WARN, text, "synchronise this host's clock (NTP)"),
        ]
    return [members, Finding("this host's clock", Level.OK, told)]


def oplog(subject: Subject) -> list[Finding]:
    """How far back a stream can resume."""
    name = "oplog"
    if not subject.streams or subject.sharded:
        why = "each shard has its own, behind mongos" if subject.sharded else "a standalone has none"
        return [Finding(name, Level.SKIP, why)]
    local = subject.client.get_database(
        "local", read_preference=ReadPreference.PRIMARY, read_concern=ReadConcern("local")
    )
    try:
        first = local["oplog.rs"].find_one({}, {"ts": 1, "o": 1}, sort=[("$natural", 1)])
    except OperationFailure as error:
        text = f"its window can't be seen: {short(error)}; it takes the role read on database local"
        return [Finding(name, Level.SKIP, text)]
    last = subject.hello.get("lastWrite", {}).get("opTime", {}).get("ts")
    if first is None or not isinstance(last, Timestamp) or not isinstance(first.get("ts"), Timestamp):
        return [Finding(name, Level.SKIP, "its window can't be seen: local.oplog.rs shows no entries")]
    return [judge_oplog(last.time - first["ts"].time, young=_is_first(first) or not _full(subject))]


def judge_oplog(seconds: float, *, young: bool) -> Finding:
    """What an oplog's window says; ``young``: nothing has been dropped from it so far, as far as can be seen."""
    told = f"a window of {since(max(seconds, 1) * 1000)}"
    if young:
        return Finding("oplog", Level.OK, f"{told}, and nothing dropped yet")
    if seconds >= _WINDOW:
        return Finding("oplog", Level.OK, told)
    text = f"{told}: a stream away for longer is a gap, and its runner reads everything again"
    fix = "enlarge it on each member: db.adminCommand({replSetResizeOplog: 1, size: MEGABYTES, minRetentionHours: 24})"
    return Finding("oplog", Level.WARN, text, fix)


def short(error: BaseException) -> str:
    """An error without the driver's timeouts, its view of the servers, and the command."""
    text = re.sub(r" \(configured timeouts:[^)]*\)", "", str(error).partition(", Timeout:")[0])
    text = text.partition(", full error:")[0]
    return re.sub(r"to execute command \{.*", "to execute this command", text, flags=re.DOTALL)[:300]


def _greet(subject: Subject) -> float:
    sent = clock.boot()
    subject.hello = subject.client.admin.command("hello")
    subject.server.heard(sent, subject.hello)
    return clock.boot() - sent


def _why_not(subject: Subject, error: PyMongoError) -> str:
    if isinstance(error, OperationFailure):
        return "check user, password and authSource in the URI"
    if subject.client.topology_description.topology_type_name == "ReplicaSetNoPrimary":
        return "members answer but none is primary: rs.status() on one of them says why"
    return "check that it runs, and that --uri or STREAMJOBS_URI names it"


def _client_as_a_runners(subject: Subject) -> Any:
    """A client made as a runner makes one, never connected: its options tell what a factory leaves of ours."""
    client = subject.source.connect(
        MongoClient, appname="streamjobs/doctor", maxPoolSize=4 * LEAST_POOL, connect=False
    )
    client.close()
    return client


def _said(subject: Subject) -> list[str]:
    """What the URI says of things that the library sets itself."""
    uri = subject.source.uri
    if uri is None or uri.startswith("mongodb+srv://"):
        return []
    options = parse_uri(uri, warn=False)["options"]
    return [f"{name}={options[name]}" for name in _OVERRIDDEN if name in options]


def _offset(subject: Subject, address: tuple[str, int | None]) -> tuple[float, float]:
    """How far a member's clock is ahead of this host's, and how wrong that may be; in milliseconds."""
    best: tuple[float, float] | None = None
    subject.only.address = address
    try:
        for _ in range(_SAMPLES):
            sent, before = utc_ms(), clock.boot()
            hello = subject.client.admin.command("hello", read_preference=ReadPreference.NEAREST)
            trip = (clock.boot() - before) * 1000
            ahead = hello["localTime"].timestamp() * 1000 - (sent + trip / 2)
            if best is None or trip / 2 + 1 < best[1]:
                best = (ahead, trip / 2 + 1)
    finally:
        subject.only.address = None
    return best if best is not None else (0.0, float("inf"))


def _is_first(entry: Mapping[str, Any]) -> bool:
    """Whether this is the entry with which a replica set begins."""
    body: Any = entry.get("o")
    return isinstance(body, dict) and cast("dict[str, Any]", body).get("msg") == "initiating set"


def _full(subject: Subject) -> bool:
    """Whether the oplog has reached its size, so that old entries go."""
    try:
        stats: Mapping[str, Any] = subject.client.local.command("collStats", "oplog.rs")
    except PyMongoError:
        return False
    most = stats.get("maxSize")
    return isinstance(most, (int, float)) and most > 0 and stats.get("size", 0) >= _FULL * most
