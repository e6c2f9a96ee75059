"""The stream and its supervisor: every pitfall that failpoints, restarts, drops or a standalone can show."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any

import pytest
from bson import Int64, ObjectId
from pymongo.errors import ConfigurationError, OperationFailure

from streamjobs import ASAP, Queue, StreamRefused
from streamjobs.embedded import Server
from streamjobs.runner.lease import record_id
from streamjobs.runner.stream import Stream, pipeline, refused
from tests.crew import in_slot

APP = "streamjobs/runner"


def document(**more: Any) -> dict[str, Any]:
    return {
        "_id": ObjectId(), "status": 1, "tries": [], "created": datetime.now(UTC), "runat": ASAP, "data": {},
        "retries": 0, "retryinterval": Int64(0), "kind": "mail", **more,
    }  # fmt: skip


async def live(seen, count: int = 1) -> None:
    await seen.wait("stream.state", state="live", count=count, timeout=20)


async def wakes(raw, seen) -> None:
    """A foreign put is seen through the stream."""
    raw.insert_one(one := document())
    await seen.wait("try", job=one["_id"], outcome="success", timeout=10)


@pytest.mark.parametrize(
    "fault",
    [
        {"closeConnection": True},
        {"errorCode": 43},
        {"errorCode": 6, "errorLabels": ["ResumableChangeStreamError"]},
    ],
    ids=["connection cut", "cursor gone", "host unreachable"],
)
async def test_a_resumable_error_is_resumed_by_the_driver_and_nothing_is_missed(
    fault, queue, raw, seen, failpoint
):
    queue.handler("mail")(lambda job: None)
    async with queue.running("w", stream_wait=0.3):
        await live(seen)
        failpoint({"times": 1}, APP, ["getMore"], **fault)
        for _ in range(3):
            await wakes(raw, seen)
    assert not seen.of("stream.state", state="gap")


@pytest.mark.parametrize("code", [286, 280, 40576, 10334])
async def test_lost_history_is_a_gap_and_everything_is_read_again(code, queue, raw, seen, failpoint):
    queue.handler("mail")(lambda job: None)
    async with queue.running("w", stream_wait=0.3):
        await live(seen)
        failpoint({"times": 1}, APP, ["getMore"], errorCode=code)
        (gap,) = await seen.wait("stream.state", state="gap", level=None)
        assert gap["code"] == code
        await live(seen, count=2)
        await wakes(raw, seen)


async def test_the_catch_up_after_a_gap_finds_what_was_put_in_it(queue, raw, seen, failpoint):
    """Guard: restart_all when the stream opens. The job's event is in the lost history."""
    queue.handler("mail")(lambda job: None)
    async with queue.running("w", stream_wait=0.3, interval=60) as runner:
        await live(seen)
        runner._stream._change = lambda change: None
        failpoint({"times": 1}, APP, ["getMore"], errorCode=286)
        raw.insert_one(one := document())
        await seen.wait("stream.state", state="gap")
        await seen.wait("try", job=one["_id"], outcome="success", timeout=10)


async def test_a_stream_that_cannot_be_reopened_is_degraded_and_the_fallback_works_on(
    queue, raw, seen, failpoint
):
    queue.handler("mail")(lambda job: None)
    async with queue.running("w", stream_wait=0.3, interval=0.5):
        await live(seen)
        failpoint("alwaysOn", APP, ["getMore"], errorCode=286)
        await seen.wait("stream.state", state="gap")
        await wakes(raw, seen)
        failpoint("off", APP, ["getMore"])
        await live(seen, count=2)
        await wakes(raw, seen)


async def test_a_stream_that_does_not_return_is_degraded_within_twice_its_wait(queue, raw, seen, failpoint):
    queue.handler("mail")(lambda job: None)
    async with queue.running("w", stream_wait=0.3, interval=0.5):
        await live(seen)
        failpoint({"times": 1}, APP, ["getMore"], blockConnection=True, blockTimeMS=3000)
        await seen.wait("stream.state", state="degraded", timeout=5)
        await wakes(raw, seen)
        await live(seen, count=2)


async def test_privileges_taken_away_are_refused_and_found_again(queue, raw, seen, failpoint):
    queue.handler("mail")(lambda job: None)
    async with queue.running("w", stream_wait=0.3, interval=0.5):
        await live(seen)
        failpoint({"times": 3}, APP, ["getMore", "aggregate"], errorCode=13)
        (event,) = await seen.wait("stream.state", state="refused")
        assert event["code"] == 13
        await wakes(raw, seen)
        await live(seen, count=2)


@pytest.mark.parametrize("code", [13, 40573])
async def test_a_stream_refused_at_start_is_one_clear_error(code, queue, failpoint, monkeypatch):
    queue.handler("mail")(lambda job: None)
    failpoint("alwaysOn", APP, ["aggregate"], errorCode=code)
    with pytest.raises(StreamRefused, match="replica set.*changeStream.*poll=SECONDS"):
        await queue.run("w", signals=False)


async def test_a_standalone_is_refused_with_the_fix_and_polled_by_choice(tmp_path, seen):
    server = Server(tmp_path / "alone", options=["--standalone"])
    if server.program.sort == "mongod":
        pytest.skip("a mongod standalone is a matter of --replSet, which the embedded file always gives")
    server.start()
    try:
        async with Queue(server.uri, "app.jobs") as queue:
            queue.handler("mail")(lambda job: None)
            with pytest.raises(StreamRefused, match=r"rs\.initiate"):
                await queue.run("w", signals=False)
            async with queue.running("w", poll=0.2):
                job = await queue.put("mail")
                await seen.wait("try", job=job.id, outcome="success")
    finally:
        server.kill()


@pytest.mark.parametrize("how", ["drop", "rename", "dropDatabase"])
async def test_a_collection_that_goes_away_is_a_gap_and_comes_back(how, queue, raw, namespace, seen):
    """Runners see their record gone, give up what they held, register afresh and name the missing indexes."""

    @queue.handler("mail", retries=3)
    async def mail(job):
        if job.data.get("hang"):
            await asyncio.Event().wait()

    async with queue.running("w", lease=3, beat=0.5, margin=0.5, stream_wait=0.5):
        held = await queue.put("mail", {"hang": True})
        await seen.wait("try.started")
        if how == "drop":
            raw.drop()
        elif how == "rename":
            raw.rename("elsewhere")
        else:
            raw.database.client.drop_database(raw.database.name)
        await seen.wait("lease.lost", held=1, timeout=5)
        await seen.wait("lease.registered", count=2, timeout=5)
        (told,) = await seen.wait("indexes.missing", names=["due", "owner", "control"])
        assert told["fix"] == f"streamjobs indexes --create --collection {namespace}"
        await seen.wait("outcome.lost", job=held.id)
        await live(seen, count=2)
        for _ in range(5):
            await wakes(raw, seen)


async def test_a_server_that_is_stopped_and_started_again(own_server: Server, seen):
    async with Queue(own_server.uri, "app.jobs") as queue:
        await queue.create_indexes()
        queue.handler("mail")(lambda job: None)
        async with queue.running("w", lease=60):
            await seen.wait("try", job=(await queue.put("mail")).id, outcome="success")
            before = await queue.put("mail", delay=1)
            own_server.kill()
            own_server.start()
            await seen.wait("try", job=before.id, outcome="success", timeout=30)
            await seen.wait("try", job=(await queue.put("mail")).id, outcome="success", timeout=30)


async def test_a_transaction_of_many_puts_wakes_when_it_commits_and_not_before(
    queue, client, namespace, seen
):
    ran = []
    queue.handler("mail")(lambda job: ran.append(job.id))
    database, _, name = namespace.partition(".")
    async with queue.running("w"):
        await live(seen)
        theirs = Queue(client[database][name])
        async with client.start_session() as session, await session.start_transaction():
            await theirs.put_many([theirs.job("mail") for _ in range(500)], session=session)
            outside = await queue.put("mail")
            await seen.wait("try", job=outside.id)
            assert ran == [outside.id]
        await seen.wait("try", count=501, outcome="success")
    assert len(set(ran)) == 501


async def test_stopping_leaves_no_cursor_on_the_server(queue, seen, client):
    async def cursors() -> int | None:
        status = await client.admin.command("serverStatus")
        return status.get("metrics", {}).get("cursor", {}).get("open", {}).get("total")

    before = await cursors()
    if before is None:
        pytest.skip("this server does not count its cursors")
    queue.handler("mail")(lambda job: None)
    for count in range(3):
        async with queue.running("w"):
            await live(seen, count + 1)
            assert await cursors() == before + 1
    assert await cursors() == before


async def test_the_filter_drops_what_does_not_concern_this_runner(queue, raw, client, namespace):
    """Claims, beats, finishes, other kinds, deletes and the runner's own put-backs never leave the server."""
    database, _, name = namespace.partition(".")
    told = []
    async with await client[database][name].watch(
        pipeline({"mail": None}, "me"), max_await_time_ms=300
    ) as stream:
        one = document()
        raw.insert_one({**one, "kind": "other"})
        raw.update_one({"_id": one["_id"]}, {"$set": {"status": 2, "lease": {"owner": "x"}}})
        raw.update_one({"_id": one["_id"]}, {"$set": {"status": 4}, "$unset": {"lease": 1}})
        raw.update_one(
            {"_id": one["_id"]}, {"$set": {"status": 3, "wake": {"kind": "mail", "by": "me", "n": 1}}}
        )
        raw.update_one({"_id": one["_id"]}, {"$set": {"wake": {"kind": "other", "by": "x", "n": 1}}})
        raw.delete_one({"_id": one["_id"]})
        raw.insert_one({"_id": "runner:x", "control": "runner"})
        raw.update_one({"_id": "runner:x"}, {"$set": {"ends": datetime.now(UTC)}})
        raw.update_one({"_id": "runner:x"}, {"$set": {"fenced": datetime.now(UTC)}})
        raw.insert_one({"_id": "runner:me", "control": "runner"})
        raw.update_one({"_id": "runner:me"}, {"$set": {"fenced": datetime.now(UTC)}})
        raw.insert_one(mine := document(data={"secret": "x" * 1000}))
        while (change := await stream.try_next()) is not None:
            told.append((change["operationType"], change["documentKey"]["_id"]))
            assert "fullDocument" not in change
    assert told == [
        ("insert", "runner:x"), ("insert", "runner:me"), ("update", "runner:me"), ("insert", mine["_id"]),
    ]  # fmt: skip


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("changed", ["slots", "owner"])
async def test_a_stream_goes_on_from_an_event_that_its_new_filter_drops(
    changed, at_once, raw, client, namespace, seen
):
    """Guard: ``past`` in the filter. A server meets the token's event again, and refuses (280) where it is dropped.

    Opened again at once, that is from the event before: the last is told first, and its token kept a turn later.
    """
    database, _, name = namespace.partition(".")
    told: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    opened: list[bool] = []
    slot, owner = 1, "a"

    async def turn() -> None: ...

    stream = Stream(
        client[database][name], lambda: {"mail": frozenset({slot}) if changed == "slots" else None}, lambda: owner, "w", 0.3,
        told.put_nowait, opened.append, lambda: None, turn,
    )  # fmt: skip

    async def tells_of(id_: Any) -> None:
        async with asyncio.timeout(20):
            while (await told.get())["documentKey"]["_id"] != id_:
                pass

    await stream.first()
    try:
        for slot, owner in ((1, "a"), (2, "b"), (3, "c")):
            if slot > 1:
                await stream.reopen(quietly=changed == "slots")
            raw.insert_one(one := document(_id=in_slot(slot)))
            await tells_of(one["_id"])
            if changed == "owner":
                raw.insert_one({"_id": record_id(owner)})
                raw.update_one({"_id": record_id(owner)}, {"$set": {"fenced": datetime.now(UTC)}})
                await tells_of(record_id(owner))
            if not at_once:
                await asyncio.sleep(0)
                assert stream._past is not None
    finally:
        await stream.close()
    assert not seen.of("stream.state", state="gap")
    assert opened == ([True] if changed == "slots" else [True, False, False])


async def test_an_event_with_a_foreign_id_or_an_unreadable_date_harms_nothing(queue, raw, seen):
    queue.handler("mail")(lambda job: None)
    async with queue.running("w"):
        await live(seen)
        for id_ in ({"a": 1}, "text", 7, ObjectId()):
            raw.insert_one(document(_id=id_))
            await seen.wait("try", job=id_, outcome="success")
        try:
            from bson import DatetimeMS

            raw.insert_one(document(created=DatetimeMS(2**62), data={"when": DatetimeMS(-(2**62))}))
        except OperationFailure:
            pytest.skip("this server refuses dates after the year 9999, which mongod stores")
        await seen.wait("try", count=5, outcome="success")


def test_what_counts_as_refused():
    assert refused(OperationFailure("no", 13))
    assert refused(ConfigurationError("no"))
    assert not refused(OperationFailure("gone", 286))
    assert not refused(None)
