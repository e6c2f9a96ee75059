"""A server for few files, one database per test, every event checked against its schema, nothing left behind."""

from __future__ import annotations

import asyncio
import gc
import os
import secrets
import threading
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from pymongo import AsyncMongoClient, MongoClient

from streamjobs import Queue, events
from streamjobs.clients import Source
from streamjobs.clock import boot
from streamjobs.embedded import Server
from streamjobs.events import subscribe
from tests.proxy import Proxy
from tests.proxy.driver import Driver

#: Modules whose asserts shall tell what they compared, as those of a test file do.
pytest.register_assert_rewrite(
    "tests.candidates", "tests.doctored", "tests.supervised", "tests.transition_model"
)

TEST_URI = os.environ.get("STREAMJOBS_TEST_URI")
_WORN = 10.0  # seconds of use after which a server is not handed on to the next file
_VALIDATORS = {one["title"]: Draft202012Validator(one) for one in events.schema()["oneOf"]}


#: Files whose processes keep the machine busy: with ``-n`` one worker has all of them, one after the other.
BUSY = ("test_chaos.py", "test_mutations.py", "test_processes.py", "test_slots.py")
#: Others that take long, mostly by waiting, the longest first.
LONG = (
    "test_promise_lateness.py", "test_promise_nothing_lost.py", "test_promise_elections.py", "test_supervise.py",
    "test_supervise_signals.py", "test_cli.py", "test_running.py", "test_stop.py",
)  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    """Side by side, the order of the files is ours, and each worker has servers of its own."""
    if getattr(config.option, "numprocesses", None):
        if TEST_URI:
            raise pytest.UsageError(
                "STREAMJOBS_TEST_URI names one server, whose faults would reach other tests: leave out -n"
            )
        config.option.loadscopereorder = False


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, and each file in one worker.

    And: a connection that the driver was making when its server vanished is left to the collector, with a warning.
    """
    place = {name: number for number, name in enumerate((*BUSY, *LONG))}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))
    for item in items:
        item.add_marker(
            pytest.mark.xdist_group("busy" if item.path.name in BUSY else item.path.name.replace(".", "_"))
        )
        if "driver_litter" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"))
            item.add_marker(pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"))


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def spare() -> Iterator[list[tuple[Server, float]]]:
    """The server that the last file left for the next, with the seconds that it has been used for."""
    left: list[tuple[Server, float]] = []
    yield left
    for one, _ in left:
        one.kill()


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, spare: list[tuple[Server, float]]
) -> Iterator[Server | None]:
    """The server that a file's tests share; None where STREAMJOBS_TEST_URI gives one.

    A fresh one every few seconds: what others have left in its history makes the default server slower and slower.
    """
    if TEST_URI:
        yield None
        return
    if spare:
        one, used = spare.pop()
    else:
        one, used = Server(tmp_path_factory.mktemp("server"), test_commands=True), 0.0
        one.start()
    began = boot()
    yield one
    used += boot() - began
    if used < _WORN:
        spare.append((one, used))
    else:
        one.kill()


@pytest.fixture(scope="module")
def uri(server: Server | None) -> str:
    return TEST_URI or server.uri


@pytest.fixture(scope="module")
def python_server(server: Server | None) -> bool:
    """Whether the shared server is the slow one, for which counts are made smaller."""
    return server is not None and server.program.sort == "python"


@pytest.fixture
def proxied(uri: str) -> Iterator[Proxy]:
    """A proxy in front of the shared server; clients that connect to ``proxied.uri`` can be given faults."""
    with Proxy(uri) as one:
        yield one


@pytest.fixture(params=[AsyncMongoClient, MongoClient], ids=["async", "sync"])
async def drive(
    request: pytest.FixtureRequest, proxied: Proxy, namespace: str, driver_litter: None
) -> AsyncIterator[Callable[..., Driver]]:
    """Makes drivers that go through the proxy."""
    made = []

    def make(**options: Any) -> Driver:
        made.append(Driver(request.param, proxied.uri, namespace, **options))
        return made[-1]

    yield make
    for one in made:
        await one.close()


@pytest.fixture(scope="module")
def direct(uri: str) -> Iterator[MongoClient[dict[str, Any]]]:
    """A plain synchronous client that a file's tests share: one for each would cost more than most tests."""
    with MongoClient(uri, tz_aware=True, datetime_conversion="DATETIME_AUTO") as one:
        yield one


@pytest.fixture
def namespace(direct: MongoClient[dict[str, Any]]) -> Iterator[str]:
    """A collection of this test's own."""
    database = f"t{secrets.token_hex(6)}"
    yield f"{database}.jobs"
    direct.drop_database(database)


@pytest.fixture
def raw(direct: MongoClient[dict[str, Any]], namespace: str) -> Any:
    """The test's collection through a plain synchronous client."""
    database, _, name = namespace.partition(".")
    return direct[database][name]


@pytest.fixture
async def client(uri: str) -> AsyncIterator[AsyncMongoClient[dict[str, Any]]]:
    one: AsyncMongoClient[dict[str, Any]] = AsyncMongoClient(uri, tz_aware=True)
    yield one
    await one.close()


@pytest.fixture
def mine(client: AsyncMongoClient[dict[str, Any]], namespace: str) -> Any:
    """The test's collection through an asynchronous client of the user's own."""
    database, _, name = namespace.partition(".")
    return client[database][name]


@pytest.fixture
async def queue(uri: str, namespace: str) -> AsyncIterator[Queue]:
    """A queue on the test's collection, with its indexes."""
    async with Queue(uri, namespace) as one:
        await one.create_indexes()
        yield one
    here = {
        task for task in asyncio.all_tasks() if task.get_name().startswith("streamjobs ") and not task.done()
    }
    if (
        here
    ):  # cancelled, and not waited for beyond stop's bound: on a busy machine they may need a moment more
        _, here = await asyncio.wait(here, timeout=5)
    assert not here, f"left running: {here}"


@pytest.fixture
def source(uri: str, namespace: str) -> Source:
    """Where a queue on the test's collection gets its clients."""
    return Source(uri, namespace, None)


class Seen:
    """The events of a test, to look at and to wait for."""

    def __init__(self) -> None:
        self.all: list[tuple[str, str, dict[str, Any]]] = []
        self._waiting: list[Callable[[], None]] = []
        self._lock = threading.Lock()

    def listen(self, name: str, level: str, fields: dict[str, Any]) -> None:
        with self._lock:
            self.all.append((name, level, fields))
            waiting = list(self._waiting)
        for poke in waiting:
            poke()

    def of(self, name: str, **match: Any) -> list[dict[str, Any]]:
        """The fields of the events of a name whose fields are as given (values or predicates)."""
        return [fields for one, _, fields in list(self.all) if one == name and _fits(fields, match)]

    async def wait(
        self, name: str, *, count: int = 1, timeout: float = 30.0, **match: Any
    ) -> list[dict[str, Any]]:
        """Wait until there are so many of them."""
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def poke() -> None:
            loop.call_soon_threadsafe(changed.set)

        with self._lock:
            self._waiting.append(poke)
        try:
            async with asyncio.timeout(timeout):
                while len(found := self.of(name, **match)) < count:
                    await changed.wait()
                    changed.clear()
            return found
        except TimeoutError:
            have = [(one, fields) for one, _, fields in self.all][-15:]
            raise AssertionError(
                f"waited {timeout} s for {count} x {name} {match}; last events: {have}"
            ) from None
        finally:
            with self._lock:
                self._waiting.remove(poke)


def _fits(fields: dict[str, Any], match: dict[str, Any]) -> bool:
    for key, wanted in match.items():
        value = fields.get(key)
        if not (wanted(value) if callable(wanted) else value == wanted or value == str(wanted)):
            return False
    return True


def check_event(name: str, level: str, fields: dict[str, Any]) -> None:
    """Hold an event against the schema."""
    told = {"event": name, "level": level, "timestamp": "2026-01-01T00:00:00Z", **fields}
    _VALIDATORS[name].validate(told)


@pytest.fixture(autouse=True)
def seen() -> Iterator[Seen]:
    """All events of the test; each sort of them is validated afterwards."""
    one = Seen()
    with subscribe(one.listen):
        yield one
    checked = set()
    for name, level, fields in one.all:
        shape = (name, level, tuple((key, type(value)) for key, value in fields.items()))
        if shape not in checked:
            checked.add(shape)
            check_event(name, level, fields)


@pytest.fixture(autouse=True)
def no_leftover_threads() -> Iterator[None]:
    """A test that leaves a beat behind fails."""
    yield
    for thread in threading.enumerate():
        if thread.name.startswith("streamjobs "):
            thread.join(5)
            assert not thread.is_alive(), f"left running: {thread}"


@pytest.fixture
def failpoint(direct: MongoClient[dict[str, Any]]) -> Iterator[Callable[..., None]]:
    """Arm a failpoint for the client with an appName; disarmed afterwards."""

    def arm(mode: Any, app: str, commands: list[str], **data: Any) -> None:
        direct.admin.command(
            "configureFailPoint",
            "failCommand",
            mode=mode,
            data={"appName": app, "failCommands": commands, **data},
        )

    yield arm
    direct.admin.command("configureFailPoint", "failCommand", mode="off")


@pytest.fixture
def driver_litter() -> Iterator[None]:
    """For tests whose server is not there: what the driver leaves to the collector is collected here."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture
def own_server(tmp_path: Path, driver_litter: None) -> Iterator[Server]:
    """A server of this test's own, which it may kill: acknowledged writes survive that."""
    one = Server(tmp_path / "own", test_commands=True, options=[])
    if one.program.sort != "mongod":
        one._options.append("--sync-on-commit")
    one.start()
    yield one
    one.resume()
    one.kill()
