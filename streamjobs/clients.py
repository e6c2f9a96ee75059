"""Where a queue's collection comes from, and with which concerns.

``retryWrites``, ``timeoutMS`` and the pool belong to a client, so a runner opens its own; ``with_options``
sets what belongs to a collection. Write concern, read concern and read preference are set here, whatever
the URI says.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import pymongo
from pymongo import AsyncMongoClient, MongoClient, ReadPreference
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.asynchronous.collection import AsyncCollection
from pymongo.client_session import ClientSession
from pymongo.collection import Collection
from pymongo.errors import ConfigurationError, InvalidURI, PyMongoError
from pymongo.read_concern import ReadConcern
from pymongo.uri_parser import parse_uri
from pymongo.write_concern import WriteConcern

from streamjobs.errors import BadArgument, ConfigError, ForkError
from streamjobs.job import CODEC

Document = dict[str, Any]
AnyCollection = AsyncCollection[Document] | Collection[Document]
#: Makes a client of the given class (AsyncMongoClient or MongoClient) with at least the given options.
ClientFactory = Callable[..., Any]
C = TypeVar("C", AsyncCollection[Document], Collection[Document])

MAJORITY = WriteConcern("majority")
#: How long a single command may take, in seconds; longer ones are repeated by whoever sent them.
COMMAND_TIMEOUT = 10.0
CLOSE_TIMEOUT = 0.3
#: How often a runner's clients hear of each member, in milliseconds; news comes at once (the beat's client polls), but
#: an error of a write concern makes the driver forget what it knew of a member, and ask again only when this is over.
HEARTBEAT_MS = 1_000
#: How long a connection of a runner may take to be made, and a member to say hello, in milliseconds. Well below
#: COMMAND_TIMEOUT, because what the driver measures of these it takes for the network's round trip, and sends no command
#: with less time left than that: answers that a partition held up for 20 s, its default, would keep it from sending
#: anything for a second or two after the end of the partition.
CONNECT_MS = 5_000


def ours(collection: C) -> C:
    """The collection with the concerns and the codec that every job needs."""
    return collection.with_options(
        codec_options=CODEC,
        read_preference=ReadPreference.PRIMARY,
        write_concern=MAJORITY,
        read_concern=ReadConcern("local"),
    )


class Source:
    """A URI, or a user's collection for puts with a URI or factory for running."""

    def __init__(
        self, source: str | AnyCollection, name: str | None, connect: str | ClientFactory | None
    ) -> None:
        self._pid: int | None = None
        self._given: AnyCollection | None = None
        self._async: dict[asyncio.AbstractEventLoop, AsyncCollection[Document]] = {}
        self._sync: Collection[Document] | None = None
        self._lock = threading.Lock()  # of what is open, and held for no longer than that takes
        self._connecting = threading.Lock()
        self._connect = connect
        if isinstance(source, str):
            self._connect = source if connect is None else connect
            self.database, self.collection = _names(name)
        elif isinstance(source, (AsyncCollection, Collection)):
            if name is not None:
                raise BadArgument("name", name, "leave it out where a collection is given")
            _check_client(source.database.client, source.write_concern)
            self._given = ours(cast("Any", source))
            self.database, self.collection = source.database.name, source.name
        else:
            raise BadArgument(
                "source", source, "give a MongoDB URI, or a pymongo AsyncCollection or Collection"
            )
        if isinstance(self._connect, str):
            _check_uri(self._connect)
        elif self._connect is not None and not callable(self._connect):
            raise BadArgument(
                "connect",
                self._connect,
                "give a MongoDB URI, or a function (cls, **options) that makes a client",
            )

    @property
    def namespace(self) -> str:
        """``database.collection``."""
        return f"{self.database}.{self.collection}"

    @property
    def uri(self) -> str | None:
        """The URI that its clients are made of; None where a function makes them, or nothing can."""
        return self._connect if isinstance(self._connect, str) else None

    def with_uri(self, uri: str, name: str | None = None) -> Source:
        """The same queue on another server, or under another name."""
        return Source(uri, self.namespace if name is None else name, None)

    def connect(self, cls: type[Any], **options: Any) -> Any:
        """A new client of the given class; the caller closes it."""
        if self._connect is None:
            raise ConfigError(
                f"this Queue has a collection ({self.namespace}) but no way to open clients of its own: give "
                "Queue(collection, connect=...) the URI, or a function cls, **options -> client"
            )
        fixed: Document = {
            "tz_aware": True, "datetime_conversion": "DATETIME_AUTO", "uuidRepresentation": "standard",
            "retryWrites": True, "retryReads": True, **options,
        }  # fmt: skip
        if callable(self._connect):
            return self._connect(cls, **fixed)
        try:
            return cls(self._connect, **fixed)
        except (
            ConfigurationError,
            InvalidURI,
            ValueError,
        ) as error:  # what only a look-up of mongodb+srv tells
            problem = _told(error, self._connect)
        raise ConfigError(problem)  # outside, so that it does not carry the driver's error, which has the URI

    def jobs_of(self, client: Any) -> Any:
        """The job collection of a client made by :meth:`connect`."""
        return ours(client[self.database][self.collection])

    def asynchronous(self) -> AsyncCollection[Document]:
        """The collection for the running loop; a client belongs to the loop in which it was made."""
        self._guard()
        if isinstance(self._given, AsyncCollection):
            return self._given
        loop = asyncio.get_running_loop()
        opened = self._async.get(loop)
        if opened is None:
            opened = self._open(AsyncMongoClient)
            with self._lock:  # those of loops that have ended can't be closed any more, and go with them
                going = {one: its for one, its in self._async.items() if not one.is_closed()}
                self._async = {**going, loop: opened}
                self._pid = os.getpid()
        return cast("AsyncCollection[Document]", opened)

    def synchronous(self) -> Collection[Document]:
        """The collection for programs without a loop."""
        self._guard()
        if isinstance(self._given, Collection):
            return self._given
        opened = self._sync
        if opened is None:
            with self._connecting:  # two threads may come at once
                opened = self._sync
                if opened is None:
                    opened = self._open(MongoClient)
                    with self._lock:
                        self._sync, self._pid = opened, os.getpid()
        return cast("Collection[Document]", opened)

    def _open(self, cls: type[Any]) -> Any:
        """The job collection of a client for puts."""
        return self.jobs_of(
            self.connect(cls, appname="streamjobs/put", timeoutMS=int(2000 * COMMAND_TIMEOUT))
        )

    async def close(self) -> None:
        """Close what this source opened in this loop, and for programs without one; a given collection's client is the user's."""
        loop = asyncio.get_running_loop()
        with self._lock:
            opened = self._async.pop(loop, None)
        if opened is not None:
            await close(opened.database.client)
        self.close_sync()

    def close_sync(self) -> None:
        """Close the synchronous client, if one was opened."""
        with self._lock:
            opened, self._sync = self._sync, None
            if self._given is None and all(loop.is_closed() for loop in self._async):
                self._pid = None  # nothing is open: a forked child may begin anew
        if opened is not None:
            close_sync(opened.database.client)

    def _guard(self) -> None:
        here = os.getpid()
        if self._pid is None:
            self._pid = here
        elif self._pid != here:
            raise ForkError(self._pid, here)


async def close(client: Any, limit: float = CLOSE_TIMEOUT) -> None:
    """Close a client or a stream within a moment; with the server away the driver would wait for it.

    The driver's own limit does not cover its waiting for locks, so there is a second one.
    """

    async def closing() -> None:
        with pymongo.timeout(limit):
            await client.close()

    task = asyncio.ensure_future(closing())
    await asyncio.wait([task], timeout=limit + 0.1)
    if task.done():
        task.result()
    else:
        task.cancel()


def close_sync(client: Any, limit: float = CLOSE_TIMEOUT) -> None:
    """The same for a synchronous client."""
    with pymongo.timeout(limit):
        client.close()


def check_session(session: Any, collection: AnyCollection) -> None:
    """Refuse a session that could not carry a put."""
    if session is None:
        return
    wanted = AsyncClientSession if isinstance(collection, AsyncCollection) else ClientSession
    if not isinstance(session, wanted):
        raise BadArgument(
            "session", session, f"give a {wanted.__name__} (jobs.put and jobs.sync.put take their own sort)"
        )
    if session.client is not collection.database.client:
        raise ConfigError(
            "the session belongs to another client than this Queue's collection: make the Queue from a "
            "collection of the client that started the session, Queue(client.app.jobs, connect=uri)"
        )
    concern = getattr(getattr(getattr(session, "_transaction", None), "opts", None), "write_concern", None)
    if session.in_transaction and concern is not None and concern.document.get("w", "majority") != "majority":
        raise ConfigError(
            f"the transaction's write concern is {concern.document}: a job put in it could be lost in an "
            "election; start it with write_concern=WriteConcern('majority')"
        )


def _check_client(client: Any, concern: WriteConcern) -> None:
    if client.options.retry_writes is False:
        raise ConfigError(
            "the collection's client has retryWrites=false: a put could be lost in an election; leave the "
            "option out of its URI, or give Queue a URI so that it opens a client of its own"
        )
    if concern.document.get("w") == 0:
        raise ConfigError(
            "the collection has w=0, so that no put would be acknowledged: leave it out of the client's options"
        )


def _names(name: str | None) -> tuple[str, str]:
    if name is None:
        raise BadArgument("name", name, 'give "database.collection", for example Queue(uri, "app.jobs")')
    if not isinstance(name, str) or not name.partition(".")[0] or not name.partition(".")[2]:
        raise BadArgument("name", name, 'give "database.collection", for example "app.jobs"')
    database, _, collection = name.partition(".")
    if (
        set(database) & set('/\\ "$*<>:|?\0')
        or set(collection) & set("$\0")
        or collection.startswith("system.")
    ):
        raise BadArgument("name", name, "use letters, digits, - and _ in it")
    return database, collection


def _check_uri(uri: str) -> None:
    """Say what is wrong with a URI, without showing the password that may be in it."""
    if uri.startswith("mongodb+srv://"):
        return  # the driver resolves it when it connects
    problem, parsed = "", cast("Mapping[str, Any]", {})
    try:
        parsed = parse_uri(uri, warn=False)
    except (InvalidURI, ConfigurationError, PyMongoError, ValueError) as error:
        problem = _told(error, uri)
    if problem:
        raise ConfigError(problem)  # outside, as above
    if parsed["options"].get("retryWrites") is False or parsed["options"].get("w") == 0:
        raise ConfigError("the URI has retryWrites=false or w=0: jobs could be lost; leave the option out")


def _told(error: Exception, uri: str) -> str:
    return f"the MongoDB URI can't be used ({type(error).__name__}: {_safe(str(error), uri)})"


def _safe(text: str, uri: str) -> str:
    secret = uri.partition("://")[2].rpartition("@")[0]
    if set(secret) & set("/?#"):  # cut in the wrong place, so the text may hold any part of it
        return "escape the user name and password with urllib.parse.quote_plus; the rest is not shown"
    return text.replace(secret, "***") if secret else text
