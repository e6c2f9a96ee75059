"""The first words with a server: whether it answers, what it is, what time it has, whether the indexes are there."""

from __future__ import annotations

from collections.abc import Mapping

import pymongo
from pymongo.errors import PyMongoError

from streamjobs import events
from streamjobs.clients import COMMAND_TIMEOUT
from streamjobs.clock import ServerClock
from streamjobs.errors import ConnectError, StreamRefused
from streamjobs.indexes import command, missing
from streamjobs.runner.store import Store


async def greet(store: Store, clock: ServerClock, namespace: str, *, stream: bool) -> None:
    """Ask the server who it is; learn its clock.

    Raises:
        ConnectError: none answers.
        StreamRefused: it is a standalone, and a ``stream`` is wanted.

    """
    try:
        with pymongo.timeout(COMMAND_TIMEOUT):
            await store.learn(clock)  # pays for connecting
            hello = await store.learn(clock)
    except PyMongoError as error:
        # what follows is the driver's whole view of the servers
        short = str(error).partition(", Timeout:")[0]
        raise ConnectError(
            f"no MongoDB server answers for {namespace} ({type(error).__name__}: {short[:300]}): "
            "check that it runs and that the URI names it"
        ) from error
    if stream and not hello.get("setName") and hello.get("msg") != "isdbgrid":
        raise StreamRefused(
            "this server is a standalone, which has no change streams: start mongod with --replSet rs0 and run "
            "rs.initiate() once (a replica set of one member will do), or choose poll=SECONDS"
        )


async def check_indexes(store: Store, namespace: str, who: Mapping[str, str]) -> None:
    """Tell (``indexes.missing``) of declared indexes that are not there."""
    try:
        names = [index.name for index in missing(await store.index_information())]
    except PyMongoError as error:
        names = [f"unknown ({type(error).__name__})"]
    if names:
        events.emit("indexes.missing", **who, names=names, fix=command(namespace))


def no_stream(namespace: str, error: BaseException | None) -> StreamRefused:
    """What to say when a server gives no change stream."""
    return StreamRefused(
        f"the server gives no change stream on {namespace} ({error}): it takes a replica set or sharded cluster, the "
        "privileges find and changeStream on this collection (see deploy/role.js), and a host that allows streams; or "
        "choose poll=SECONDS"
    )
