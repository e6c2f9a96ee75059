"""Putting jobs in the user's own transactions: commit, abort, whose session, which concern."""

from __future__ import annotations

import pytest
from pymongo import AsyncMongoClient
from pymongo.errors import DuplicateKeyError
from pymongo.write_concern import WriteConcern

from streamjobs import BadArgument, ConfigError, PutUnknown, Queue


async def test_a_put_in_a_transaction_is_there_after_the_commit_and_not_after_an_abort(
    queue, mine, client, raw, uri
):
    own = Queue(mine, connect=uri)
    async with client.start_session() as session, await session.start_transaction():
        await own.put("mail", {"n": 1}, session=session)
        await own.put_many([own.job("mail", {"n": n}) for n in (2, 3)], session=session)
        assert raw.count_documents({}) == 0
    assert sorted(one["data"]["n"] for one in raw.find()) == [1, 2, 3]

    async def aborted() -> None:
        async with client.start_session() as session, await session.start_transaction():
            await own.put("mail", {"n": 4}, session=session)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await aborted()
    assert raw.count_documents({}) == 3


async def test_a_put_in_a_transaction_wakes_runners_when_it_commits_and_nobody_when_it_is_aborted(
    queue, mine, client, uri, seen
):
    queue.handler("mail")(lambda job: None)
    own = Queue(mine, connect=uri)
    async with queue.running("worker"):
        async with client.start_session() as session:
            await session.start_transaction()
            aborted = await own.put("mail", session=session)
            await session.abort_transaction()
            await session.start_transaction()
            committed = await own.put("mail", session=session)
            assert not seen.of("job.woken")
            await session.commit_transaction()
        await seen.wait("try", job=committed.id, outcome="success")
        last = await own.put("mail")
        await seen.wait("try", job=last.id, outcome="success")
    assert not seen.of("job.woken", job=aborted.id)
    assert {one["source"] for one in seen.of("job.woken", job=committed.id)} <= {"stream", "read"}


async def test_in_a_transaction_the_drivers_errors_pass_through(queue, mine, client, uri):
    own = Queue(mine, connect=uri)
    one = await own.put("mail")
    async with client.start_session() as session:
        await session.start_transaction()
        with pytest.raises(DuplicateKeyError):
            await own.put(one, session=session)
        await session.abort_transaction()


async def test_a_session_of_another_client_or_sort_is_refused(queue, mine, client, uri, raw):
    own = Queue(mine, connect=uri)
    async with AsyncMongoClient(uri) as other, other.start_session() as session:
        for one in (own, queue):
            with pytest.raises(ConfigError, match="belongs to another client"):
                await one.put("mail", session=session)
    wrong = pytest.raises(BadArgument, match=r"^session: give an? AsyncClientSession")
    with raw.database.client.start_session() as session, wrong:
        await own.put("mail", session=session)
    async with client.start_session() as session:
        with pytest.raises(BadArgument, match=r"^session: give a ClientSession"):
            queue.sync.put("mail", session=session)
    with pytest.raises(BadArgument, match=r"^session: "):
        await own.put("mail", session="session")
    assert raw.count_documents({}) == 0


async def test_a_transaction_that_an_election_could_undo_is_refused(queue, mine, client, uri, raw):
    own = Queue(mine, connect=uri)
    async with client.start_session() as session:
        await session.start_transaction(write_concern=WriteConcern(1))
        with pytest.raises(ConfigError, match="write_concern=WriteConcern"):
            await own.put("mail", session=session)
        await session.abort_transaction()
        await session.start_transaction(write_concern=WriteConcern("majority"))
        await own.put("mail", session=session)
        await session.commit_transaction()
    assert raw.count_documents({}) == 1


async def test_a_session_without_a_transaction_leaves_a_put_repeatable(uri, namespace, raw, failpoint):
    database, _, name = namespace.partition(".")
    async with AsyncMongoClient(uri, appname="streamjobs/mine") as client, client.start_session() as session:
        own = Queue(client[database][name], connect=uri)
        await own.put("warm", session=session)
        failpoint(
            {"times": 1}, "streamjobs/mine", ["insert"], writeConcernError={"code": 64, "errmsg": "timed out"}
        )
        with pytest.raises(PutUnknown) as caught:
            await own.put("mail", session=session)
        for _ in range(2):
            await own.put(caught.value.jobs[0], session=session)
    assert raw.count_documents({"kind": "mail"}) == 1
