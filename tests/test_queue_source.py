"""Where a queue's collection comes from: URIs, collections, what is refused; closing, using another, forking."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import threading

import pytest
from pymongo import AsyncMongoClient, MongoClient

from streamjobs import BadArgument, ConfigError, HandlerError, Job, Queue

NOWHERE = "mongodb://127.0.0.1:1/"


async def test_a_queue_of_an_asynchronous_collection_puts_with_it(client, mine, raw):
    own = Queue(mine)
    put = await own.put("mail")
    assert raw.find_one()["_id"] == put.id
    assert (await own.get(put.id)).id == put.id
    await own.close()
    await client.admin.command("ping")  # the client is the user's: it is still open
    with pytest.raises(ConfigError, match="no way to open clients of its own"):
        own.sync.put("mail")


async def test_a_queue_of_a_synchronous_collection_puts_with_it_and_with_a_uri_also_asynchronously(raw, uri):
    own = Queue(raw)
    put = own.sync.put("mail")
    with pytest.raises(ConfigError, match="no way to open clients of its own"):
        await own.put("mail")
    async with Queue(raw, connect=uri) as both:
        assert (await both.get(put.id)).id == both.sync.get(put.id).id == put.id


async def test_a_queue_without_a_way_to_connect_cannot_run(mine, seen):
    own = Queue(mine)
    own.handler("mail")(lambda job: None)
    with pytest.raises(ConfigError, match=re.escape("Queue(collection, connect=...)")):
        async with own.running("worker"):
            pass


async def test_a_queue_without_handlers_cannot_run(queue):
    with pytest.raises(HandlerError):
        queue.runner("worker")


async def test_concerns_and_codec_are_set_whatever_the_client_says(uri, namespace, raw):
    database, _, name = namespace.partition(".")
    async with AsyncMongoClient(uri, w=1, readConcernLevel="majority", tz_aware=False) as client:
        own = Queue(client[database][name])
        put = await own.put("mail", delay=1)
        back = await own.get(put.id)
        assert back.runat.tzinfo is not None
        collection = own._source.asynchronous()
        assert collection.write_concern.document == {"w": "majority"}
        assert collection.read_concern.level == "local"


@pytest.mark.parametrize("cls", [MongoClient, AsyncMongoClient])
@pytest.mark.parametrize("options", [{"retryWrites": False}, {"w": 0}])
async def test_a_collection_whose_puts_could_be_lost_is_refused(cls, options, uri):
    client = cls(uri, **options)
    try:
        with pytest.raises(ConfigError, match=r"retryWrites=false|w=0"):
            Queue(client.app.jobs)
    finally:
        closing = client.close()
        if closing is not None:
            await closing


@pytest.mark.parametrize(
    "uri",
    [
        "mongodb://user:s3cret@host:notaport/",
        "mongodb://user:s3/cret@host/app",
        "mongodb://user:s3?cr=et@host",
        "mongodb://user:s3#cret@host:x/",
        "mongodb://user:s3@cret@host",
        "mongodb://user:s3%cret@host",
        "mongodb://user:s3cret@",
        "mongodb://user:s3cret@host/?w=-1",
        "mongodb://user:s3cret@host/?retryWrites=false",
        "mongodb://user:s3cret@host/?retryWrites=x&w=0",
        "mongodb://user:s3cret@host/?w=0",
        "mongodb://user:s3cret@host/?authMechanism=NONE",
        "mongo://user:s3cret@host/",
        "user:s3cret@host",
        "",
    ],
)
def test_a_uri_that_cannot_work_is_refused_without_showing_the_password(uri):
    for make in (lambda: Queue(uri, "app.jobs"), lambda: Queue(NOWHERE, "app.jobs").use(uri)):
        with pytest.raises(ConfigError) as caught:
            make()
        shown = f"{caught.value} {caught.value!r} {caught.value.__cause__}"
        assert not [part for part in ("s3", "cret") if part in shown.replace("cluster", "")]


@pytest.mark.parametrize(
    "name",
    [None, "", "app", "app.", ".jobs", 5, "a b.jobs", "app.$jobs", "app.a\0b", "app.system.x", "a/b.c"],
)
def test_a_name_that_is_no_collections_is_refused(name):
    with pytest.raises(BadArgument, match=r"^name: "):
        Queue(NOWHERE, name)


@pytest.mark.parametrize("source", [None, 5, b"mongodb://host", ["mongodb://host"]])
def test_a_source_that_is_neither_uri_nor_collection_is_refused(source):
    with pytest.raises(BadArgument, match=r"^source: "):
        Queue(source, "app.jobs")


async def test_a_collection_has_its_own_name(mine):
    with pytest.raises(BadArgument, match=r"^name: leave it out"):
        Queue(mine, "app.jobs")


def test_the_same_queue_serves_one_loop_after_another(uri, namespace, raw):
    queue = Queue(uri, namespace)

    async def one() -> Job:
        async with queue:
            return await queue.put("mail")

    jobs = [asyncio.run(one()) for _ in range(2)]
    assert {one["_id"] for one in raw.find()} == {one.id for one in jobs}


async def test_a_queue_that_was_closed_opens_again_when_it_is_used(queue, raw):
    await queue.put("mail")
    await queue.close()
    await queue.close()
    await queue.put("mail")
    assert raw.count_documents({}) == 2


class Counted:
    """Makes clients, and counts them."""

    def __init__(self, uri):
        self.uri, self.made = uri, []

    def __call__(self, cls, **options):
        self.made.append(cls(self.uri, **options))
        return self.made[-1]


def test_loops_side_by_side_have_a_client_each_and_those_that_ended_are_forgotten(uri, namespace, raw):
    """Guard: clients are kept by loop; with one for all, each put in another loop than the last opened one more."""
    connect = Counted(uri)
    queue = Queue(raw, connect=connect)
    turn = threading.Barrier(2)

    def work():
        async def puts():
            for _ in range(5):
                turn.wait(30)
                await queue.put("mail")
            await queue.close()

        asyncio.run(puts())

    for _ in range(2):
        threads = [threading.Thread(target=work) for _ in range(2)]
        for one in threads:
            one.start()
        for one in threads:
            one.join()
    assert raw.count_documents({"kind": "mail"}) == 20
    assert len(connect.made) == 4
    assert not queue._source._async


async def test_clients_of_loops_that_ended_without_closing_are_not_kept(uri, namespace, raw):
    queue = Queue(uri, namespace)

    def work():
        async def puts():
            await queue.put("mail")
            await queue._source._async[asyncio.get_running_loop()].database.client.close()  # not by the queue

        asyncio.run(puts())

    for _ in range(3):
        await asyncio.to_thread(work)
    assert len(queue._source._async) == 1
    await queue.put("mail")
    assert list(queue._source._async) == [asyncio.get_running_loop()]
    await queue.close()


def test_threads_that_come_at_once_share_one_client(uri, namespace, raw):
    """Guard: the lock around the opening."""

    class Slowly(Counted):
        def __call__(self, cls, **options):
            turn.wait(5)
            return super().__call__(cls, **options)

    turn = threading.Event()
    connect = Slowly(uri)
    database, _, name = namespace.partition(".")
    queue = Queue(AsyncMongoClient(uri)[database][name], connect=connect)
    threads = [threading.Thread(target=queue.sync.put, args=("mail",)) for _ in range(4)]
    for one in threads:
        one.start()
    turn.set()
    for one in threads:
        one.join()
    queue.sync.close()
    assert raw.count_documents({}) == 4
    assert len(connect.made) == 1


CLOSED_FORK = """
import os, sys, warnings
warnings.simplefilter("ignore")
from streamjobs import Queue

queue = Queue(*sys.argv[1:])
queue.sync.put("before")
queue.sync.close()
child = os.fork()
queue.sync.put("after")
queue.sync.close()
if child == 0:
    os._exit(0)
_, status = os.waitpid(child, 0)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def test_a_queue_whose_clients_are_closed_may_be_used_in_a_forked_child(uri, namespace, raw):
    """Guard: close forgets whose process it was."""
    done = subprocess.run(
        [sys.executable, "-c", CLOSED_FORK, uri, namespace], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert raw.count_documents({}) == 3


async def test_use_points_a_queue_at_another_server_before_it_is_used(uri, namespace, raw):
    queue = Queue(NOWHERE, "app.jobs")
    queue.handler("mail", retries=3)(lambda job: None)
    queue.use(uri, namespace)
    async with queue:
        await queue.put("mail")
        assert queue.sync.count() == {"mail": {"new": 1}}
    assert raw.find_one()["retries"] == 3


FORK = """
import asyncio, os, sys, warnings
warnings.simplefilter("ignore")
from streamjobs import ForkError, Queue

uri, namespace = sys.argv[1:]
queue, unused = Queue(uri, namespace), Queue(uri, namespace)
queue.sync.put("before")
child = os.fork()
if child == 0:
    told = []
    for call in (lambda: queue.sync.put("child"), lambda: asyncio.run(queue.put("child")), lambda: queue.sync.count()):
        try:
            call()
        except ForkError as error:
            told.append("after the fork" in str(error))
    unused.sync.put("child of its own")
    os._exit(0 if told == [True] * 3 else 1)
_, status = os.waitpid(child, 0)
queue.sync.put("after")
queue.sync.close()
sys.exit(os.waitstatus_to_exitcode(status))
"""


def test_a_queue_that_was_used_is_refused_in_a_forked_child_and_goes_on_in_the_parent(uri, namespace, raw):
    done = subprocess.run(
        [sys.executable, "-c", FORK, uri, namespace], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert {one["kind"] for one in raw.find()} == {"before", "after", "child of its own"}
