"""The role of deploy/role.js on a server that asks who one is: enough for all that a runner does, and no more."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from pymongo import MongoClient
from pymongo.errors import OperationFailure, PyMongoError

from streamjobs import ConnectError, PutUnknown, Queue, StreamRefused
from streamjobs.clock import boot
from streamjobs.embedded import Server
from tests.documents import plain
from tests.test_deploy_privileges import RUNNER_ACTIONS, actions

PASSWORD = "s3cret-p4ss"
RUNNER = {"interval": 0.3, "lease": 2.5, "beat": 0.4, "margin": 0.4, "stop_deadline": 2.0}


def uri_of(server: Server, user: str, password: str = PASSWORD) -> str:
    return f"mongodb://{user}:{password}@127.0.0.1:{server.port}/?authSource=app"


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with auth: a user with the whole role, one without each of its actions, and an owner of the database."""
    server = Server(tmp_path_factory.mktemp("guarded"), options=[])
    if server.program.sort == "mongod":
        pytest.skip("a mongod with auth needs a key file for its replica set: the forge's workflow has none")
    server.start()
    with MongoClient(server.uri) as admin:
        admin.admin.command("createUser", "root", pwd=PASSWORD, roles=["root"])
        admin.app.command("createUser", "owner", pwd=PASSWORD, roles=["readWrite", "dbAdmin"])
        whole = actions("runnerActions")
        for name in ("none", *whole):
            some = [action for action in whole if action != name]
            privilege = {"resource": {"db": "app", "collection": "jobs"}, "actions": some}
            admin.app.command("createRole", f"without-{name}", privileges=[privilege], roles=[])
            admin.app.command("createUser", f"without-{name}", pwd=PASSWORD, roles=[f"without-{name}"])
    server.stop()
    server._options.append("--auth")
    server.start()
    yield server
    server.kill()


@pytest.fixture
def owner(guarded: Server) -> Iterator[Any]:
    """The collection as its owner sees it, empty and with its indexes."""
    with MongoClient(uri_of(guarded, "owner"), tz_aware=True) as client:
        client.app.jobs.drop()
        own = Queue(client.app.jobs)
        own.sync.create_indexes()
        yield client.app.jobs


async def test_the_role_is_enough_for_all_that_a_runner_and_a_queue_do(guarded, owner, seen):
    dead = {"_id": "runner:gone:1:a", "control": "runner", "ends": datetime(2020, 1, 1, tzinfo=UTC)}
    lost = plain(status=2, retries=3, lease={"owner": "gone:1:a", "token": "t", "claimed": datetime.now(UTC)})
    owner.insert_many([dead, lost])
    async with Queue(uri_of(guarded, "without-none"), "app.jobs") as queue:

        @queue.handler("mail", retries=2)
        def mail(job: Any) -> None:
            if job.data.get("fail") and job.number == 1:
                raise ValueError("no")

        async with queue.running("w", **RUNNER):
            jobs = await queue.put_many([queue.job("mail", {"fail": n % 2}) for n in range(10)])
            for job in jobs:
                await seen.wait("try", job=job.id, outcome="success")
            await seen.wait("takeback", taken="gone:1:a")
            await seen.wait("try", job=lost["_id"], outcome="success")
            await queue.retry(jobs[0].id)
            later = await queue.put("mail", delay=3600)
            await queue.cancel(later.id, "no need")
            await seen.wait("try", job=jobs[0].id, outcome="success", count=2)
            assert (await queue.count())["mail"] == {"cancelled": 1, "success": 11}
            assert len(await queue.list(kind="mail")) == 12
            assert queue.sync.get(later.id).state == "cancelled"
        assert not await queue.missing_indexes()
        with pytest.raises(OperationFailure) as caught:
            await queue._source.asynchronous().create_index("more")
        assert caught.value.code == 13
    wrong = {"stream.state", "lease.late", "server.away", "indexes.missing", "runner.failed", "claim.unknown"}
    told = [(name, fields) for name, level, fields in seen.all if name in wrong and level != "info"]
    assert not told
    assert owner.find_one({"control": "runner", "fenced": None}) is None  # the own record went at its stop


async def begun(guarded: Server, action: str, seen: Any) -> Queue:
    queue = Queue(uri_of(guarded, f"without-{action}"), "app.jobs")
    queue.handler("mail")(lambda job: None)
    return queue


@pytest.mark.parametrize(
    ("action", "error", "said"),
    [
        ("find", StreamRefused, "the privileges find and changeStream on this collection"),
        ("changeStream", StreamRefused, "the privileges find and changeStream on this collection"),
        ("update", ConnectError, "could not register in app.jobs: not authorized"),
    ],
)
async def test_without_this_privilege_a_runner_says_at_start_which_it_misses(
    action, error, said, guarded, owner, seen
):
    if action == "changeStream" and guarded.program.sort == "python":
        pytest.skip("this server gives a stream to whoever may find")
    queue = await begun(guarded, action, seen)
    began = boot()
    with pytest.raises(error, match=said) as caught:
        async with queue.running("w", **{**RUNNER, "lease": 60}):
            pass
    assert boot() - began < 20  # not only when a lease would be over
    assert PASSWORD not in str(caught.value)
    await queue.close()


async def test_without_insert_nothing_can_be_put_and_nobody_is_told_that_it_may_have_been(
    guarded, owner, seen
):
    async with Queue(uri_of(guarded, "without-insert"), "app.jobs") as queue:
        for put in (queue.put("mail"), queue.put_many([queue.job("mail"), queue.job("mail")])):
            with pytest.raises(PyMongoError) as caught:
                await put
            assert not isinstance(caught.value, PutUnknown)
            assert "not authorized" in str(caught.value)
    assert owner.count_documents({}) == 0


async def test_without_remove_a_runner_works_and_leaves_its_record_to_its_lease(guarded, owner, seen):
    queue = await begun(guarded, "remove", seen)
    async with queue, queue.running("w", **RUNNER):
        job = await queue.put("mail")
        await seen.wait("try", job=job.id, outcome="success")
    assert owner.count_documents({"control": "runner"}) == 1
    (event,) = seen.of("lease.kept")
    assert "not authorized" in event["message"]


async def test_without_listindexes_a_runner_works_and_says_that_it_does_not_know(guarded, owner, seen):
    queue = await begun(guarded, "listIndexes", seen)
    async with queue, queue.running("w", **RUNNER):
        job = await queue.put("mail")
        await seen.wait("try", job=job.id, outcome="success")
    (event,) = seen.of("indexes.missing")
    assert event["names"] == ["unknown (OperationFailure)"]


def test_each_action_of_the_role_has_been_taken_away_above():
    assert {"find", "changeStream", "update", "insert", "remove", "listIndexes"} == set(RUNNER_ACTIONS)


@pytest.mark.parametrize("user", ["without-none", "nobody"])
async def test_a_wrong_password_is_told_without_it(user, guarded, owner, seen, caplog):
    queue = Queue(uri_of(guarded, user, "wr0ng-s3cret"), "app.jobs")
    queue.handler("mail")(lambda job: None)
    with pytest.raises(ConnectError) as caught:
        async with queue.running("w", **RUNNER):
            pass
    told = [
        str(caught.value),
        repr(caught.value),
        repr(queue),
        repr(queue._source),
        str(seen.all),
        caplog.text,
    ]
    error: BaseException | None = caught.value
    while error is not None:
        told += [str(error), repr(error)]
        error = error.__cause__ or error.__context__
    assert "wr0ng" not in "".join(told)
    await queue.close()
